"""Experiments: stable keys, schedules, what a run holds, and that it is computed once and kept whole."""

import json
import math
import platform
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from oracles import plain_cross_entropy

from stiffkit import results
from stiffkit.data import balanced_subset, load, random_labels
from stiffkit.experiment import Experiment, Measurement, Training, compute, run_all, stages
from stiffkit.measurement import MEASUREMENT_VERSION, measure, measured_points
from stiffkit.models import build_model
from stiffkit.training import TRAINING_VERSION, train

SMALL = {"dataset": "digits", "model": "fc", "epochs": 1, "points": 20, "checkpoints": (0, 32, 96)}


def small(seed=1, **fields):
    return Experiment.of(**(SMALL | fields), seed=seed)


def computed(experiment, *, progress=False):
    (run,) = compute([experiment], progress=progress)
    return run


@pytest.fixture(autouse=True)
def folder(own_folders):
    return own_folders / "cache" / "results"


def files(folder):
    """The files in the cache, without the empty ones that locks leave."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


# ---------------------------------------------------------------------------------------------------------------- keys


def test_keys_stay_what_they_are():
    """A key that changes hides all recorded runs."""
    paper = Experiment.of(dataset="mnist", model="fc", epochs=30, seed=1)
    assert paper.key == "mnist-fc-30ep-s1-72156e1a.500pts-44136fa3"
    assert paper.identity == '{"training": {"dataset": "mnist", "epochs": 30.0, "model": "fc", "seed": 1}}'
    other = small(7, initialisation="torch", sphere=False, optimizer="sgd", learning_rate=0.1, batch_size=8, every=2)
    assert other.key == "digits-fc-1ep-s7-5084ac57.20pts-f5272eee"


def test_a_field_at_its_default_changes_nothing():
    required = {"dataset": "mnist", "model": "fc", "epochs": 30, "seed": 1}
    bare = Experiment.of(**required)
    for part in (Training, Measurement):
        for name, field in part.model_fields.items():
            if name not in required:
                explicit = Experiment.of(**required, **{name: field.default})
                assert (explicit.key, explicit.identity) == (bare.key, bare.identity)
    assert Experiment(training=bare.training) == bare


OTHERS = {
    "dataset": "digits",
    "model": "cnn",
    "epochs": 29,
    "seed": 2,
    "initialisation": "torch",
    "sphere": False,
    "optimizer": "sgd",
    "learning_rate": 2e-3,
    "batch_size": 64,
    "clip": 1.0,
    "checkpoints": (0, 64),
    "loss": "mse",
    "activation": "tanh",
    "dtype": "float64",
    "train_size": 1000,
    "label_noise": 0.5,
    "schedule": "sparse",
    "points": 100,
    "arithmetics": ("exact",),
    "every": 2,
    "subset": 5,
    "attribution": True,
    "batch_norm": True,
    "distances": True,
    "stopping_losses": (0.3, 0.1),
    "folder": "0123456789abcdef",
}


def test_every_field_changes_the_key():
    assert set(OTHERS) == {*Training.model_fields, *Measurement.model_fields}
    bare = {"dataset": "mnist", "model": "fc", "epochs": 30, "seed": 1, "points": 200}
    residual = {"batch_norm": bare | {"model": "resnet20"}}  # the one network that has it
    pairs = {name: [residual.get(name, bare), residual.get(name, bare) | {name: v}] for name, v in OTHERS.items()}
    experiments = {name: [Experiment.of(**fields) for fields in pair] for name, pair in pairs.items()}
    assert len({changed.key for _, changed in experiments.values()}) == len(experiments)
    for name, (before, after) in experiments.items():
        changed = [after.training.key != before.training.key]
        changed.append(after.measurement.key != before.measurement.key)
        assert changed == [name in Training.model_fields, name in Measurement.model_fields]


def test_the_order_and_the_spelling_of_fields_do_not_matter():
    experiment = small(3, learning_rate=1e-2)
    turned = Experiment.of(**dict(reversed([*SMALL.items(), ("learning_rate", 1e-2), ("seed", 3)])))
    assert turned.key == experiment.key
    spelled = small(3, learning_rate="1e-2", epochs=1.0, checkpoints=[0, 32, 96])
    assert (spelled.key, spelled) == (experiment.key, experiment)


def test_the_identity_is_the_experiment():
    experiment = small(5, every=3, arithmetics=("exact", "keras2019"))
    assert Experiment.model_validate_json(experiment.identity) == experiment
    assert json.loads(experiment.training.identity) == json.loads(experiment.identity)["training"]


def test_keys_are_names_of_files():
    for experiment in (small(), small(epochs=0.1234567), small(epochs=10_000, seed=1_000_000)):
        assert set(experiment.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")
        assert len(experiment.key) < 80


# ------------------------------------------------------------------------------------------------------------ schedule


def test_the_standard_schedule():
    images = Training(dataset="mnist", model="fc", epochs=30, seed=1).images(60_000)
    expected = {0, 1_600, 756_000, 1_800_000}
    expected |= {15_000 * k for k in range(1, 21)} | {60_000 * k for k in range(6, 31)}
    assert images == sorted(expected)


@pytest.mark.parametrize("epochs", [0.001, 0.02, 0.5, 1, 1.3, 4.9, 5, 6, 6.5, 12])
@pytest.mark.parametrize("n", [1_201, 50_000, 60_000])
def test_schedules_ascend_from_the_start_to_the_end(epochs, n):
    images = Training(dataset="mnist", model="fc", epochs=epochs, seed=1).images(n)
    end = math.ceil(epochs * n)
    assert (images[0], images[-1]) == (0, end)
    assert images == sorted(set(images))
    assert round(0.42 * end) in images
    assert (1_600 in images) == (end >= 1_600)
    assert [k for k in range(1, int(epochs) + 1) if k * n not in images] == []


def test_the_sparse_schedule():
    training = Training(dataset="mnist", model="fc", epochs=30, seed=1, schedule="sparse")
    epochs = [0.25, 1, 1.5, 2, 2.5, 3, 6, 9, 12, 12.6, 15, 18, *range(21, 31)]
    assert training.images(60_000) == [0, 1600, *(int(e * 60_000) for e in epochs)]
    standard = training.model_copy(update={"schedule": "standard"})
    assert set(training.images(60_000)) <= set(standard.images(60_000)), "runs of both can be put side by side"


def test_the_few_and_the_ends():
    training = Training(dataset="cifar100", model="cnn_v1", epochs=20, seed=1, schedule="few")
    shares = [100_000, 150_000, 250_000, 420_000, 600_000, 800_000, 1_000_000]
    assert training.images(50_000) == [0, 1_600, 12_500, 25_000, 50_000, *shares]
    assert training.model_copy(update={"schedule": "ends"}).images(50_000) == [0, 1_000_000]


def test_the_doubling_schedule():
    fields = {"dataset": "mnli", "model": "minilm", "initialisation": "pretrained", "seed": 1, "schedule": "doubling"}
    found = Training(**fields, epochs=6).images(9_888)
    assert found == [0, 1_600, 2_472, 4_944, 9_888, 19_776, 39_552, 59_328], "eight"
    assert Training(**fields, epochs=0.1).images(9_888) == [0, 989]
    assert Training(**fields, epochs=2).images(1_800) == [0, 450, 900, 1_600, 1_800, 3_600]


def test_the_geometric_schedule():
    images = Training(dataset="mnist", model="fc", epochs=30, seed=1, schedule="geometric").images(60_000)
    assert (images[0], images[-1]) == (0, 1_800_000)
    assert 1_500 <= images[1] < 1_500 * 26 / 25
    np.testing.assert_allclose(np.divide(images[2:], images[1:-1]), 26 / 25, rtol=1e-3)
    few = Training(dataset="digits", model="fc", epochs=0.02, seed=1, schedule="geometric").images(1_201)
    assert (few[0], few[-1]) == (0, 25)


def test_own_checkpoints_replace_the_schedule():
    assert small().training.images(1_201) == [0, 32, 96]


def test_stages():
    assert stages([0, 1_000, 1_600, 40_000, 42_000, 100_000]) == [0, 1_600, 42_000, 100_000]
    assert stages([0, 320, 1_617, 9_900, 10_100, 24_020]) == [0, 1_617, 10_100, 24_020]
    assert stages([0, 500]) == [0, 500]
    assert stages([7]) == [7]
    assert stages(np.array([0, 1_600, 4_000])) == [0, 1_600, 4_000]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"dataset": "mnits"}, ["'dataset'", "'mnits'", "digits, mnist, fashion_mnist, cifar10"]),
        ({"model": "vgg"}, ["'model'", "'vgg'", "fc, cnn, cnn_v1"]),
        ({"initialisation": "he"}, ["'initialisation'", "keras, torch"]),
        ({"optimizer": "lion"}, ["'optimizer'", "'lion'", "adam", "sgd"]),
        ({"arithmetics": ("exact", "float16")}, ["'arithmetics'", "exact", "float32, keras2019"]),
        ({"arithmetics": ("float32",)}, ["'arithmetics'", "exact"]),
        ({"arithmetics": ("exact", "float32", "float32")}, ["'arithmetics'"]),
        ({"arithmetics": ()}, ["'arithmetics'"]),
        ({"epochs": 0}, ["'epochs'", "greater than 0"]),
        ({"epochs": math.inf}, ["'epochs'", "finite"]),
        ({"epochs": math.nan}, ["'epochs'", "finite"]),
        ({"epochs": 20_000}, ["'epochs'", "10000"]),
        ({"seed": -1}, ["'seed'", "0"]),
        ({"seed": 1.5}, ["'seed'", "integer"]),
        ({"learning_rate": 0}, ["'learning_rate'", "greater than 0"]),
        ({"learning_rate": "fast"}, ["'learning_rate'", "'fast'", "number"]),
        ({"batch_size": 0}, ["'batch_size'", "greater than 0"]),
        ({"points": 0}, ["'points'", "greater than 0"]),
        ({"every": -1}, ["'every'", "0"]),
        ({"checkpoints": 32}, ["'checkpoints'"]),
        ({"stopping_losses": (0.1, 0.3)}, ["'stopping_losses'", "above zero", "below the one before"]),
        ({"stopping_losses": (0.1, 0.0)}, ["'stopping_losses'", "above zero"]),
        ({"model": "cnn_v1"}, ["cnn_v1", "16 x 16", "fc or cnn"]),
        ({"learning_rat": 1}, ["'learning_rat'", "learning_rate", "points"]),
        ({"training": {}}, ["'training'", "learning_rate"]),
    ],
)
def test_errors_name_the_field_and_what_is_allowed(fields, messages):
    with pytest.raises(ValueError, match=r".") as error:
        Experiment.of(**(SMALL | {"seed": 1} | fields))
    for message in messages:
        assert message in str(error.value)


def test_missing_fields_and_several_errors_at_once():
    with pytest.raises(ValueError, match=r"'epochs' is missing\n'seed' is missing"):
        Experiment.of(dataset="mnist", model="fc")
    with pytest.raises(ValueError, match=r"(?s)'dataset'.*'points'"):
        Experiment.of(dataset="x", model="fc", epochs=1, seed=1, points=-1)


@pytest.mark.parametrize(("name", "value"), [("checkpoints", (0, "a")), ("arithmetics", ("exact", 3))])
def test_errors_within_a_list_name_the_field(name, value):
    with pytest.raises(ValueError, match=name):
        Experiment.of(**(SMALL | {"seed": 1, name: value}))


@pytest.mark.parametrize("checkpoints", [(64, 32), (32, 32), (-32, 32)])
def test_checkpoints_have_to_ascend(checkpoints):
    with pytest.raises(ValueError, match="checkpoints"):
        small(checkpoints=checkpoints)


@pytest.mark.parametrize("points", [33, 500])
def test_points_that_the_data_set_cannot_give(points):
    with pytest.raises(ValueError, match="points"):
        small(points=points)


def test_experiments_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        small().training.epochs = 2
    assert len({small(), small(), small(2)}) == 2


# ---------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("name", "less", "more"),
    [
        ("epochs", 5, 30),
        ("points", 100, 2_000),
        ("model", "fc", "cnn"),
        ("model", "cnn", "cnn_v1"),
        ("dataset", "digits", "mnist"),
        ("every", 4, 1),
        ("arithmetics", ("exact",), ("exact", "keras2019")),
    ],
)
def test_minutes_are_positive_and_increasing(name, less, more):
    base = {"dataset": "mnist", "model": "cnn", "epochs": 30, "seed": 1, "points": 200}
    short, long = (Experiment.of(**(base | {name: value})).minutes for value in (less, more))
    assert 0 < short < long < 10_000


def test_minutes_of_the_papers_run():
    assert 1 < Experiment.of(dataset="mnist", model="fc", epochs=30, seed=1).minutes < 30


def test_minutes_of_a_run_with_few_checkpoints():
    base = {"dataset": "mnist", "model": "cnn_v1", "epochs": 30, "seed": 1}
    short, long = (Experiment.of(**base, checkpoints=(0, k)) for k in (32, 1_800_000))
    assert short.minutes < long.minutes / 10


# ------------------------------------------------------------------------------------------------------------- compute


@pytest.fixture(scope="module")
def run():
    """One small run, computed."""
    return computed(small())


def same_numbers(one, other):
    """Bit for bit."""
    xr.testing.assert_identical(one.drop_attrs(), other.drop_attrs())


@pytest.mark.usefixtures("one_thread")
def test_what_a_run_holds(run):
    """Each checkpoint as `train` and `measure` give it, and loss and accuracy of whole parts."""
    digits = load("digits")
    points = measured_points(digits, 20, seed=1)
    model = build_model("fc", digits, 1)
    checkpoints = train(model, digits.train, checkpoints=[0, 32, 96], unit="images", seed=1)
    for k, checkpoint in enumerate(checkpoints):
        here = run.isel(images=k)
        assert int(here.images) == checkpoint.images == [0, 32, 96][k]
        assert float(here.epochs) == checkpoint.epochs
        np.testing.assert_equal(float(here.batch_loss), checkpoint.loss)
        expected = measure(model, *points, ("exact", "float32", "keras2019"), errors=True)
        same_numbers(here[list(expected.data_vars)].drop_vars(["images", "split"], errors="ignore"), expected)
        for part in ("train", "validation", "test"):
            x, y = getattr(digits, part)
            z = model(x).detach().double()
            loss, accuracy = float(plain_cross_entropy(z, y).mean()), float((z.argmax(1) == y).double().mean())
            assert float(here.loss.sel(split=part)) == pytest.approx(loss, rel=1e-6)
            assert float(here.accuracy.sel(split=part)) == pytest.approx(accuracy)
    assert run.loss.sel(split="train").values[-1] < run.loss.sel(split="train").values[0]


def test_labels_and_attributes_of_a_run(run):
    assert run.images.values.tolist() == [0, 32, 96]
    assert run.arithmetic.values.tolist() == ["exact", "float32", "keras2019"]
    assert run.split.values.tolist() == ["train", "validation", "test"]
    assert json.loads(run.attrs["classes"]) == [str(k) for k in range(10)]
    expected = {
        "data_checksum": load("digits").checksum,
        "diverged": 0,
        "training_version": TRAINING_VERSION,
        "measurement_version": MEASUREMENT_VERSION,
        "device": f"CPU, {platform.machine()}",
        "threads": 1,
    }
    assert {name: run.attrs[name] for name in expected} == expected
    assert 0 <= run.attrs["seconds_measuring"] <= run.attrs["seconds"]
    assert not [name for name, a in run.data_vars.items() if a.isnull().any() and name != "batch_loss"]


def test_computed_again_it_is_the_same_bit_for_bit_whatever_the_threads(run):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(5)
    try:
        same_numbers(computed(small(), progress=True), run)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 2},
        {"initialisation": "torch"},
        {"sphere": False},
        {"optimizer": "sgd"},
        {"learning_rate": 1e-2},
        {"batch_size": 16},
        {"loss": "mse"},
        {"loss": "label_smoothing"},
        {"activation": "tanh"},
        {"train_size": 100},
        {"label_noise": 0.5},
    ],
)
def test_every_field_of_the_training_has_an_effect(run, fields):
    found = computed(small(**({"checkpoints": (96,), "arithmetics": ("exact",)} | fields)))
    assert abs(found.loss.values[0] - run.loss.values[2]).max() > 1e-5


def test_training_in_float64_agrees_with_float32_at_first():
    found = computed(small(dtype="float64", loss="exact", checkpoints=(0, 32), arithmetics=("exact",)))
    usual = computed(small(loss="exact", checkpoints=(0, 32), arithmetics=("exact",)))
    np.testing.assert_allclose(found.loss, usual.loss, rtol=1e-5)
    assert float(abs(found.loss - usual.loss).max()) > 0


def test_a_small_training_set_is_balanced_and_the_seeds_own(monkeypatch):
    from stiffkit import experiment

    seen = []
    monkeypatch.setattr(experiment, "train", lambda model, points, **_: seen.append(points) or iter(()))
    for seed in (1, 2):
        computed(small(seed, train_size=50))
    (x, y), (x2, _) = seen
    assert y.bincount().tolist() == [5] * 10
    assert not torch.equal(x, x2)


def test_random_labels_for_training_and_validation_and_true_ones_for_the_test(monkeypatch):
    from stiffkit import experiment

    digits, seen = load("digits"), []
    labels = [random_labels(y, 0.5, 1) for y in (digits.train[1], digits.validation[1])]
    monkeypatch.setattr(experiment, "train", lambda model, points, **_: seen.append(points) or iter(()))
    computed(small(label_noise=0.5))
    (x, y) = seen[0]
    assert torch.equal(x, digits.train[0])
    assert torch.equal(y, labels[0])
    monkeypatch.undo()
    found = computed(small(label_noise=0.5, checkpoints=(0,), arithmetics=("exact",))).isel(images=0)
    model, parts = build_model("fc", digits, 1), (digits.train, digits.validation, digits.test)
    for split, (x, clean), y in zip(("train", "validation", "test"), parts, [*labels, digits.test[1]], strict=True):
        right = float((model(x).argmax(1) == y).double().mean())
        assert float(found.accuracy.sel(split=split)) == pytest.approx(right)
        assert torch.equal(y, clean) == (split == "test")
    index = balanced_subset(labels[0], 20, 1)
    index2 = balanced_subset(labels[1], 20, 1)
    points = [(x[i], y[i]) for (x, _), y, i in zip(parts, labels, (index, index2), strict=False)]
    truth = torch.cat([digits.train[1][index], digits.validation[1][index2]])
    expected = measure(model, *points, errors=True, truth=truth)
    for name in ("within", "true_within", "true_stiffness", "crossed"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_network_measured_with_its_own_loss():
    found = computed(small(loss="mse", checkpoints=(32,), arithmetics=("exact", "own")))
    assert found.arithmetic.values.tolist() == ["exact", "own"]
    assert not found.within.isnull().any()
    same = computed(small(loss="exact", checkpoints=(32,), arithmetics=("exact", "own")))
    np.testing.assert_array_equal(same.within.sel(arithmetic="own"), same.within.sel(arithmetic="exact"))


def test_attribution_adds_to_what_is_measured_and_changes_nothing(run):
    found = computed(small(attribution=True, checkpoints=(0, 32)))
    names = [name for name in run.data_vars if name not in ("batch_loss", "within_error", "between_error")]
    xr.testing.assert_allclose(found[names].drop_attrs(), run[names].isel(images=slice(2)).drop_attrs(), atol=1e-6)
    assert {"layer_within", "pair_within", "unclipped", "decile_within"} <= set(found.data_vars) - set(run.data_vars)
    assert "within_error" not in found
    assert found.layer.values.tolist() == [1, 2, 3, 4]


def test_a_subset_of_its_own_changes_the_points_and_not_the_training(run):
    found = computed(small(subset=2, checkpoints=(0, 32), arithmetics=("exact",)))
    same_numbers(found[["loss", "accuracy", "epochs"]], run[["loss", "accuracy", "epochs"]].isel(images=slice(2)))
    digits = load("digits")
    points = measured_points(digits, 20, seed=2)
    expected = measure(build_model("fc", digits, 1), *points, errors=False).within
    np.testing.assert_array_equal(found.within.isel(images=0), expected)
    assert not np.array_equal(found.within, run.within.sel(arithmetic=["exact"]).isel(images=slice(2)))


def test_fewer_arithmetics_leave_the_rest_as_it_is(run):
    found = computed(small(arithmetics=("exact", "keras2019"), checkpoints=(0, 32)))
    assert found.arithmetic.values.tolist() == ["exact", "keras2019"]
    same = [name for name, array in found.data_vars.items() if "arithmetic" in array.dims]
    same_numbers(found[same], run[same].sel(arithmetic=["exact", "keras2019"]).isel(images=slice(2)))


@pytest.fixture(scope="module")
def long_run():
    """Sixteen checkpoints, the second arithmetic at every third, the stages and the last ten; 1,600 among them."""
    checkpoints = (0, 32, 64, 96, 128, 1_600, *(1_600 + 32 * k for k in range(1, 11)))
    return computed(small(checkpoints=checkpoints, arithmetics=("exact", "keras2019"), every=4))


@pytest.mark.slow
def test_every(long_run):
    images = long_run.images.values
    measured = long_run.within.notnull().all(["regime", "measure"])
    assert measured.sel(arithmetic="exact").all()
    kept = [k for k in range(len(images)) if k % 4 == 0 or k == 5 or k >= len(images) - 10]
    assert np.flatnonzero(measured.sel(arithmetic="keras2019")).tolist() == kept
    assert set(long_run.stiffness.sel(arithmetic="keras2019").dropna("images").images.values) == set(images[kept])


@pytest.mark.slow
def test_errors_are_kept_at_the_four_stages(long_run):
    there = long_run.within_error.notnull().all(["part", "measure"]).values
    assert long_run.images.values[there].tolist() == stages(long_run.images.values)


# ---------------------------------------------------------------------------------------------------- runs that diverge

DIVERGING = {"optimizer": "sgd", "learning_rate": 1e30}


def test_a_diverged_run_ends_and_says_so():
    experiment = small(**DIVERGING, checkpoints=(0, 96, 192))
    found = experiment.run(progress=False)
    assert found.attrs["diverged"] == 1
    assert found.images.values.tolist() == [0]
    assert found.within.notnull().all()
    again = experiment.run()
    assert again.attrs["source"] == "cached"
    same_numbers(again, found)


def test_a_run_that_diverges_in_the_step_before_a_checkpoint():
    found = computed(small(**DIVERGING, checkpoints=(0, 32, 96)))
    assert found.attrs["diverged"] == 1


def test_a_run_that_diverges_before_its_first_checkpoint():
    found = computed(small(**DIVERGING, checkpoints=(96, 192)))
    assert found.attrs["diverged"] == 1


def test_no_checkpoint_is_there_twice():
    due = Training(dataset="digits", model="fc", epochs=3, seed=1).images(1_201)
    found = computed(small(epochs=3, checkpoints=tuple(k for k in due if 1_400 < k < 1_600)))
    assert found.indexes["images"].is_unique


@pytest.mark.slow
def test_a_stage_that_shares_its_batch_is_measured_as_a_stage():
    """Of 1,502 and 1,513 images, both after the batch that brings 1,521, the second is 42 % of the run."""
    found = computed(small(checkpoints=(0, 1_502, 1_513, 3_603), arithmetics=("exact",)))
    there = found.within_error.notnull().all(["part", "measure"]).values
    assert found.images.values[there].tolist() == stages(found.images.values)


# ------------------------------------------------------------------------------------------------------------------ run


class Counting:
    """In place of `compute`: counts, and gives a made-up run at once."""

    def __init__(self, run):
        self.run, self.seeds = run, []

    def __call__(self, experiments, **_):
        self.seeds += [e.training.seed for e in experiments]
        return [self.run.assign(epochs=self.run.epochs + e.training.seed) for e in experiments]


@pytest.fixture
def counting(run, monkeypatch):
    counter = Counting(run[["stiffness", "within", "batch_loss", "epochs"]])
    monkeypatch.setattr("stiffkit.experiment.compute", counter)
    return counter


def test_a_second_run_is_found(counting, run, folder):
    first, second = small().run(), small().run()
    assert counting.seeds == [1]
    assert (first.attrs["source"], second.attrs["source"]) == ("computed now", "cached")
    same_numbers(first, second)
    xr.testing.assert_allclose(second.within, run.within, rtol=1e-6)
    assert files(folder) == [f"{small().key}.nc"]


def test_other_experiments_are_not_taken_for_it(counting):
    for experiment in (small(), small(2), small(points=30), small(every=2)):
        experiment.run()
    assert counting.seeds == [1, 2, 1, 1]


def test_recorded_runs_are_not_computed(counting, folder):
    small().run()
    results.pack("02_small", ["*"])
    (folder / f"{small().key}.nc").unlink()
    assert small().run().attrs["source"] == "recorded, 02_small.nc"
    assert counting.seeds == [1]


def test_other_versions_are_computed_again(counting, monkeypatch):
    small().run()
    monkeypatch.setattr("stiffkit.training.TRAINING_VERSION", 99)
    counting.run = counting.run.assign_attrs(training_version=99)
    small().run()
    assert small().run().attrs["source"] == "cached"
    assert counting.seeds == [1, 1]


def test_runs_side_by_side(counting):
    runs = run_all(small(seed) for seed in (3, 1))
    assert runs.seed.values.tolist() == [3, 1]
    assert runs.attrs["source"] == "computed now"
    assert runs.epochs.isel(images=0).values.tolist() == [3, 1]
    assert run_all([small(1), small(2)]).attrs["source"] == "cached; computed now"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_and_finished_runs_stay(counting, folder, monkeypatch, error):
    def interrupted(experiments, **_):
        if experiments[0].training.seed == 2:
            raise error("stop")
        return counting(experiments)

    monkeypatch.setattr("stiffkit.experiment.compute", interrupted)
    with pytest.raises(error):
        run_all(small(seed) for seed in (1, 2, 3))
    assert files(folder) == [f"{small(1).key}.nc"]
    monkeypatch.setattr("stiffkit.experiment.compute", counting)
    runs = run_all(small(seed) for seed in (1, 2, 3))
    assert counting.seeds == [1, 2, 3]
    assert runs.seed.values.tolist() == [1, 2, 3]


def test_an_interrupt_within_training_gives_threads_back_and_leaves_nothing(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("stiffkit.experiment.evaluate", interrupted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            small(checkpoints=(0,)).run(progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert files(folder) == []


def test_an_interrupt_while_writing_leaves_nothing(counting, folder, monkeypatch):
    def half_written(path, _):
        write_bytes(path, b"half of a file")
        raise KeyboardInterrupt

    write_bytes = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half_written)
        with pytest.raises(KeyboardInterrupt):
            small().run()
    assert files(folder) == []
    assert small().run().attrs["source"] == "computed now"


def test_threads_that_ask_for_the_same_run_compute_it_once(counting):
    inside, release = threading.Event(), threading.Event()

    def slow(experiments, **_):
        inside.set()
        assert release.wait(20)
        return counting(experiments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stiffkit.experiment.compute", slow)
        found = {}
        threads = [threading.Thread(target=lambda k=k: found.update({k: small().run()})) for k in range(3)]
        threads[0].start()
        assert inside.wait(20)
        for thread in threads[1:]:
            thread.start()
        other = threading.Thread(target=lambda: found.update(other=counting([small(2)])))
        other.start()
        other.join(20)
        assert set(found) == {"other"}
        release.set()
        for thread in threads:
            thread.join(20)
    assert counting.seeds == [2, 1]
    for k in (1, 2):
        same_numbers(found[k], found[0])


def test_who_waited_is_told_that_it_was_cached(counting, monkeypatch):
    def reserved_by_another(key):
        results.save(small(), counting.run)
        return reserved(key)

    reserved = results.reserved
    monkeypatch.setattr("stiffkit.results.reserved", reserved_by_another)
    assert small().run().attrs["source"] == "cached"
    assert counting.seeds == []


@pytest.mark.slow
def test_processes_that_ask_for_the_same_run_compute_it_once(tmp_path):
    code = textwrap.dedent(
        """
        import pathlib, sys, time
        import xarray as xr
        import stiffkit.experiment as e

        def compute(experiments, **options):
            (pathlib.Path(sys.argv[1]) / f"computed by {sys.argv[2]}").touch()
            time.sleep(2)
            versions = {"training_version": e.TRAINING_VERSION, "measurement_version": e.MEASUREMENT_VERSION}
            return [xr.Dataset({"within": ("images", [float(sys.argv[2])])}, attrs=versions)] * len(experiments)

        e.compute = compute
        print("ready", flush=True)
        sys.stdin.readline()
        print(float(e.Experiment.of(dataset="digits", model="fc", epochs=1, seed=1, points=20).run().within[0]))
        """
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(k)], **pipes) for k in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0] == said[1] != ""
    assert len(list(tmp_path.glob("computed by *"))) == 1
