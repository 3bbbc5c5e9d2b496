"""Chapter 2: its parameters, the runs that they mean, stages and stopping, and the real command on digits."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

from stiffkit import claims, evolution, results
from stiffkit.chapters import ClassMatrices, ParameterError, TooLongError
from stiffkit.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"epochs": 0.5, "points": 20, "seeds": 2}


def refused(**values):
    with pytest.raises(ParameterError) as caught:
        ClassMatrices.check(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "resnet"}, "allowed are fc, cnn, cnn_v1"),
        ({"arithmetic": "float64"}, "allowed are exact, float32, keras2019"),
        ({"dataset": "minst"}, "allowed are digits, mnist"),
        ({"dataset": "digits", "model": "cnn_v1"}, "16 x 16 pixels"),
        ({"dataset": "digits", "points": 500}, "20 to 280"),
        ({"epochs": -1}, "greater than or equal to 0"),
        ({"seeds": 1.5}, "integer"),
        ({"seed": 3}, "did you mean 'seeds'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values, words):
    assert words in refused(**values)


@pytest.mark.parametrize("path", sorted(ROOT.glob("book/parameters/paper/02_*.yml")), ids=lambda path: path.stem)
def test_parameters_at_paper_scale_are_runs_of_the_ledger(path):
    chosen = ClassMatrices.check(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert chosen.experiments == claims.read().runs[path.stem.removeprefix("02_")].experiments()


def test_the_defaults_are_the_ledgers_runs():
    ledger = claims.read()
    for name in ("mnist", "fashion_mnist", "cifar10"):
        assert ClassMatrices(dataset=name).experiments == ledger.runs[name].experiments()


def test_what_is_left_open_is_the_data_sets_own_and_what_is_given_counts():
    digits = ClassMatrices(dataset="digits").experiments
    assert [e.training.seed for e in digits] == [1, 2]
    assert {(e.training.model, e.measurement.points) for e in digits} == {("fc", 200)}
    given = ClassMatrices(dataset="cifar10", model="cnn", epochs=2.5, points=40, seeds=1, learning_rate=1e-4)
    expected = {"dataset": "cifar10", "model": "cnn", "epochs": 2.5, "points": 40, "learning_rate": 1e-4, "seed": 1}
    assert given.experiments == [Experiment.of(**expected)]


def test_what_is_recorded_costs_nothing_and_what_is_not_is_estimated():
    assert ClassMatrices().minutes == 0
    assert ClassMatrices(arithmetic="keras2019").minutes == 0
    assert 0 < ClassMatrices(seeds=9).minutes < ClassMatrices(seeds=10).minutes
    with pytest.raises(TooLongError, match="Nothing was computed"):
        evolution.results(ClassMatrices(dataset="mnist", learning_rate=1e-4))


def made_runs():
    """Two runs of fourteen epochs: validation loss least at epoch 4, between-class stiffness greatest at epoch 6."""
    images = np.arange(15) * 1000
    epochs = images / 1000
    dims, shape = ("seed", "images", "arithmetic", "regime", "measure"), (2, 15, 1, 3, 2)
    coords = {
        "seed": [1, 2],
        "images": images,
        "arithmetic": ["exact"],
        "regime": ["train-train", "train-val", "val-val"],
        "measure": ["sign", "cos"],
    }
    hill = np.broadcast_to((-abs(epochs - 6))[None, :, None, None, None], shape)
    loss = np.broadcast_to((1 + abs(epochs - 4) / 10)[None, :, None], (2, 15, 1))
    return xr.Dataset(
        {
            "between": (dims, hill),
            "within": (dims, hill),
            "gradient_norm": (("seed", "images"), np.broadcast_to(abs(epochs - 3), (2, 15))),
            "disparity": (("seed", "images"), np.broadcast_to(abs(epochs - 4), (2, 15))),
            "loss": (("seed", "images", "split"), loss),
            "accuracy": (("seed", "images", "split"), -loss),
            "epochs": (("seed", "images"), np.broadcast_to(epochs, (2, 15))),
        },
        coords | {"split": ["validation"]},
    )


def test_stopping_says_when_each_signal_turns_and_what_that_costs():
    table = evolution.stopping(made_runs())
    assert table["stops at epoch"]["between classes, sign"] == "6.0 [6.0, 6.0]"
    assert table["stops at epoch"]["norm of the mean gradient"] == "3.0 [3.0, 3.0]"
    cost = table["validation loss above its least (%)"]
    assert cost["gradient disparity"] == "0 [0, 0]"
    assert cost["between classes, sign"] == "7 [7, 7]"  # of running means: 1.20 over 1.12
    assert cost["norm of the mean gradient"] == "2 [2, 2]"


def test_how_well_runs_fit_is_the_last_training_accuracy():
    accuracy = xr.DataArray([[[0.1], [0.9]], [[0.2], [0.8]]], dims=("seed", "images", "split"))
    runs = xr.Dataset({"accuracy": accuracy}, {"split": ["train"]})
    assert evolution.fits({"A": runs, "B": runs.isel(seed=[0])}) == "A 85.0 [21.5, 148.5] %, B 90.0 %"


def test_stages_are_means_over_seeds_of_the_four_checkpoints():
    random = np.random.default_rng(0)
    images = [0, 1600, 30_000, 42_000, 100_000]
    runs = xr.Dataset(
        {
            "stiffness": (
                ("seed", "images", "arithmetic", "regime", "measure", "class_a", "class_b"),
                random.uniform(-1, 1, (2, 5, 2, 1, 2, 3, 3)),
            )
        },
        {"images": images, "arithmetic": ["exact", "float32"], "regime": ["val-val"], "measure": ["sign", "cos"]},
    )
    found = evolution.at_stages(runs, "val-val", "float32")
    assert list(found.stage.values) == ["before\ntraining", "1,600\nimages", "42,000\nimages", "100,000\nimages"]
    np.testing.assert_allclose(found[2], runs.stiffness[:, 3, 1, 0].mean("seed"))


# What is recorded


OWN = sorted(name for name, runs in claims.read().runs.items() if runs.chapter == ClassMatrices.number)


@pytest.mark.parametrize("name", OWN)
def test_recorded_runs_are_whole_official_and_say_where_they_come_from(name):
    recorded = [run for run in map(results.find, claims.read().runs[name].experiments()) if run is not None]
    checksums = {run.attrs["data_checksum"] for run in recorded}
    assert len(checksums) <= 1
    for run in recorded:
        assert re.fullmatch(r"[0-9a-f]{7,40}", run.attrs["commit"]), "recorded from a clean checkout"
        assert run.attrs["diverged"] == 0
        exact = run.sel(arithmetic="exact")
        assert not [n for n in ("stiffness", "within", "between", "loss", "accuracy") if exact[n].isnull().any()]
        assert float(abs(run.stiffness).max()) <= 1
        np.testing.assert_allclose(
            exact.within, diagonal(exact.stiffness), atol=2e-4, err_msg="summaries are those of the matrices"
        )


def diagonal(stiffness):
    return stiffness.where(stiffness.class_a == stiffness.class_b).mean(["class_a", "class_b"])


def test_recorded_results_of_both_chapters_keep_to_their_budget():
    size = sum(path.stat().st_size for path in ROOT.glob("book/results/0[12]_*.nc"))
    assert size < 3 * 2**20


# The real command


@pytest.mark.slow
def test_the_command_runs_the_chapter_and_draws_everything(tmp_path):
    out, small = tmp_path / "out.html", [f"{name} {value}" for name, value in SMALL.items()]
    line = [sys.executable, "-m", "stiffkit", "chapter", "class_matrices", "--profile", "quick", "-o", str(out)]
    line += [word for pair in small for word in ("-p", *pair.split())]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(about [\d.]+ minutes to compute\n)?", done.stderr), "no warning of a kernel or a library"
    assert out.read_text(encoding="utf-8").count('src="data:image/png;base64,') == 6
