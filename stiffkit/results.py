"""Results on disk: whole, labelled, with the run that made them; recorded ones first, cached ones second."""

import io
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from shutil import which
from typing import Any, Protocol

import h5py
import torch
import xarray as xr

import stiffkit
from stiffkit import checked_file, windows
from stiffkit.checked_file import ResultsError

CELL = 2.0**-12  # resolution of recorded class matrices: a fiftieth of a cell's standard error, at half the size
COARSE_CELL = 2.0**-10  # of more than twenty classes, whose cells have fewer points
ATTRIBUTED = ("layer_", "share_", "pair_", "alive_", "padded_", "unclipped", "decile_")  # so begin attribution's names


class Described(Protocol):
    """What identifies a run: an `Experiment`."""

    key: str
    identity: str


class Measured(Protocol):
    """What identifies a chapter's own measurements: a `Chapter`."""

    identity: str
    recorded: Path


def book() -> Path:
    """The folder of chapters and recorded results: `$STIFFKIT_BOOK`, or `book` beside the package in a checkout."""
    return Path(os.environ.get("STIFFKIT_BOOK") or Path(__file__).parent.parent / "book")


def cache() -> Path:
    """Where computed results are kept: `results` in `$STIFFKIT_CACHE`, by default the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("STIFFKIT_CACHE")
    return (Path(chosen).expanduser() if chosen else user_cache_path("stiffkit", appauthor=False)) / "results"


def cached(experiment: Described) -> Path:
    """The file of one run in the cache, whether it is there or not."""
    return cache() / f"{experiment.key}.nc"


def recorded() -> list[Path]:
    """The files behind the book."""
    return sorted((book() / "results").glob("*.nc"))


def find(experiment: Described) -> xr.Dataset | None:
    """The results of an experiment, recorded or cached, or None; attribute `source` tells where they were found.

    A file that is damaged or holds another experiment is named in a warning and not used; in the cache it is renamed,
    with `.set-aside` at its end, so that the run can be computed again. Results of other versions of the training or
    the measuring code are not used either.
    """
    return _found(_in_book(experiment) or _in_cache(experiment))


def find_recorded(experiment: Described) -> xr.Dataset | None:
    """The recorded results of an experiment, or None."""
    return _found(_in_book(experiment))


def source(experiment: Described) -> str:
    """Where `find` would find the results of an experiment, "" for nowhere; their arrays are not read."""
    place = _in_book(experiment) or _in_cache(experiment)
    return place[0] if place else ""


def _found(place: tuple[str, Callable[[], xr.Dataset]] | None) -> xr.Dataset | None:
    return place[1]().assign_attrs(source=place[0]) if place else None


def _in_book(experiment: Described) -> tuple[str, Callable[[], xr.Dataset]] | None:
    """The name of the recorded file that has the run, and what reads the run."""
    for path in recorded():
        try:
            content = _content(path, path.stat().st_mtime_ns)
        except ResultsError as error:
            warnings.warn(f"{error}; recorded results are not read from it (git checkout restores it)", stacklevel=4)
            continue
        attributes = _attributes(content).get(experiment.identity)
        if attributes is not None and is_current(attributes):
            return f"recorded, {path.name}", partial(_run, content, experiment.identity)
    return None


def _in_cache(experiment: Described) -> tuple[str, Callable[[], xr.Dataset]] | None:
    """The same for the cache."""
    path = cached(experiment)
    if not path.exists():
        return None
    with checked_file.setting_aside(path):
        content = checked_file.read(path)
        attributes = _attributes(content)
        if experiment.identity not in attributes:
            raise ResultsError(f"{path} holds another experiment: {', '.join(attributes) or None}")
        if is_current(attributes[experiment.identity]):
            return "cached", partial(_opened, content)
    return None


def is_current(attributes: Mapping[str, Any]) -> bool:
    """Whether a run of these attributes was made with the present versions of the training and the measuring code."""
    return all(attributes.get(name) == version for name, version in versions().items())


def versions() -> dict[str, int]:
    """The versions of the training and the measuring code; results of others are stale."""
    from stiffkit.measurement import MEASUREMENT_VERSION
    from stiffkit.training import TRAINING_VERSION

    return {"training_version": TRAINING_VERSION, "measurement_version": MEASUREMENT_VERSION}


def is_reserved(key: str) -> bool:
    """Whether a process is at work on a training."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(cache() / f"{key}.lock", timeout=0):
            return False
    except Timeout:
        return True


