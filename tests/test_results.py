"""Recorded results: what is written, where it comes from, and that a file is whole or not there."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from pydantic import Field

import stiffkit
from stiffkit import checked_file, results, windows
from stiffkit.chapters import Chapter
from stiffkit.experiment import Experiment, stages
from stiffkit.measurement import MEASUREMENT_VERSION
from stiffkit.results import ResultsError, load_recorded, record
from stiffkit.training import TRAINING_VERSION

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
def folder(own_folders):
    return own_folders / "book" / "results"


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
    assert {name: str(array.dtype) for name, array in found.data_vars.items() if array.ndim} == {
        "curve": "float32",
        "matrix": "float32",
        "counts": "int64",
    }
    np.testing.assert_array_equal(found.curve, expected.curve.astype("float32"))
    assert not [name for name, array in found.data_vars.items() if array.isnull().any()]


def test_a_single_float_is_written_as_float32_too():
    record(Small(), measured)
    assert load_recorded(Small()).accuracy.dtype == "float32"


def test_what_is_measured_is_left_alone():
    found = measured(Small())
    before = found.copy(deep=True)
    record(Small(), lambda p: found)
    xr.testing.assert_identical(found, before)


def test_provenance():
    record(Small(seed=4), measured)
    attributes = load_recorded(Small(seed=4)).attrs
    assert set(attributes) == PROVENANCE | {"data_checksum", "training_version", "measurement_version"}
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


def half_written(path, content, write_bytes=Path.write_bytes):
    write_bytes(path, b"half of a file")
    raise OSError("no space left on device")


def fails(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("place", "broken"),
    [("pathlib.Path.write_bytes", half_written), ("stiffkit.checked_file.os.replace", fails)],
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
    monkeypatch.setattr("pathlib.Path.write_bytes", half_written)
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


# ---------------------------------------------------------------------------------------------------------------- runs

QUARTERS = [0, 320, 608, 928, 1201, 1617, 2402, 3603]  # images seen at the checkpoints of a made-up run


def an_experiment(seed=1, **fields):
    return Experiment.of(**({"dataset": "digits", "model": "fc", "epochs": 3, "points": 20} | fields), seed=seed)


def a_run(seed=1, images=QUARTERS, arithmetics=("exact", "float32", "keras2019")):
    """A made-up run: labels, matrices, numbers that are there at the stages alone."""
    random = np.random.default_rng(seed)
    labels = {
        "images": list(images),
        "arithmetic": list(arithmetics),
        "class_a": range(2),
        "class_b": range(2),
    }

    def values(*dimensions):
        return dimensions, random.normal(size=[len(labels[d]) for d in dimensions])

    run = xr.Dataset(
        {
            "stiffness": values("images", "arithmetic", "class_a", "class_b"),
            "within": values("images", "arithmetic"),
            "within_error": values("images"),
            "epochs": ("images", [k / 1201 for k in images]),
        },
        labels,
        {
            "classes": json.dumps(["a", "b"]),
            "diverged": 0,
            "seconds": 1.5,
            "training_version": TRAINING_VERSION,
            "measurement_version": MEASUREMENT_VERSION,
        },
    )
    run["within_error"] = run.within_error.where(run.images.isin(stages(images)))
    return run


def in_cache(seed=1, run=None, **fields):
    """Put a run into the cache; its experiment and its file."""
    experiment = an_experiment(seed, **fields)
    return experiment, results.save(experiment, a_run(seed) if run is None else run)


def assert_same(found, run):
    """All numbers and labels of a run, to float32."""
    assert set(found.variables) == set(run.variables)
    xr.testing.assert_allclose(found.drop_attrs(), run.drop_attrs(), rtol=1e-6)
    assert {k: found.attrs[k] for k in run.attrs} == run.attrs


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    assert results.cache() == tmp_path / "cache" / "results"
    assert results.cached(an_experiment()) == results.cache() / f"{an_experiment().key}.nc"
    monkeypatch.delenv("STIFFKIT_CACHE")
    assert "stiffkit" in str(results.cache())


def test_a_run_comes_back_from_the_cache():
    assert results.find(an_experiment()) is None
    experiment, path = in_cache()
    found = results.find(experiment)
    assert path == results.cached(experiment)
    assert found.attrs["source"] == "cached"
    assert found.attrs["experiment"] == experiment.identity
    assert set(found.attrs) >= {"stiffkit", "commit", "torch", "python", "device", "threads", "peak_memory_mb"}
    assert_same(found, a_run())
    assert {str(found[name].dtype) for name in found.data_vars} == {"float32"}
    assert found.images.dtype == "int64"
    assert names(results.cache()) == [path.name]


def test_a_run_of_other_versions_is_not_used_and_stays():
    for number, part in enumerate(("training_version", "measurement_version")):
        experiment, path = in_cache(number, a_run().assign_attrs({part: 0}))
        before = path.read_bytes()
        assert results.find(experiment) is None
        assert path.read_bytes() == before


def test_write_and_load_with_a_checksum(tmp_path):
    path = results.write(tmp_path / "new folder" / "a.nc", a_run())
    found = results.load(path)
    assert_same(found, a_run())
    content, _, trailer = path.read_bytes().rpartition(b"\nstiffkit, SHA-256 ")
    assert trailer.decode().strip() == hashlib.sha256(content).hexdigest()
    xr.testing.assert_identical(xr.load_dataset(path, engine="h5netcdf"), found)
    again = results.write(tmp_path / "again.nc", found)
    xr.testing.assert_identical(results.load(again), found)


def test_one_number_changed_by_another_program_is_noticed(tmp_path):
    path = results.write(tmp_path / "a.nc", a_run())
    with h5py.File(path, "r+") as file:
        file["within"][0, 0] += 0.01
    with pytest.raises(ResultsError, match=r"a\.nc.*checksum"):
        results.load(path)


def test_a_missing_file_is_a_results_error(tmp_path):
    with pytest.raises(ResultsError, match=r"none\.nc"):
        results.load(tmp_path / "none.nc")


# -------------------------------------------------------------------------------------------------------------- damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_a_little(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("this is no netCDF file\n", encoding="utf-8")


def foreign(path):
    """A netCDF file of another program."""
    path.unlink()
    xr.Dataset({"a": ("x", [1.0, 2.0])}).to_netcdf(path, engine="h5netcdf")


def of_another_experiment(path):
    other = results.save(an_experiment(seed=77), a_run(77))
    os.replace(other, path)


def flipped(place):
    """One bit turned over, in the signature, or in the middle of a variable's numbers."""

    def damage(path):
        data = bytearray(path.read_bytes())
        if place == "signature":
            position = 0
        else:
            with h5py.File(path) as file:
                if file[place].chunks:
                    chunk = file[place].id.get_chunk_info(0)
                    position = chunk.byte_offset + chunk.size // 2
                else:
                    position = file[place].id.get_offset()
        data[position] ^= 1
        path.write_bytes(data)

    damage.__name__ = f"a bit of {place}"
    return damage


