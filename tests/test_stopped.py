"""Runs that were stopped go on from their last checkpoint with the numbers that they would have had."""

import io
import json
import os

import pytest
import torch
import xarray as xr
from torch import nn

from stiffkit import checked_file, results, stopped
from stiffkit import experiment as experiments
from stiffkit.data import load
from stiffkit.experiment import Experiment, compute
from stiffkit.models import build_model
from stiffkit.training import train

FIELDS = {"dataset": "digits", "model": "fc", "epochs": 3, "seed": 1, "points": 20}
DUE = (0, 40, 96, 1_201, 1_300, 2_402, 3_000)  # within an epoch, at its end, and across


def small(**fields):
    return Experiment.of(**(FIELDS | {"checkpoints": DUE, "arithmetics": ("exact",)} | fields))


@pytest.fixture(autouse=True)
def folder(own_folders):
    return own_folders / "cache" / "results"


def stop(experiment, times):
    """Stop its run, as a signal would, when it has been kept so many times."""

    def save(key, run):
        really(key, run)
        kept.append(key)
        if len(kept) == times:
            raise KeyboardInterrupt

    really, kept = stopped.save, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopped, "save", save)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(progress=False)


def same_numbers(one, other):
    """Bit for bit."""
    xr.testing.assert_identical(one.drop_attrs(), other.drop_attrs())


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("at", [0, 64, 1_201, 1_313])
def test_a_training_goes_on_bit_for_bit(at, optimizer):
    digits = load("digits")

    def trained(checkpoints, resume=None):
        model = build_model("fc", digits, 1)
        options = {"unit": "images", "seed": 3, "optimizer": optimizer, "resume": resume}
        return list(train(model, digits.train, checkpoints=checkpoints, **options))

    whole = trained([0, 64, 1_201, 1_313, 2_600])
    first = trained([k for k in (0, 64, 1_201, 1_313) if k <= at])
    again = trained([0, 64, 1_201, 1_313, 2_600], first[-1].state)
    rest = [c for c in whole if c.images > first[-1].images]
    assert len(rest) == 5 - len(first)
    assert [(c.images, c.loss) for c in again] == [(c.images, c.loss) for c in rest]
    for one, other in zip(again[-1].model.parameters(), whole[-1].model.parameters(), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("times", [1, 2, 4, 7])
def test_a_run_goes_on_with_the_same_numbers(times, monkeypatch):
    whole = compute([small()], progress=False)[0]
    stopped.forget(small().training.key)
    stop(small(), times)
    images = []
    monkeypatch.setattr(
        experiments, "evaluate", lambda *args, really=experiments.evaluate: images.append(1) or really(*args)
    )
    same_numbers(compute([small()], progress=False)[0], whole)
    assert len(images) == 3 * (len(DUE) - times)  # three splits at each checkpoint that was left


def test_a_finished_run_leaves_nothing_but_its_results(folder):
    small().run(progress=False)
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".nc"]


@pytest.mark.slow
def test_one_training_serves_several_measurements(monkeypatch):
    calls = []
    monkeypatch.setattr(
        experiments, "train", lambda *a, really=experiments.train, **k: calls.append(1) or really(*a, **k)
    )
    several = [small(), small(points=30), small(arithmetics=("exact", "keras2019")), small(subset=5)]
    found = experiments.run_together(several, progress=False)
    assert len(calls) == 1
    for one, run in zip(several, found, strict=True):
        assert run.attrs["source"] == "computed now"
        same_numbers(compute([one], progress=False)[0].astype("float32"), run.astype("float32"))


def test_what_is_there_of_several_is_not_measured_again(monkeypatch):
    small().run(progress=False)
    computed = []
    really = experiments.compute
    monkeypatch.setattr(experiments, "compute", lambda es, **k: computed.extend(es) or really(es, **k))
    found = experiments.run_together([small(points=30), small()], progress=False)
    assert computed == [small(points=30)]
    assert [run.attrs["source"] for run in found] == ["computed now", "cached"]


def test_killed_between_two_results_of_one_training_nothing_is_trained_again(monkeypatch):
    both = [small(), small(points=30)]
    really = results.save

    def save(experiment, run):
        if experiment == both[1]:
            raise KeyboardInterrupt
        return really(experiment, run)

    monkeypatch.setattr(results, "save", save)
    with pytest.raises(KeyboardInterrupt):
        experiments.run_together(both, progress=False)
    monkeypatch.setattr(results, "save", really)
    monkeypatch.setattr(experiments, "measure", None)  # nothing is left to be measured
    found = experiments.run_together(both, progress=False)
    assert [run.attrs["source"] for run in found] == ["cached", "computed now"]