def save(experiment: Described, run: xr.Dataset) -> Path:
    """Write a run into the cache, with the experiment and what it was made with."""
    attributes = {**provenance(), **run.attrs, "experiment": experiment.identity}
    return write(cached(experiment), run.assign_attrs(attributes))


@contextmanager
def reserved(key: str) -> Iterator[None]:
    """Let one process at a time do a training, by its key; others wait, and find its results."""
    from filelock import FileLock

    path = cache() / f"{key}.lock"
    lock = FileLock(path)
    with checked_file.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write(path: Path, dataset: xr.Dataset) -> Path:
    """Write one netCDF file, float32 and compressed; its SHA-256 follows, beyond the end that netCDF readers see."""
    floats = [name for name, array in dataset.data_vars.items() if array.dtype == "float64"]
    dataset = dataset.assign({name: dataset[name].astype("float32") for name in floats})
    arrays = {
        name: array.shape for name, array in dataset.data_vars.items() if array.size > 1 and array.dtype.kind in "fi"
    }
    compressed = {n: {"zlib": True, "complevel": 9, "shuffle": True, "chunksizes": s} for n, s in arrays.items()}
    with _locks_of_this_process():
        content = bytes(dataset.to_netcdf(engine="h5netcdf", encoding=compressed))
    return checked_file.write(path, content)


def _locks_of_this_process() -> AbstractContextManager:
    """In a Dask worker xarray asks the scheduler for a lock, which it cannot give for a file in memory."""
    if "distributed" not in sys.modules:
        return nullcontext()
    import dask

    return dask.config.set(scheduler="synchronous")


def load(path: Path) -> xr.Dataset:
    """Read a file that `write` wrote.

    Raises:
        ResultsError: the file is not what its checksum says. Its content is looked at after that alone: HDF5 may hang
            on a file with a single wrong bit.

    """
    return _opened(checked_file.read(path))


def _opened(content: bytes) -> xr.Dataset:
    return xr.load_dataset(io.BytesIO(content), engine="h5netcdf")


@lru_cache(maxsize=16)
def _content(path: Path, changed: int) -> bytes:
    """What a recorded file holds, read and checked once while it stays as it is: chapters look up many runs in it."""
    return checked_file.read(path)


@lru_cache(maxsize=64)
def _parsed(content: bytes) -> xr.Dataset:
    """The whole of a recorded file; `_run` copies from it."""
    return _opened(content)


@lru_cache(maxsize=64)
def _attributes(content: bytes) -> dict[str, dict[str, Any]]:
    """What each run in a file was made with, by its experiment; a chapter's own measurements have the name ""."""
    with h5py.File(io.BytesIO(content)) as file:
        if "provenance" in file:
            identities, provenances = file["experiment"][()], file["provenance"][()]
            return {e.decode(): json.loads(p) for e, p in zip(identities, provenances, strict=True)}
        own = _plain(dict(file.attrs))
        return {own.get("experiment", ""): own}


def _run(content: bytes, identity: str) -> xr.Dataset:
    """One run of a recorded file."""
    from stiffkit.experiment import Experiment

    run = _parsed(content).isel(run=list(_attributes(content)).index(identity)).drop_vars(["experiment", "provenance"])
    present = run.isel(_present(run, Experiment.model_validate_json(identity)))
    attributes = _attributes(content)[identity]
    return present.copy(deep=True).assign_attrs(attributes, experiment=identity)


