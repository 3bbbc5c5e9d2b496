"""Chapter 8: its parameters, the runs that they mean, what its tables say, and the real command on digits."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from stiffkit import claims, results, separation
from stiffkit.attribution import PAIRS
from stiffkit.chapters import NetworkOrArithmetic, ParameterError, TooLongError
from stiffkit.experiment import LOSSES
from stiffkit.sweeps import Sweep

ROOT = Path(__file__).resolve().parent.parent
OWN = {name: runs for name, runs in claims.read().runs.items() if runs.chapter == 8}
PAPER = sorted(ROOT.glob("book/parameters/paper/08_*.yml"))


def refused(**values):
    with pytest.raises(ParameterError) as caught:
        NetworkOrArithmetic.check(values)
    return str(caught.value)


# Parameters and runs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"activation": "gelu"}, "allowed are relu, tanh, linear"),
        ({"training_loss": "hinge"}, "allowed are exact, float32, keras2019, mse, label_smoothing"),
        ({"arithmetic": "exact"}, "allowed are float32, keras2019"),
        ({"arithmetic": ""}, "allowed are float32, keras2019"),
        ({"dataset": "digits", "model": "cnn_v1"}, "16 x 16 pixels"),
        ({"dataset": "digits", "points": 500}, "20 to 280"),
        ({"loss": "mse"}, "unknown parameter 'loss'"),
        ({"epochs": -1}, "greater than or equal to 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values, words):
    assert words in refused(**values)


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_the_defaults_are_the_ledgers_runs(dataset):
    series = NetworkOrArithmetic(dataset=dataset).experiments
    assert list(series) == list(LOSSES)
    for loss, experiments in series.items():
        name = f"{dataset}_parts" if loss == "float32" else f"{dataset}_{loss}"
        if name in OWN:
            assert experiments == OWN[name].experiments()
        else:
            assert (dataset, loss) in {("cifar10", "exact"), ("cifar10", "keras2019")}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_parameters_at_paper_scale(path):
    chosen = NetworkOrArithmetic.check(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert chosen.dataset == path.stem.removeprefix("08_")
    assert chosen.minutes <= chosen.max_minutes


def test_every_planned_run_is_in_a_committed_sweep():
    files = [Sweep.read(path) for path in ROOT.glob("book/sweeps/08_*.yml")]
    swept = {e for sweep in files for e in sweep.experiments}
    assert {e for runs in OWN.values() for e in runs.experiments()} == swept


def test_planned_runs_are_not_computed_and_a_change_asks_first():
    for values in ({}, {"max_minutes": 1}, {"arithmetic": "float32"}, {"epochs": 30}, {"dataset": "fashion_mnist"}):
        assert NetworkOrArithmetic.check(values).to_run == ()
        assert NetworkOrArithmetic.check(values).minutes == 0
    more = NetworkOrArithmetic(seeds=9)
    assert {(e.training.loss, e.training.seed) for e in more.to_run} == {(loss, 9) for loss in LOSSES}
    with pytest.raises(TooLongError, match="Nothing was computed"):
        separation.trained(NetworkOrArithmetic(learning_rate=1e-4))


def test_planned_runs_that_are_nowhere_are_named(no_runs):
    with pytest.raises(ParameterError, match=r"no run of mnist.*stiffkit sweep"):
        separation.trained(NetworkOrArithmetic())


def test_digits_bring_their_own_controls():
    p = NetworkOrArithmetic(dataset="digits", activation="tanh", seeds=2)
    wanted = [*p.experiments.values(), *p.controls.values()]
    assert set(p.to_run) == {e for series in wanted for e in series}
    assert len(p.to_run) == 2 * (5 + 2)  # tanh with the fused loss is among both
    assert {e.training.activation for series in p.experiments.values() for e in series} == {"tanh"}
    assert NetworkOrArithmetic(dataset="digits", training_loss="mse").experiments.keys() == {"float32", "mse"}


# What is shown


def test_one_point_in_three_arithmetics():
    """In closed form: the fused loss keeps q and drops e_y, at an angle of arccos(|q| / sqrt(1 + |q|^2))."""
    table = separation.one_point()
    assert table.index.tolist() == list(separation.GAPS)
    assert set(table["exact"]) == {"0\N{DEGREE SIGN}"}
    q = torch.linspace(0, -2, 9, dtype=torch.float64).softmax(0)
    angle = float(torch.rad2deg(torch.arccos(q.norm() / (1 + q.norm() ** 2).sqrt())))
    for gap in separation.GAPS:
        assert table["fused float32"][gap] == f"{angle if gap > 16.7 else 0:.0f}\N{DEGREE SIGN}"
        assert table["clipped"][gap] == ("no gradient" if gap > 16.2 else "0\N{DEGREE SIGN}")
        assert float(table["gradient's size"][gap]) == pytest.approx(
            np.exp(-gap) * (1 + float(q.norm()) ** 2) ** 0.5, rel=0.4
        )


AXES = {
    "seed": [1, 2],
    "images": np.arange(13) * 1000,
    "arithmetic": ["exact", "float32", "keras2019"],
    "regime": ["train-train", "train-val", "val-val"],
    "measure": ["sign", "cos"],
    "part": ["train", "val"],
}


def table(dims, function):
    """An array of a function of the coordinates along dims."""
    grid = np.meshgrid(*[range(len(AXES[d])) for d in dims], indexing="ij")
    values = np.vectorize(lambda *index: function(*[AXES[d][k] for d, k in zip(dims, index, strict=True)]))(*grid)
    return xr.DataArray(values.astype(float), {d: AXES[d] for d in dims}, dims)


def made_runs():
    """Twelve epochs; of each class a share of images / 24,000 is clipped, in the validation half none."""
    share = {"exact": 0.0, "float32": 0.0, "keras2019": 1.0}
    clipped = table(("seed", "images", "arithmetic", "part"), lambda s, k, a, p: share[a] * (p == "train") * k / 24_000)
    factor = {"exact": 1.0, "float32": 0.9, "keras2019": 0.5}
    full = ("seed", "images", "arithmetic", "regime", "measure")
    within = table(full, lambda s, k, a, r, m: factor[a] * (0.9 if m == "sign" else 0.4))
    return xr.Dataset(
        {
            "within": within,
            "between": -within / 10,
            "alive_within": within / 2,
            "padded_within": within.sel(measure="cos", drop=True) / 4,
            "zero": clipped,
            "unclipped": (1 - clipped).expand_dims(class_a=[0, 1]),
            "past_gap": table(("seed", "images", "part"), lambda s, k, p: k / 20_000),
            "epochs": table(("seed", "images"), lambda s, k: k / 1000),
            "accuracy": table(("seed", "images"), lambda s, k: k / 12_000).expand_dims(split=["train"]),
            "decile_gap": table(("seed", "images"), lambda s, k: s).expand_dims(decile=[1, 2]),
            "decile_within": table(("seed", "images", "arithmetic"), lambda s, k, a: factor[a]).expand_dims(
                decile=[1, 2]
            ),
        }
    )


@pytest.mark.parametrize("leave_out", [[], ["unclipped"]])
def test_dose_is_less_exact_with_the_share_past_the_gap(leave_out):
    found = separation.dose(made_runs().drop_vars(leave_out))
    assert found.arithmetic.values.tolist() == ["float32", "keras2019"]
    np.testing.assert_allclose(found.past.sel(seed=1), 100 * found.images / 20_000)
    np.testing.assert_allclose(found.within.sel(arithmetic="float32"), 0.9 * -0.1)
    np.testing.assert_allclose(found.between.sel(arithmetic="keras2019"), 0.09 * 0.5)
    np.testing.assert_allclose(
        found.predicted.sel(seed=2), 0.9 * ((1 - found.images / (20_000 if leave_out else 24_000)) ** 2 - 1)
    )


def test_late_values_and_tables():
    runs = made_runs()
    late = separation.late({"a": runs})["a"]
    np.testing.assert_allclose(late.within.sel(arithmetic="float32"), 0.81)
    row = separation.last_values({"a": runs}).loc["a"]
    assert row["within, clipped"] == "0.45 [0.45, 0.45]"
    assert row["between, exact"] == "\N{MINUS SIGN}0.09 [\N{MINUS SIGN}0.09, \N{MINUS SIGN}0.09]"
    assert (row["training accuracy (%)"], row["seeds"]) == ("100.0 [100.0, 100.0]", "2")
    zero = separation.zero_gradients(runs).loc["fused float32"]
    assert [value.split()[0] for value in zero] == ["0.81", "0.41", "0.36", "0.18", "0.09"]
    deciles = separation.deciles(runs, "keras2019")
    assert deciles["clipped"].tolist() == ["0.50 [0.50, 0.50]"] * 2
    assert deciles["logit gap"][2].startswith("1.5 ")


def test_when_it_turns_is_in_epochs():
    runs = made_runs().drop_vars(["accuracy", "split"])
    loss = abs(runs.epochs - 4).expand_dims(split=["validation"])
    runs = runs.assign(loss=loss, accuracy=-loss, within=xr.ones_like(runs.within))
    falling = runs.assign(within=runs.within.where(runs.epochs < 7.5, 0.5))
    found = separation.turning({"falls": falling, "stays": runs})
    assert found["least validation loss at epoch"].tolist() == ["4.0 [4.0, 4.0]"] * 2
    assert found["sign below 0.9 at epoch"].tolist() == ["7.0 [7.0, 7.0]", "never"]  # of means over five epochs
    assert found["sign there"].tolist() == ["1.00 [1.00, 1.00]"] * 2
    assert found["sign late"].tolist() == ["0.58 [0.58, 0.58]", "1.00 [1.00, 1.00]"]  # epoch 7 and five halves


def test_shares_of_layers_and_the_start():
    runs = made_runs()
    share = xr.DataArray([0.3, 0.1, np.nan], {"layer": [1, 2, 3]}, "layer")
    runs = runs.assign(share_within=share * xr.ones_like(runs.within.isel(arithmetic=0, measure=0, drop=True)))
    row = separation.layer_shares({"a": runs}).loc["a"]
    assert [value.split()[0] for value in row] == ["0.40", "0.30", "0.10"]
    start = separation.at_the_start({"a": runs}).loc["a"]
    assert [value.split()[0].replace("\N{MINUS SIGN}", "-") for value in start] == ["0.90", "-0.09", "0.40", "-0.04"]


def test_a_measurement_that_was_not_made_has_no_row_and_no_mark():
    runs = made_runs()
    less = runs.where(runs.arithmetic != "float32")
    assert separation.late({"a": less})["a"].arithmetic.values.tolist() == ["exact", "keras2019"]
    assert "fused float32" not in separation.zero_gradients(less).index


# What is recorded


@pytest.mark.parametrize("name", sorted(OWN))
def test_recorded_runs_are_whole_official_and_say_where_they_come_from(name):
    recorded = [run for run in map(results.find_recorded, OWN[name].experiments()) if run is not None]
    assert len({run.attrs["data_checksum"] for run in recorded}) <= 1
    for run in recorded:
        assert re.fullmatch(r"[0-9a-f]{7,40}", run.attrs["commit"]), "recorded from a clean checkout"
        assert run.attrs["diverged"] == 0
        assert "stiffness" not in run
        measured = OWN[name].experiments()[0].measurement.arithmetics
        assert run.arithmetic.values.tolist() == list(measured)
        assert not run[["within", "between", "loss", "accuracy", "unclipped", "alive_within"]].isnull().to_array().any()
        layers = run.layer_within.dropna("layer", how="all")
        assert layers.sizes["layer"] == {"fc": 4, "cnn_v1": 5}[OWN[name].experiment["model"]]
        assert not layers.isnull().any()
        cosine = run.within.sel(arithmetic="exact", measure="cos")
        np.testing.assert_allclose(run.share_within.sum("layer"), cosine, atol=2e-3, err_msg="shares add up")
        assert run.rightness.values.tolist() == list(PAIRS)


def test_recorded_results_keep_to_their_budget():
    assert (ROOT / "book/results/08_network_or_arithmetic.nc").stat().st_size < 2 * 2**20


# The real command


@pytest.mark.slow
def test_the_command_runs_the_chapter_with_one_loss_and_another_activation(tmp_path):
    out = tmp_path / "out.html"
    line = [sys.executable, "-m", "stiffkit", "chapter", "8", "--profile", "quick", "-o", str(out)]
    for pair in ("training_loss mse", "activation tanh", "points 20", "epochs 1"):
        line += ["-p", *pair.split()]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_text(encoding="utf-8").count('src="data:image/png;base64,') == 6