FLIPS = [flipped(place) for place in ("signature", "stiffness", "images")]
DAMAGES = [cut, cut_a_little, emptied, text, foreign, of_another_experiment, *FLIPS]
damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
# h5netcdf complains about a file that it could not open, once more, when it forgets it
half_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@half_open
@damages
def test_a_damaged_file_in_the_cache_is_named_and_set_aside(damage):
    experiment, path = in_cache()
    damage(path)
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match=re.escape(str(path))) as caught:
        assert results.find(experiment) is None
    assert len(caught) == 1
    assert f"{path.name}.set-aside" in str(caught[0].message)
    assert names(results.cache()) == [f"{path.name}.set-aside"]
    assert path.with_name(f"{path.name}.set-aside").read_bytes() == damaged
    assert results.find(experiment) is None


@half_open
@pytest.mark.parametrize("damage", [cut, of_another_experiment, FLIPS[1]], ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_computed_again(damage, monkeypatch):
    experiment, path = in_cache(run=a_run(5))
    damage(path)
    monkeypatch.setattr("stiffkit.experiment.compute", lambda experiments, **_: [a_run(6)])
    with pytest.warns(UserWarning, match="set aside"):
        found = experiment.run()
    assert found.attrs["source"] == "computed now"
    assert_same(found, a_run(6))
    assert_same(results.find(experiment), a_run(6))
    assert names(results.cache()) == [path.name, f"{path.name}.set-aside"]


def test_what_was_set_aside_is_never_overwritten():
    for k in range(4):
        experiment, path = in_cache()
        path.write_text(f"damage {k}", encoding="utf-8")
        with pytest.warns(UserWarning, match="set aside"):
            results.find(experiment)
    aside = [f"{path.name}.set-aside", *(f"{path.name}.set-aside-{k}" for k in (1, 2, 3))]
    assert names(results.cache()) == aside
    assert [(path.parent / name).read_text() for name in aside] == [f"damage {k}" for k in range(4)]


def test_the_warning_says_which_experiment_the_file_holds():
    experiment, path = in_cache()
    of_another_experiment(path)
    with pytest.warns(UserWarning, match=r"another experiment.*\"seed\": 77"):
        results.find(experiment)


@half_open
@pytest.mark.filterwarnings("ignore")
def test_any_byte_of_a_file():
    """Whatever byte is damaged, a file is refused or says the same."""
    path = results.write(results.cache() / "a.nc", measured(Small()))
    whole, data = results.load(path), path.read_bytes()
    refused = 0
    for position in range(5, len(data), len(data) // 25):
        path.write_bytes(data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
        try:
            found = results.load(path)
        except ResultsError:
            refused += 1
        else:
            xr.testing.assert_identical(found, whole)
    assert refused > 5


# ------------------------------------------------------------------------------------------------------------ recorded


def packed(*seeds, name="02_small"):
    """Runs of some seeds, in the cache and recorded."""
    experiments = [in_cache(seed)[0] for seed in seeds]
    return results.pack(name, ["digits-*"]), experiments


def emptied_cache():
    for path in results.cache().glob("*.nc"):
        path.unlink()


def test_recorded_comes_before_cached():
    _, (experiment,) = packed(1)
    results.save(experiment, a_run(2))
    assert results.find(experiment).attrs["source"] == "recorded, 02_small.nc"
    np.testing.assert_allclose(results.find(experiment).within, a_run(1).within, rtol=1e-6)


def test_recorded_runs_are_found_without_a_cache():
    _, experiments = packed(1, 2)
    emptied_cache()
    for seed, experiment in zip((1, 2), experiments, strict=True):
        np.testing.assert_allclose(experiment.run().within, a_run(seed).within, rtol=1e-6)
    assert results.find(an_experiment(3)) is None
    assert results.find(an_experiment(1, points=30)) is None


@half_open
@pytest.mark.parametrize("damage", [cut, text, foreign, FLIPS[1]], ids=lambda damage: damage.__name__)
def test_a_damaged_recorded_file_is_named_and_left_where_it_is(folder, damage):
    path, (experiment, _) = packed(1, 2)
    emptied_cache()
    damage(path)
    damaged = path.read_bytes()
    for _ in range(2):
        with pytest.warns(UserWarning, match=re.escape(str(path))):
            assert results.find(experiment) is None
    in_cache()
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        assert results.find(experiment).attrs["source"] == "cached"
    assert names(folder) == ["02_small.nc"]
    assert path.read_bytes() == damaged


def test_one_damaged_recorded_file_does_not_hide_the_others(folder):
    packed(1, name="02_b")
    text(packed(1, name="02_a")[0])
    with pytest.warns(UserWarning, match=r"02_a\.nc"):
        assert results.find(an_experiment()).attrs["source"] == "recorded, 02_b.nc"


def test_a_recorded_file_that_was_replaced_is_read_anew(folder):
    packed(1)
    results.find(an_experiment())
    results.save(an_experiment(), a_run(9))
    results.pack("02_small", ["digits-*"])
    np.testing.assert_allclose(results.find(an_experiment()).within, a_run(9).within, rtol=1e-6)


def test_chapters_own_measurements_are_no_runs(folder):
    record(Small(), measured)
    in_cache()
    assert results.find(an_experiment()).attrs["source"] == "cached"


def test_a_recorded_experiment_that_is_no_longer_allowed_does_not_hide_the_others():
    path, (first, second) = packed(1, 2)
    emptied_cache()
    content = results.load(path)
    content["experiment"].values[0] = content.experiment.values[0].replace('"points": 20', '"points": 33')
    results.write(path, content)
    assert results.find(first) is None
    assert results.find(second) is not None


@pytest.mark.parametrize("part", ["training_version", "measurement_version"])
def test_recorded_runs_of_other_versions_are_not_used(part, monkeypatch):
    path, (experiment, _) = packed(1, 2)
    emptied_cache()
    before = path.read_bytes()
    module = "training" if part == "training_version" else "measurement"
    monkeypatch.setattr(f"stiffkit.{module}.{part.upper()}", 99)
    assert results.find(experiment) is None
    assert path.read_bytes() == before


def test_what_a_reader_does_to_a_run_does_not_change_the_next_one():
    _, (experiment,) = packed(1)
    results.find(experiment).within.values[:] = 0
    assert results.find(experiment).within.any()


# ------------------------------------------------------------------------------------------------------------- packing


def rounded_at_stages(run):
    """What is recorded of a run: cells to 1/4096, and in other than exact arithmetic at the four stages alone."""
    run = run.copy(deep=True)
    four = set(stages(run.images.values))
    for k, images in enumerate(run.images.values.tolist()):
        for a, arithmetic in enumerate(run.arithmetic.values.tolist()):
            if arithmetic != "exact" and images not in four:
                run.stiffness.values[k, a] = np.nan
    run["stiffness"] = (run.stiffness.astype("float32") * 4096).round() / 4096
    return run


def test_packed_runs_are_found_again():
    packed(1, 2, 3)
    emptied_cache()
    for seed in (1, 2, 3):
        assert_same(results.find(an_experiment(seed)), rounded_at_stages(a_run(seed)))


def test_the_recorded_file():
    path, _ = packed(2, 1)
    content = results.load(path)
    assert content.sizes["run"] == 2
    assert [json.loads(e)["training"]["seed"] for e in content.experiment.values] == [1, 2]
    assert {json.loads(p)["seconds"] for p in content.provenance.values} == {1.5}
    assert {str(a.dtype) for a in content.data_vars.values() if a.dtype.kind == "f"} == {"float32"}
    kept = content.stiffness.notnull().all(["run", "class_a", "class_b"])
    assert kept.sel(arithmetic="exact").all()
    for arithmetic in ("float32", "keras2019"):
        assert content.images[kept.sel(arithmetic=arithmetic)].values.tolist() == stages(QUARTERS)
    assert content.within.notnull().all()


def test_many_classes_are_packed_small():
    shape = {"images": len(QUARTERS), "arithmetic": 2, "regime": 3, "class_a": 24, "class_b": 24}
    random = np.random.default_rng(0)
    run = xr.Dataset(
        {
            "stiffness": (list(shape), random.normal(size=list(shape.values()))),
            "input_similarity": (list(shape)[2:], random.normal(size=list(shape.values())[2:])),
        },
        {
            "images": QUARTERS,
            "arithmetic": ["exact", "keras2019"],
            "regime": ["train-train", "train-val", "val-val"],
        },
        a_run().attrs,
    )
    results.save(an_experiment(1), run)
    content = results.load(results.pack("02_small", ["digits-*"])).isel(run=0)
    kept = content.stiffness.notnull().all(["class_a", "class_b"])
    assert not kept.sel(arithmetic="keras2019").any()
    exact = kept.sel(arithmetic="exact")
    assert content.images[exact.sel(regime="val-val")].values.tolist() == stages(QUARTERS)
    for regime in ("train-train", "train-val"):
        assert content.images[exact.sel(regime=regime)].values.tolist() == [QUARTERS[0], QUARTERS[-1]]
    for name in ("stiffness", "input_similarity"):
        scaled = 1024 * content[name].where(content[name].notnull(), 0)
        np.testing.assert_array_equal(scaled, scaled.round())
        np.testing.assert_allclose(content[name].where(content[name].notnull(), run[name]), run[name], atol=1 / 2000)


def test_packing_twice_changes_nothing():
    path, _ = packed(1, 2)
    before = path.read_bytes()
    content = results.load(path)
    assert results.pack("02_small", ["digits-*"]) == path
    xr.testing.assert_identical(results.load(path), content)
    assert path.read_bytes() == before


def test_packing_keeps_what_the_file_has():
    path, _ = packed(1, 2)
    before = results.load(path)
    emptied_cache()
    in_cache(3)
    results.pack("02_small", ["digits-*"])
    after = results.load(path)
    xr.testing.assert_identical(after.isel(run=slice(2)), before)
    assert_same(results._run(checked_file.read(path), an_experiment(3).identity), rounded_at_stages(a_run(3)))


def test_packing_prefers_the_cache():
    packed(1, 2)
    results.save(an_experiment(2), a_run(9))
    results.pack("02_small", ["digits-*-s2-*"])
    emptied_cache()
    assert_same(results.find(an_experiment(1)), rounded_at_stages(a_run(1)))
    assert_same(results.find(an_experiment(2)), rounded_at_stages(a_run(9)))


def test_runs_with_different_checkpoints_are_packed_together():
    runs = {
        an_experiment(1): a_run(1),
        an_experiment(2): a_run(2).isel(images=slice(3)).assign_attrs(diverged=1),
        an_experiment(1, epochs=1): a_run(3, [0, 1201, 1617, 9000]),
    }
    for experiment, run in runs.items():
        results.save(experiment, run)
    path = results.pack("02_small", ["*"])
    assert results.load(path).sizes["run"] == 3
    emptied_cache()
    for experiment, run in runs.items():
        found = results.find(experiment)
        assert found.images.values.tolist() == run.images.values.tolist()
        assert_same(found, rounded_at_stages(run))


def test_runs_with_different_arithmetics_are_found_again():
    few = an_experiment(2, arithmetics=("exact",))
    results.save(few, a_run(2, arithmetics=["exact"]))
    packed(1)
    emptied_cache()
    assert results.find(few).arithmetic.values.tolist() == ["exact"]


def test_runs_with_different_windows_and_spaces_keep_their_own():
    runs = {}
    for seed, losses, layers in ((1, (0.3, 0.03), 1), (2, (0.5,), 2)):
        names, spaces = windows.places(losses, 1.5), ["input", *(f"layer {k + 1}" for k in range(layers))]
        random = np.random.default_rng(seed).integers(0, 9, (len(names), len(spaces), 2))
        own = xr.Dataset(
            {
                "observed": (("at", "space", "end"), random.astype(float)),
                "layer_within": ("layer", np.arange(layers + 1.0)),
            },
            {"at": names, "space": spaces, "end": ["near", "far"], "layer": range(1, layers + 2)},
        )
        runs[an_experiment(seed, epochs=1.5, stopping_losses=losses)] = a_run(seed).merge(own)
    for experiment, run in runs.items():
        results.save(experiment, run)
        results.pack("02_small", ["*"])  # each is added to what is there
        emptied_cache()
    for experiment, run in runs.items():
        found = results.find(experiment)
        for name in ("at", "space", "layer"):
            assert found[name].values.tolist() == run[name].values.tolist()
        np.testing.assert_array_equal(found.observed, run.observed)


def test_a_run_that_diverged_before_its_first_checkpoint_is_packed():
    in_cache(1)
    in_cache(2, a_run(2).isel(images=slice(0)).assign_attrs(diverged=1))
    results.pack("02_small", ["*"])
    emptied_cache()
    assert results.find(an_experiment(2)).sizes["images"] == 0


def test_patterns_choose():
    for seed, points in ((1, 20), (12, 20), (1, 30)):
        in_cache(seed, points=points)
    path = results.pack("a", ["digits-fc-3ep-s1-*.20pts-*"])
    assert [json.loads(e)["training"]["seed"] for e in results.load(path).experiment.values] == [1]
    assert results.load(results.pack("b", ["*-s1-*", "*-s12-*"])).sizes["run"] == 3


def test_runs_of_other_versions_are_not_packed():
    in_cache(1)
    in_cache(2, a_run().assign_attrs(training_version=0))
    assert results.load(results.pack("a", ["*"])).sizes["run"] == 1


def test_stale_runs_stay_recorded_until_they_are_computed_anew(monkeypatch):
    for seed in (1, 2):
        in_cache(seed)
    path = results.pack("02_small", ["*"])
    emptied_cache()
    monkeypatch.setattr("stiffkit.training.TRAINING_VERSION", 2)
    assert results.stale(path) == 2
    in_cache(1, a_run(1).assign_attrs(training_version=2))
    results.pack("02_small", ["*"])
    assert (results.stale(path), len(results.described(path))) == (1, 2)
    assert results.source(an_experiment(1)) == "recorded, 02_small.nc"
    assert results.source(an_experiment(2)) == ""


@half_open
@pytest.mark.parametrize("damaged", ["cached", "recorded"])
def test_damage_stops_packing(folder, damaged):
    path, (experiment,) = packed(1)
    text(path if damaged == "recorded" else results.cached(experiment))
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"02_small\.nc" if damaged == "recorded" else experiment.key):
        results.pack("02_small", ["digits-*"])
    assert path.read_bytes() == before


def test_nothing_to_pack_is_refused():
    in_cache()
    with pytest.raises(ResultsError, match=r"mnist-.*stiffkit results list"):
        results.pack("02_small", ["mnist-*"])


def test_packing_does_not_overwrite_a_chapters_own_measurements():
    path = record(Small(), measured)
    before = path.read_bytes()
    in_cache()
    with pytest.raises(ResultsError, match="07_small"):
        results.pack("07_small", ["*"])
    assert path.read_bytes() == before


def test_packing_leaves_the_cache_alone():
    _, path = in_cache()
    before = path.read_bytes()
    results.pack("a", ["*"])
    assert path.read_bytes() == before
    assert names(results.cache()) == [path.name]


# -------------------------------------------------------------------------------------------------------- side by side


def test_side_by_side():
    _, (first, second) = packed(3, 1)
    runs = results.side_by_side([results.find(e) for e in (first, second)])
    assert runs.seed.values.tolist() == [3, 1]
    assert runs.attrs["source"] == "recorded, 02_small.nc"
    for seed in (1, 3):
        expected = rounded_at_stages(a_run(seed)).drop_attrs()
        xr.testing.assert_allclose(runs.sel(seed=seed, drop=True).drop_attrs(), expected, rtol=1e-6)


def test_side_by_side_where_one_has_ended():
    for seed, images in ((1, QUARTERS), (2, QUARTERS[:3])):
        in_cache(seed, a_run(seed, images))
    runs = results.side_by_side([results.find(an_experiment(seed)) for seed in (1, 2)])
    assert runs.images.values.tolist() == QUARTERS
    assert runs.within.sel(seed=2).notnull().all("arithmetic").values.tolist() == ([True] * 3 + [False] * 5)
    assert runs.attrs["source"] == "cached"


@pytest.mark.parametrize("path", results.recorded(), ids=lambda path: path.stem)
def test_what_the_book_records_is_of_the_present_versions_of_the_code(path):
    advice = "compute them again and commit them (python book/record/NN_CHAPTER.py); until then their pages say so"
    assert not results.stale(path), f"{results.stale(path)} results in {path.name} are of other versions: {advice}"
