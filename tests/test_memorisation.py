"""Chapter 3: its parameters, the runs that they mean, what its figures and tables take from them, the real command."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from stiffkit import claims, memorisation, results
from stiffkit.chapters import ParameterError, RandomLabels, TooLongError
from stiffkit.measurement import measure, measured_points
from stiffkit.sweeps import Sweep

ROOT = Path(__file__).resolve().parent.parent
OWN = {name: runs for name, runs in claims.read().runs.items() if runs.chapter == 3}
PAPER = sorted(ROOT.glob("book/parameters/paper/03_*.yml"))
QUICK = {"dataset": "digits", "epochs": 2, "points": 20, "seeds": 2}


# Parameters and runs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"label_noise": 1.5}, "less than or equal to 1"),
        ({"label_noise": -0.1}, "greater than or equal to 0"),
        ({"label_noise": "half"}, "valid number"),
        ({"noise": 0.5}, "unknown parameter 'noise'"),
        ({"dataset": "cifar"}, "allowed are digits, mnist"),
        ({"dataset": "digits", "model": "cnn_v1"}, "16 x 16 pixels"),
        ({"dataset": "digits", "points": 500}, "20 to 280"),
        ({"arithmetic": "float16"}, "allowed are exact, float32, keras2019"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ParameterError) as caught:
        RandomLabels.check(values)
    assert words in str(caught.value)


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_the_defaults_are_the_ledgers_runs(dataset):
    series = RandomLabels(dataset=dataset).experiments
    assert series["random labels"] == OWN[f"{dataset}_random"].experiments()
    assert series["true labels"] == OWN[f"{dataset}_true"].experiments()
    assert series["random labels, 5,000 images"] == OWN[f"{dataset}_random_few"].experiments()


def test_shares_between_are_the_ledgers_runs():
    p = RandomLabels()
    for share in p.shares:
        assert set(OWN[f"mnist_noise_{100 * share:.0f}"].experiments()) <= set(p.with_noise(share))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_parameters_at_paper_scale(path):
    chosen = RandomLabels.check(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert chosen.dataset == path.stem.removeprefix("03_")
    assert chosen.minutes <= chosen.max_minutes


def test_every_planned_run_is_in_a_committed_sweep():
    swept = {e for path in ROOT.glob("book/sweeps/03_*.yml") for e in Sweep.read(path).experiments}
    assert {e for runs in OWN.values() for e in runs.experiments()} == swept


def test_planned_runs_are_not_computed_and_a_change_asks_first():
    for values in ({}, {"max_minutes": 1}, {"arithmetic": "float32"}, {"dataset": "fashion_mnist"}):
        assert RandomLabels.check(values).to_run == ()
    with pytest.raises(TooLongError, match="Nothing was computed"):
        memorisation.taught(RandomLabels(learning_rate=1e-4))


def test_planned_runs_that_are_nowhere_are_named(no_runs):
    with pytest.raises(ParameterError, match=r"no run of mnist with random labels.*stiffkit sweep"):
        memorisation.taught(RandomLabels())


# What is shown


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A chapter of two networks for each series, two epochs of digits each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        p = RandomLabels(**QUICK)
        p.prepare(progress=False)
        sets = memorisation.taught(p)
        yield p, sets, memorisation.by_share(p, sets)


def test_true_labels_are_the_given_ones_where_none_is_permuted(shown):
    true = shown[1]["true labels"]
    assert true.true_stiffness.equals(true.stiffness)
    same = true.crossed.sel(given="same", true="same")
    np.testing.assert_allclose(same, true.within.sel(arithmetic="exact"))
    assert true.crossed.sel(given="same", true="other").isnull().all()


def test_pairs_of_one_class_are_what_the_class_matrices_hold(shown):
    """With as many points in each class the mean over its pairs is the mean over its cell."""
    random = shown[1]["random labels"]
    panels = memorisation.agreement(random, "cos")
    assert list(panels) == ["training images", "validation images"]
    assert list(panels["training images"]) == list(memorisation.PAIRS)
    assert list(memorisation.agreement(shown[1]["true labels"], "cos")["training images"]) == [
        "same given, same true",
        "other given, other true",
    ]


def test_matrices_by_given_and_by_true_class(shown):
    random = shown[1]["random labels"]
    C = memorisation.matrices(random, "val-val", "exact", "sign")
    assert C.dims[:2] == ("labels", "stage")
    last = C.isel(stage=-1)
    expected = random.isel(images=-1).sel(regime="val-val", arithmetic="exact", measure="sign").mean("seed")
    np.testing.assert_allclose(last.sel(labels="given classes"), expected.stiffness)
    np.testing.assert_allclose(last.sel(labels="true classes"), expected.true_stiffness)
    assert not last.sel(labels="given classes").equals(last.sel(labels="true classes"))


def test_curves_of_the_onset_and_of_coherence(shown):
    _, sets, _ = shown
    panels = memorisation.onset_by_layer(sets["random labels"], "train-train")
    assert [list(curves) for curves in panels.values()] == [
        ["train images", "validation images"],
        *[[f"layer {n}" for n in (1, 2, 3, 4)]] * 2,
    ]
    assert (panels["within classes"]["layer 4"] > 0.99).all(), "the last layer's sign within a given class is one"
    coherence = memorisation.coherences(sets)["training images"]
    assert coherence["true labels"].isel(images=0).mean() > coherence["random labels"].isel(images=0).mean()


def test_the_table_of_shares(shown):
    _p, sets, table = shown
    assert table.index.tolist() == ["0 %", "50 %", "100 %"]
    assert set(table["seeds"]) == {"2"}
    known = [float(cell.split()[0]) for cell in table["true labels of others known (%)"]]
    assert known[0] > known[-1]
    accuracy = 100 * sets["random labels"].accuracy.sel(split="train").isel(images=-1)
    assert table["given labels known (%)"]["100 %"] == claims.over_seeds(accuracy, 0)


def test_what_is_said_about_the_runs(shown):
    p, sets, _ = shown
    said = memorisation.description(p, sets)
    assert "`digits`, network `fc`, 100 % of the labels permuted, 20 + 20 images" in said
    assert "random labels, 2 epochs, 2 seeds (cached)" in said
    assert re.search(r"random labels, \d+ .* % of the labels given to training images", memorisation.learnt(sets))


def test_no_noise_is_two_series_of_true_labels(shown, monkeypatch):
    p = RandomLabels(**QUICK, label_noise=0)
    series = p.experiments
    assert series["random labels"] == series["true labels"]
    sets = dict.fromkeys(series, shown[1]["true labels"])
    assert memorisation.by_share(p, sets).index[0] == "0 %"


def test_true_classes_that_a_part_lacks_are_left_out():
    """Points are balanced by given class alone: a true class may have none or one, and then counts for nothing."""
    import torch

    from stiffkit import data
    from stiffkit.models import build_model

    digits = data.load("digits")
    model = build_model("fc", digits, 1)
    training, validation = measured_points(digits, 20, 1)
    truth = torch.cat([torch.arange(20) % 9, torch.arange(20) % 10])
    truth[0] = 9  # one training point of class 9, two validation points
    found = measure(model, training, validation, errors=False, truth=truth)
    first = found.true_stiffness.sel(arithmetic="exact", regime="train-train", measure="sign")
    assert first.sel(class_a=9, class_b=9).isnull(), "no pair"
    assert int(first.isnull().sum()) == 1
    diagonal = first.where(first.class_a == first.class_b).mean()
    summary = found.true_within.sel(arithmetic="exact", regime="train-train", measure="sign")
    assert float(summary) == pytest.approx(float(diagonal))


# What is recorded


@pytest.mark.parametrize("name", sorted(OWN))
def test_recorded_runs_are_whole_official_and_say_where_they_come_from(name):
    recorded = [run for run in map(results.find_recorded, OWN[name].experiments()) if run is not None]
    assert len({run.attrs["data_checksum"] for run in recorded}) <= 1
    for run in recorded:
        assert re.fullmatch(r"[0-9a-f]{7,40}", run.attrs["commit"]), "recorded from a clean checkout"
        assert run.attrs["diverged"] == 0
        exact = run.sel(arithmetic="exact")
        assert not exact[["within", "between", "loss", "accuracy", "coherence", "stiffness"]].isnull().to_array().any()
        assert not run.layer_within.isnull().any()
        if "label_noise" in OWN[name].experiment:
            assert not exact[["true_within", "crossed"]].isnull().to_array().any()
            at_stages = exact.true_stiffness.dropna("images", how="all")
            assert at_stages.sizes["images"] == 4


def test_recorded_results_keep_to_their_budget():
    recorded = ROOT.glob("book/results/0[34]_*.nc")
    assert sum(path.stat().st_size for path in recorded) < 6 * 2**20


# The real command


@pytest.mark.slow
def test_the_command_runs_the_chapter_with_half_of_the_labels(tmp_path):
    out = tmp_path / "out.html"
    line = [sys.executable, "-m", "stiffkit", "chapter", "3", "--profile", "quick", "-o", str(out)]
    for pair in ("label_noise 0.5", "points 20", "epochs 1"):
        line += ["-p", *pair.split()]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_text(encoding="utf-8").count('src="data:image/png;base64,') == 6


def test_a_share_may_come_as_papermill_gives_it():
    assert RandomLabels.check({"label_noise": "0.5"}).label_noise == 0.5
    assert isinstance(RandomLabels.check({"label_noise": 0}).experiments["random labels"], list)
