"""Chapter 7: its parameters, and what it shows, of made-up runs and of a live one of the tiny model."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stiffkit import claims, fine_tuning
from stiffkit.chapters import BertMnli, ParameterError, TooLongError
from stiffkit.spaces import POOLED
from stiffkit.sweeps import Sweep

ROOT = Path(__file__).parent.parent
PLANNED = {"mnli_minilm": {}, "mnli_random": {"initialisation": "random"}, "mnli_bert": {"model": "bert-base-uncased"}}
QUICK = {"dataset": "toy_nli", "model": "tiny", "epochs": 1, "points": 12, "seeds": 2}

# Parameters and runs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dataset": "mnist"}, "allowed are toy_nli, mnli, those of pairs of sentences"),
        ({"model": "fc"}, "'model' = 'fc' reads images, and mnli has sentences"),
        ({"model": "tiny", "initialisation": "pretrained"}, "tiny has random weights alone"),
        ({"initialisation": "keras"}, "initialisation"),
        ({"arithmetic": "float16"}, "allowed are exact, "),
        ({"points": 100}, "multiples of 3"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"optimizer": "sgd"}, "unknown parameter 'optimizer'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ParameterError) as caught:
        BertMnli.check(values)
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "values"), PLANNED.items())
def test_the_parameters_are_the_ledgers_runs_and_every_planned_run_is_in_a_sweep(name, values):
    planned = claims.read().runs[name]
    assert set(BertMnli.check(values).experiments) == set(planned.experiments())
    swept = {"mnli_minilm": "minilm", "mnli_random": "random", "mnli_bert": "bert_base"}[name]
    assert set(Sweep.read(ROOT / f"book/sweeps/07_{swept}.yml").experiments) == set(planned.experiments())


def test_what_is_left_open_is_the_models_own():
    def of(**values):
        training = BertMnli.check(values).experiments[0].training
        return training.initialisation, training.learning_rate, training.epochs

    assert of() == ("pretrained", 1e-4, 6)
    assert of(model="bert-base-uncased") == ("pretrained", 2e-5, 6)
    assert of(model="tiny", dataset="toy_nli") == ("random", 1e-3, 20)
    assert of(learning_rate=3e-5, epochs=2, initialisation="random") == ("random", 3e-5, 2)


def test_planned_runs_are_not_computed(no_runs):
    with pytest.raises(ParameterError, match=r"no run of minilm on mnli.*stiffkit sweep"):
        fine_tuning.results(BertMnli())


def test_a_model_that_is_not_here_is_said_before_anything_is_computed(no_runs, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("stiffkit.experiment.compute", None)
    p = BertMnli(**QUICK | {"model": str(no_runs / "nothing")})
    with pytest.raises(ParameterError, match=r"is not here and could not be fetched.*Offline take minilm"):
        fine_tuning.results(p)


def test_a_re_run_that_takes_long_asks_first(no_runs):
    pytest.importorskip("transformers")
    with pytest.raises(TooLongError, match="Nothing was computed"):
        fine_tuning.results(BertMnli(**QUICK | {"epochs": 500, "seeds": 50}))


# What is shown


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        p = BertMnli(**QUICK)
        p.prepare(progress=False)
        yield p, fine_tuning.results(p)


def test_the_description_says_which_model_and_how_many_pairs(shown):
    p, runs = shown
    text = fine_tuning.description(p, runs)
    assert (
        "`toy_nli`, model `tiny` from random weights, 1,800 training pairs, 1 epochs of AdamW at 0.001, 2 seeds" in text
    )
    assert "12 + 12 measured pairs" in text
    assert runs.attrs["seen"] == "pairs"


def test_the_table_has_a_row_a_checkpoint(shown):
    _, runs = shown
    table = fine_tuning.through_training(runs)
    assert table.index.tolist() == [f"{e:.3g}" for e in runs.epochs.mean("seed").values]
    expected = claims.over_seeds(100 * runs.accuracy.isel(images=0).sel(split="test"), 1)
    assert table["accuracy, test"].iloc[0] == expected
    assert table["within classes"].iloc[0].startswith("1.00")


def test_sections_are_named_from_the_input_to_the_whole(shown):
    _, runs = shown
    found = fine_tuning.by_section(runs, "sign")
    assert found.section.values.tolist() == ["embeddings", "layer 1", "layer 2", "pooler", "head", "whole"]
    own = runs.sel(measure="sign", regime="val-val")
    np.testing.assert_allclose(found.within.sel(section="head"), own.layer_within.sel(layer=5).mean("seed"))
    np.testing.assert_allclose(found.between.sel(section="whole"), own.between.sel(arithmetic="exact").mean("seed"))
    assert found.epochs.values[[0, -1]].tolist() == [0, 1]


def test_curves_are_those_of_the_last_checkpoint(shown):
    _, runs = shown
    found = fine_tuning.curves(runs, "cos")
    assert found.space.values.tolist() == ["embedding", "[CLS]"]
    here = runs["curve"].isel(images=-1).sel(measure="cos", arithmetic="exact", pairs="same class").mean("seed")
    own = found.stiffness.sel(pairs="same class")
    np.testing.assert_allclose(own, here.where(own.notnull()))
    assert own.sel(space="[CLS]").notnull().any()


def lines(zeros):
    """Runs of which the pairs of one class have lines that fall to zero there, by seed; seen between 0.1 and 1."""
    zero = xr.DataArray(list(zeros), {"seed": range(1, len(zeros) + 1)}, "seed")
    line = xr.concat([1 + 0 * zero, -1 / zero], "coefficient").assign_coords(coefficient=["intercept", "slope"])
    axes = {"images": [0], "space": ["[CLS]"], "arithmetic": ["exact"], "measure": ["cos"]}
    ends = xr.DataArray([0.1, 1.0], {"end": ["near", "far"]}, "end")
    return xr.Dataset(
        {
            "line": line.expand_dims(axes | {"of": [POOLED]}),
            "observed": (0 * zero + ends).expand_dims(images=[0], space=["[CLS]"]),
            "epochs": 0.0 * zero.expand_dims(images=[0]),
        }
    )


@pytest.mark.parametrize(
    ("zeros", "said"),
    [
        ([0.5, 0.5, 0.5], "0.50 [0.50, 0.50]"),
        ([2.0, 3.0], "above 1.00"),
        ([0.05, 0.06], "below 0.10"),
        ([0.5, 2.0, 0.5], "not in 1 of 3 seeds"),
    ],
)
def test_critical_lengths_say_where_they_are_bounds(zeros, said):
    assert fine_tuning.critical_lengths(lines(zeros)).loc["0", "[CLS]"] == said


def test_the_vision_chapters_curves_stand_beside(shown):
    _, runs = shown
    found = fine_tuning.beside_vision(claims.read(), runs)
    assert list(found) == ["MNIST", "CIFAR-10", "sentences"]
