"""Recorded results: what is written, where it comes from, and that a file is whole or not there."""

import json
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
import xarray as xr
from pydantic import Field

import stiffkit
from stiffkit.chapters import Chapter
from stiffkit.results import load_recorded, record

PROVENANCE = {"parameters", "stiffkit", "commit", "torch", "python", "device", "threads", "peak_memory_mb", "seconds"}


class Small(Chapter):
    number: ClassVar[int] = 7
    name: ClassVar[str] = "small"

    seed: int = 1
    word: str = "a"
    max_minutes: float = Field(1.0, gt=0)


def measured(p):
    """Results of every kind that a chapter has."""
    random = np.random.default_rng(p.seed)
    return xr.Dataset(
        {
            "curve": (("stage", "epsilon"), random.normal(size=(2, 3))),
            "matrix": (("class_a", "class_b"), random.normal(size=(4, 4)).astype("float32")),
            "counts": (("class_a", "class_b"), random.integers(0, 2**40, (4, 4))),
            "accuracy": random.random(),
        },
        {"stage": ["before", "after"], "epsilon": np.logspace(-6, 0, 3), "class_a": range(4), "class_b": range(4)},
        {"data_checksum": "abc"},
    ).assign_coords(class_name=("class_a", ["zero", "one", "two", "drei ü"]))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty book."""
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path / "book"))
    return tmp_path / "book" / "results"


def test_round_trip(folder):
    path = record(Small(), measured)
    assert path == folder / "07_small.nc"
    found, expected = load_recorded(Small()), measured(Small())
    xr.testing.assert_allclose(found, expected, rtol=1e-6)
    xr.testing.assert_identical(found.counts, expected.counts)
    xr.testing.assert_equal(found.coords.to_dataset(), expected.coords.to_dataset())


def test_floats_are_written_as_float32_and_the_rest_as_it_is():
    record(Small(), measured)
    found, expected = load_recorded(Small()), measured(Small())
    assert {name: str(array.dtype) for name, array in found.data_vars.items()} == {
        "curve": "float32",
        "matrix": "float32",
        "counts": "int64",
        "accuracy": "float32",
    }
    np.testing.assert_array_equal(found.curve, expected.curve.astype("float32"))
    assert not [name for name, array in found.data_vars.items() if array.isnull().any()]


def test_what_is_measured_is_left_alone():
    results = measured(Small())
    before = results.copy(deep=True)
    record(Small(), lambda p: results)
    xr.testing.assert_identical(results, before)


def test_provenance():
    record(Small(seed=4), measured)
    attributes = load_recorded(Small(seed=4)).attrs
    assert set(attributes) == PROVENANCE | {"data_checksum"}
    assert attributes["data_checksum"] == "abc"
    assert json.loads(attributes["parameters"]) == {"seed": 4, "word": "a"}
    assert attributes["stiffkit"] == stiffkit.__version__
    assert attributes["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", attributes["commit"])
    assert attributes["threads"] == torch.get_num_threads()
    assert attributes["device"]
    assert attributes["peak_memory_mb"] > 50


def test_seconds_are_those_of_the_measuring(monkeypatch):
    clock = iter([10.0, 12.34, 99.0])
    monkeypatch.setattr("stiffkit.results.time.perf_counter", lambda: next(clock))
    record(Small(), measured)
    assert load_recorded(Small()).attrs["seconds"] == 2.3


def test_nothing_recorded_and_other_parameters():
    assert load_recorded(Small()) is None
    record(Small(), measured)
    assert load_recorded(Small(seed=2)) is None
    assert load_recorded(Small(word="b")) is None
    assert load_recorded(Small(max_minutes=50)) is not None


def test_recording_again_replaces_the_file(folder):
    record(Small(), measured)
    record(Small(seed=2), measured)
    assert load_recorded(Small()) is None
    np.testing.assert_allclose(load_recorded(Small(seed=2)).curve, measured(Small(seed=2)).curve, rtol=1e-6)
    assert [path.name for path in folder.iterdir()] == ["07_small.nc"]


def half_written(results, path, **options):
    path.write_bytes(b"half of a file")
    raise OSError("no space left on device")


def fails(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("place", "broken"),
    [("xarray.Dataset.to_netcdf", half_written), ("stiffkit.results.os.replace", fails)],
    ids=["while writing", "while renaming"],
)
def test_a_write_that_fails_leaves_the_old_file_whole(folder, monkeypatch, place, broken):
    old = record(Small(), measured).read_bytes()
    monkeypatch.setattr(place, broken)
    with pytest.raises(OSError, match="no space left"):
        record(Small(seed=2), measured)
    assert [path.name for path in folder.iterdir()] == ["07_small.nc"]
    assert (folder / "07_small.nc").read_bytes() == old


def test_a_first_write_that_fails_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr("xarray.Dataset.to_netcdf", half_written)
    with pytest.raises(OSError, match="no space left"):
        record(Small(), measured)
    assert not list(folder.iterdir())
    assert load_recorded(Small()) is None


def test_a_measuring_that_fails_leaves_the_old_file_whole(folder):
    old = record(Small(), measured).read_bytes()
    with pytest.raises(OSError, match="no space left"):
        record(Small(), fails)
    assert [path.read_bytes() for path in folder.iterdir()] == [old]


def test_the_file_is_compressed_and_can_be_deleted_after_reading(folder):
    zeros = xr.Dataset({"matrix": (("a", "b"), np.zeros((1000, 1000)))})
    path = record(Small(), lambda p: zeros)
    assert path.stat().st_size < 100_000
    assert load_recorded(Small()).matrix.shape == (1000, 1000)
    path.unlink()
    assert load_recorded(Small()) is None


def test_the_device_is_the_one_that_computed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    record(Small(), measured)  # all of it on the CPU, as definition.measure does
    assert load_recorded(Small()).attrs["device"] != "a GPU"