def _present(run: xr.Dataset, experiment: Any) -> dict[str, Any]:
    """Where a run of a recorded file has something: other runs in it have other checkpoints, windows, layers, ..."""
    measured = experiment.measurement.arithmetics
    where = {"images": run.epochs.notnull().values, "arithmetic": run.arithmetic.isin(measured).values}
    if "space" in run.dims:
        where["space"] = run.observed.notnull().any([d for d in run.observed.dims if d != "space"]).values
    if "layer" in run.dims:
        of_layers = [values for values in run.data_vars.values() if "layer" in values.dims]
        where["layer"] = sum(v.notnull().any([d for d in v.dims if d != "layer"]) for v in of_layers).values > 0
    if "at" in run.dims:
        names = windows.places(experiment.measurement.stopping_losses, experiment.training.epochs)
        known = run["at"].values.tolist()
        where["at"] = [known.index(name) for name in names if name in known]
    return where


def runs(path: Path) -> list[xr.Dataset]:
    """The runs in a file: those of a recorded one, or the one of a cached one."""
    content = checked_file.read(path)
    if path.is_relative_to(cache()):
        return [_opened(content)]  # one run a file
    return [_run(content, identity) for identity in _attributes(content) if identity]


def described(path: Path) -> dict[str, dict[str, Any]]:
    """What each run in a file was made with, by its experiment; "" for a chapter's own. Arrays are not read.

    Raises:
        ResultsError: the file is damaged.

    """
    return _attributes(checked_file.read(path))


def stale(path: Path) -> int:
    """How many results in a recorded file were made by other versions of the training or the measuring code."""
    return sum(not is_current(attributes) for attributes in described(path).values())


def side_by_side(found: Sequence[xr.Dataset], *axes: str) -> xr.Dataset:
    """Runs along one dimension for each field that they differ in, `seed` if none is named; NaN where there is none."""
    from stiffkit.experiment import Experiment

    axes = axes or ("seed",)
    fields = [Experiment.model_validate_json(run.attrs["experiment"]).fields for run in found]
    places = {name: ("run", [str(f[name]) if isinstance(f[name], tuple) else f[name] for f in fields]) for name in axes}
    sources = sorted({run.attrs.get("source", "") for run in found})
    together = xr.concat(
        found, "run", join="outer", combine_attrs="drop_conflicts", coords="minimal", compat="override"
    ).assign_coords(places)
    along = together.swap_dims(run=axes[0]) if len(axes) == 1 else together.set_index(run=list(axes)).unstack("run")
    return along.assign_attrs(source="; ".join(sources))


def pack(name: str, patterns: Sequence[str], leave_out: Collection[str] = ()) -> Path:
    """Turn runs into the one file that is recorded: book/results/NAME.nc.

    Args:
        name: of the file, such as "02_class_matrices".
        patterns: of keys, such as `mnist-fc-30ep-*`. The runs that match are taken from the cache; runs that the file
            has already stay in it, stale ones too, unless the cache has them anew.
        leave_out: variables that the book does not show.

    Returns:
        The file: runs along `run`, the experiment and the provenance of each as JSON. Class matrices are
        rounded to multiples of 1/4096, and those in other than exact arithmetic, or by true class, kept at the four
        stages alone; curves and lines in distance, and what attribution gives, are rounded likewise. Of more than
        twenty classes, matrices and similarities of inputs are rounded to 1/1024, and matrices kept in exact arithmetic
        alone: of validation images at the four stages, of other pairs at the first and the last. Everything else is
        kept as it was.

    Raises:
        ResultsError: if no run in the cache matches, or one is damaged.

    """
    path = book() / "results" / f"{name}.nc"
    chosen = [p for p in sorted(cache().glob("*.nc")) if any(fnmatch(p.stem, pattern) for pattern in patterns)]
    fresh = {run.attrs["experiment"]: run for run in map(load, chosen) if is_current(run.attrs)}
    if not fresh:
        raise ResultsError(f"no run in {cache()} matches {' '.join(patterns)}: stiffkit results list shows the keys")
    if path.exists() and "run" not in load(path).dims:
        raise ResultsError(f"{path} holds a chapter's own measurements, not runs: choose another name")
    kept = {run.attrs["experiment"]: run for run in (runs(path) if path.exists() else [])}
    together = [run.drop_vars(leave_out, errors="ignore") for _, run in sorted((kept | fresh).items(), key=_order)]
    return write(path, _packed(together))