@pytest.mark.parametrize(
    "change",
    [
        ("stiffkit.experiment.TRAINING_VERSION", 99),
        ("stiffkit.experiment.MEASUREMENT_VERSION", 99),
        ("torch.__version__", "1.0"),
    ],
)
def test_with_other_code_a_run_begins_anew(change, monkeypatch):
    stop(small(), 3)
    key, identity = small().training.key, small().identity
    about = stopped.load(stopped.path(key)).made_with
    assert len(stopped.find(key, [identity], about).measured[identity]) == 3
    monkeypatch.setattr(*change)
    begun = stopped.find(
        key, [identity], experiments._made_with(small().training, load("digits"), nn.Identity(), "cpu")
    )
    assert (begun.training, begun.measured) == (None, {identity: []})


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:500] + bytes([c[500] ^ 1]) + c[501:], lambda c: b""])
def test_a_damaged_one_is_named_set_aside_and_begun_anew(damage):
    stop(small(), 3)
    path = stopped.path(small().training.key)
    path.write_bytes(damage(path.read_bytes()))
    kept = path.read_bytes()
    with pytest.warns(UserWarning, match=rf"{path.name}.*set aside"):
        found = small().run(progress=False)
    same_numbers(found.astype("float32"), compute([small()], progress=False)[0].astype("float32"))
    assert path.with_name(path.name + ".set-aside").read_bytes() == kept


def test_one_that_was_kept_in_an_earlier_form_is_begun_anew():
    stop(small(), 3)
    path = stopped.path(small().training.key)
    run = stopped.load(path)
    run.measured = {identity: [json.loads(row) for row in rows] for identity, rows in run.measured.items()}
    stopped.save(small().training.key, run)
    with pytest.warns(UserWarning, match=rf"{path.name} does not hold a run that was stopped.*set aside"):
        found = small().run(progress=False)
    assert found.images.values.tolist() == small().training.reached(1_201)


def test_how_far_it_is_can_be_asked_without_reading_it():
    key = small().training.key
    assert stopped.images_seen(key) == 0
    stop(small(), 3)
    assert stopped.images_seen(key) == stopped.load(stopped.path(key)).training["images"] == 96
    stopped.path(key).write_bytes(b"\xff" * 40)
    assert stopped.images_seen(key) == 0


def test_an_experiment_that_is_asked_for_twice_is_computed_once():
    both = experiments.run_together([small(), small()], progress=False)
    assert both[0].images.values.tolist() == small().training.reached(1_201)
    same_numbers(*both)


def test_the_device_is_the_one_named_or_the_environments(monkeypatch):
    monkeypatch.delenv("STIFFKIT_DEVICE", raising=False)
    assert experiments.chosen_device() == "cpu"
    monkeypatch.setenv("STIFFKIT_DEVICE", "cuda")
    assert (experiments.chosen_device(), experiments.chosen_device("cpu")) == ("cuda", "cpu")
    with pytest.raises(ValueError, match="'tpu': allowed are cpu and cuda"):
        experiments.chosen_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_cuda_is_refused():
    with pytest.raises(ValueError, match="finds no CUDA device"):
        small().run(device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_a_run_that_was_stopped_goes_on(monkeypatch):
    monkeypatch.setenv("STIFFKIT_DEVICE", "cuda")
    whole = compute([small()], device="cuda", progress=False)[0]
    stopped.forget(small().training.key)
    stop(small(), 3)
    found = small().run(progress=False)
    xr.testing.assert_allclose(found.within, whole.within.astype("float32"), atol=0.05)
    assert found.attrs["device"] == torch.cuda.get_device_name()
    stopped.forget(small().training.key)
    here = compute([small()], progress=False)[0]
    xr.testing.assert_allclose(here.within.isel(images=0), whole.within.isel(images=0), atol=1e-4)


def test_nothing_in_it_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path, content = stopped.path("evil"), io.BytesIO()
    torch.save({"made_with": Evil()}, content)
    checked_file.write(path, b"0\n" + content.getvalue())
    with pytest.raises(checked_file.ResultsError, match=r"evil.*does not hold a run that was stopped"):
        stopped.load(path)
    assert not (tmp_path / "executed").exists()
