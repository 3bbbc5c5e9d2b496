"""Recorded results: one netCDF file a chapter, with the run that made it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import which

import torch
import xarray as xr

import stiffkit
from stiffkit.chapters import Chapter


def record(p: Chapter, measure: Callable[[Chapter], xr.Dataset]) -> Path:
    """Measure a chapter and write the file that the book shows: float32, compressed, with its provenance.

    Args:
        p: the chapter's parameters.
        measure: gives the results of these parameters.

    Returns:
        Where the file lies. It is written under a temporary name and renamed, so that a file is whole or not there.

    """
    start = time.perf_counter()
    results = measure(p)
    seconds = time.perf_counter() - start
    floats = [name for name, array in results.data_vars.items() if array.dtype == "float64"]
    results = results.assign({name: results[name].astype("float32") for name in floats})
    results.attrs.update(parameters=p.identity, **_provenance(), seconds=round(seconds, 1))
    p.recorded.parent.mkdir(parents=True, exist_ok=True)
    part = p.recorded.with_suffix(".part")
    compressed = {name: {"zlib": True, "complevel": 9} for name in results.data_vars if results[name].ndim}
    try:
        results.to_netcdf(part, engine="h5netcdf", encoding=compressed)
        os.replace(part, p.recorded)
    finally:
        part.unlink(missing_ok=True)
    return p.recorded


def load_recorded(p: Chapter) -> xr.Dataset | None:
    """The recorded results of these parameters, or None if there are none."""
    if not p.recorded.exists():
        return None
    results = xr.load_dataset(p.recorded, engine="h5netcdf")
    return results if json.loads(results.attrs["parameters"]) == json.loads(p.identity) else None


def _provenance() -> dict[str, str | int | float]:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if which("git") else ""
    return {
        "stiffkit": stiffkit.__version__,
        "commit": commit or "unknown",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "peak_memory_mb": _peak_memory(),
    }


def _peak_memory() -> float:
    if sys.platform == "win32":
        return float("nan")
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return round(kilobytes / 1024, 1)