def _order(item: tuple[str, xr.Dataset]) -> tuple[str, int]:
    training = json.loads(item[0])["training"]
    return json.dumps({k: v for k, v in training.items() if k != "seed"}, sort_keys=True), training["seed"]


def _packed(found: Sequence[xr.Dataset]) -> xr.Dataset:
    slim = [_slim(run) for run in found]
    own = [{k: v for k, v in run.attrs.items() if k not in ("experiment", "source")} for run in found]
    labels = {
        "experiment": ("run", [run.attrs["experiment"] for run in found]),
        "provenance": ("run", [json.dumps(_plain(attributes), sort_keys=True) for attributes in own]),
    }
    bare = [_as_type(run.drop_attrs(), "U", object) for run in slim]  # xarray may cut the longer words of an outer join
    together = xr.concat(bare, "run", join="outer", data_vars="all", coords="minimal", compat="override")
    return _as_type(together, "O", str).assign(labels)


def _as_type(run: xr.Dataset, kind: str, dtype: type) -> xr.Dataset:
    """Coordinates of one kind as another type."""
    return run.assign_coords(
        {n: (c.dims, c.values.astype(dtype)) for n, c in run.coords.items() if c.dtype.kind == kind}
    )


def _slim(run: xr.Dataset) -> xr.Dataset:
    from stiffkit.experiment import stages

    exact, at_stages = run.arithmetic == "exact", run.images.isin(stages(run.images.values))
    cell, matrices = CELL, at_stages | exact
    if run.sizes.get("class_a", 0) > 20:
        ends = run.images.isin(run.images[[0, -1]])
        cell, matrices = COARSE_CELL, exact & at_stages & (ends | (run.regime == "val-val"))
    for name, kept in (("stiffness", matrices), ("true_stiffness", at_stages)):
        if name in run:
            run = run.assign({name: run[name].where(kept)})
    rounded = (
        "stiffness",
        "true_stiffness",
        "curve",
        "layer_curve",
        "line",
        *(["input_similarity"] if cell == COARSE_CELL else []),
    )
    coarse = [name for name in run.data_vars if name in rounded or name.startswith(ATTRIBUTED)]
    return run.assign({name: (run[name] / cell).round() * cell for name in coarse})


def _plain(attributes: dict) -> dict:
    return {k: v.item() if hasattr(v, "item") else v for k, v in attributes.items()}


def record(p: Measured, measure: Callable[..., xr.Dataset]) -> Path:
    """Measure a chapter that is not made of runs, and write the file that the book shows.

    Args:
        p: the chapter's parameters.
        measure: gives the results of these parameters.

    Returns:
        Where the file lies.

    """
    start = time.perf_counter()
    found = measure(p)
    seconds = round(time.perf_counter() - start, 1)
    return write(p.recorded, found.assign_attrs(parameters=p.identity, **versions(), **provenance(), seconds=seconds))


def load_recorded(p: Measured) -> xr.Dataset | None:
    """The recorded results of these parameters, or None if there are none."""
    if not p.recorded.exists():
        return None
    found = load(p.recorded)
    same = json.loads(found.attrs["parameters"]) == json.loads(p.identity)
    return found if same and is_current(found.attrs) else None


def provenance() -> dict[str, str | int | float]:
    """What results are made with: versions, commit, machine, memory."""
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
