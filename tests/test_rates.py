"""Chapters 5 and 6: their parameters, and what they show, of made-up runs with known slopes and of two live rates."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from stiffkit import claims, domains, rates, results
from stiffkit.chapters import ADAM, DESCENT, CriticalLength, LearningRate, ParameterError, TooLongError
from stiffkit.distances import Length
from stiffkit.endpoints import PROTOCOLS
from stiffkit.lengths import lengths
from stiffkit.spaces import POOLED
from stiffkit.statistics import t_interval
from stiffkit.sweeps import Sweep
from stiffkit.windows import places

ROOT = Path(__file__).parent.parent
OWN = {name: runs for name, runs in claims.read().runs.items() if runs.chapter == 5}
QUICK = {"dataset": "digits", "epochs": 2.5, "points": 60, "seeds": 2, "learning_rates": [1e-3, 3e-3]}
QUICK |= {"stopping_losses": [1.5, 0.8]}
SLOPES = {1: 0.10, 2: 0.12, 3: 0.14}  # a decade, by seed

# Parameters and runs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rates": [1e-3]}, "two rates or more above zero, each above the one before it"),
        ({"learning_rates": [1e-3, 1e-4]}, "two rates or more above zero, each above the one before it"),
        ({"learning_rates": [0, 1e-4]}, "two rates or more above zero, each above the one before it"),
        ({"stopping_losses": [0.1, 0.3]}, "losses above zero, each below the one before it"),
        ({"stopping_losses": [0.3, -0.1]}, "losses above zero, each below the one before it"),
        ({"optimizer": "rmsprop"}, "adam"),
        ({"dataset": "cifar100"}, "cifar100"),
        ({"arithmetic": "float16"}, "allowed are exact, "),
        ({"points": 5}, "points"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values, words):
    for chapter in (LearningRate, CriticalLength):
        with pytest.raises(ParameterError) as caught:
            chapter.check(values)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"distance": "l3"}, "allowed are cosine, l2, l1"),
        ({"definition": "xi"}, "allowed are line, each class, first zero"),
        ({"layer": "layer 7"}, "allowed are input, layer 1, layer 2, layer 3, output"),
        ({"layer": "layer 1", "distance": "l2"}, "between inputs alone"),
        ({"arithmetic": "float32"}, "allowed are exact, keras2019"),
    ],
)
def test_unknown_distances_layers_and_definitions_list_the_known_ones(values, words):
    with pytest.raises(ParameterError) as caught:
        CriticalLength.check(values)
    assert words in str(caught.value)


def test_the_parameters_are_the_ledgers_runs_and_every_planned_run_is_in_a_sweep():
    for name, planned in OWN.items():
        values = {k: planned.experiment[k] for k in ("dataset", "optimizer") if k in planned.experiment}
        for chapter in (LearningRate, CriticalLength):
            assert set(chapter.check(values).experiments) == set(planned.experiments()), name
        swept = Sweep.read(ROOT / f"book/sweeps/05_{name.replace('_rates', '')}.yml")
        assert sorted(e.key for e in swept.experiments) == sorted(e.key for e in planned.experiments())
        assert [e.training.seed for e in swept.experiments] == sorted(e.training.seed for e in swept.experiments)


def test_rates_are_the_data_sets_own_unless_given():
    def of(**values):
        return sorted({e.training.learning_rate for e in LearningRate.check(values).experiments})

    assert of() == list(ADAM)
    assert of(optimizer="sgd") == of(optimizer="sgd", dataset="digits") == list(DESCENT)
    assert of(dataset="cifar10") == [1e-4, 3e-4, 1e-3]
    assert of(learning_rates=[0.01, 0.1]) == [0.01, 0.1]


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_layers_of_the_gradient_are_measured_once_more_at_the_highest_rate(dataset):
    planned = claims.read().runs[f"{dataset}_layers"]
    own = CriticalLength(dataset=dataset).of_layers
    assert set(own) == set(planned.experiments())
    assert {e.training.learning_rate for e in own} == {1e-3}
    sweeps = [Sweep.read(ROOT / f"book/sweeps/06_{name}.yml") for name in ("layers", "cifar10_layers")]
    assert set(own) <= {e for sweep in sweeps for e in sweep.experiments}
    assert CriticalLength(dataset=dataset, optimizer="sgd").of_layers == []


def test_spaces_by_distance_and_layer():
    assert CriticalLength(layer="layer 2").space == "layer 2"
    assert CriticalLength(distance="l1").space == "input, L1"


def test_planned_runs_are_not_computed_and_a_change_asks_first(no_runs):
    with pytest.raises(ParameterError, match=r"no seed of mnist.*stiffkit sweep"):
        rates.results(LearningRate())
    with pytest.raises(TooLongError, match="Nothing was computed"):
        rates.results(LearningRate(epochs=29))


# What chapter 5 shows, of runs whose slopes are known


def made_up(learning_rates=(1e-4, 1e-3, 1e-2)):
    """Runs whose stiffness grows by `SLOPES` a decade of rate throughout; the lowest rate ends at a loss of 0.2."""
    images = [0, *sorted({round(1_500 * (26 / 25) ** k) for k in range(182)})]
    rate = xr.DataArray(list(learning_rates), {"learning_rate": list(learning_rates)}, "learning_rate")
    seen = xr.DataArray(np.array(images, float), {"images": images}, "images")
    slope = xr.DataArray(list(SLOPES.values()), {"seed": list(SLOPES)}, "seed")
    more = {"regime": ["val-val"], "arithmetic": ["exact", "keras2019"], "measure": ["sign", "cos"]}
    value = (0.5 + slope * np.log10(rate / 1e-3) + 0 * seen).expand_dims(more)
    loss = 2.3 / (1 + seen / 10_000 * (rate / 1e-4) ** 0.7) ** 0.5 + 0 * slope
    names = places([0.3, 0.1], float(seen[-1]) / 60_000)
    return xr.Dataset(
        {
            "between": value,
            "within": -value,
            "loss": loss.expand_dims(split=["train", "validation"]),
            "epochs": seen / 60_000,
            "gap": (0 * loss + 3).expand_dims(part=["val"], quantile=[0.5]),
        },
        {"at": names},
    ).assign_attrs(source="made up", stopping=[0.3, 0.1])


def test_slopes_are_found_in_both_protocols():
    found = rates.forest({"one": made_up(), "two": made_up()})
    assert found.row.values.tolist() == [f"{name}, {protocol}" for name in ("one", "two") for protocol in PROTOCOLS]
    expected = t_interval(xr.DataArray(list(SLOPES.values()), dims="seed"))
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(found[name], float(expected[name]))


def test_no_recorded_set_is_a_forest_without_rows():
    assert rates.forest({}).sizes == {"row": 0, "measure": 2}


def test_a_rate_that_does_not_come_to_a_loss_is_missing_with_the_reason():
    runs = made_up()
    table = rates.crossings(runs)
    assert table.columns.tolist() == ["loss 0.3", "loss 0.1"]
    assert table.loc["0.0001", "loss 0.1"] == "no seed: 0.188 after 30.3 epochs"
    fastest = (2.3 / 0.3) ** 2 / 60_000 * 10_000 / 100**0.7  # epochs, but for the window and the one in 1 + ...
    assert float(table.loc["0.01", "loss 0.3"].split()[0]) == pytest.approx(fastest, rel=0.05)
    by_place = rates.by_loss(runs, "val-val", "exact")
    assert by_place.loc["loss 0.3", "rates"] == "0.0001, 0.001, 0.01"
    assert by_place.loc["loss 0.1", "rates"] == "0.001, 0.01"
    one_seed = runs.assign(loss=runs.loss.where((runs.seed != 2) | (runs.learning_rate != 1e-3), 0.5))
    assert rates.crossings(one_seed).loc["0.001", "loss 0.3"].startswith("not seed 2: 0.500 after")


def test_a_loss_that_is_passed_before_the_first_window_is_said():
    runs = made_up()
    runs["loss"] = runs.loss.where(runs.learning_rate != 1e-2, 0.05)
    assert rates.crossings(runs).loc["0.01", "loss 0.3"] == "no seed: below it from the first window on"


def test_curves_against_rate_and_loss_hold_the_values():
    runs = made_up()
    panels = rates.against_rate(runs, "between", "val-val", "exact")
    assert list(panels) == ["between classes, cosine", "between classes, sign"]
    values = panels["between classes, sign"]["equal loss"]
    assert values.sel(at="loss 0.1", learning_rate=1e-4).isnull().all()
    np.testing.assert_allclose(values.sel(at="loss 0.3", seed=2, learning_rate=1e-2), 0.5 + SLOPES[2])
    curve = rates.against_loss(runs, "between", "val-val", "exact")["cosine"].sel(seed=1, learning_rate=1e-3)
    known = curve.dropna("loss")
    np.testing.assert_allclose(known, 0.5)
    assert float(known.loss.min()) < 0.1 < 1 < float(known.loss.max())


def test_every_combination_has_a_row():
    runs = made_up()
    whole = xr.concat([runs.assign_coords(regime=[name]) for name in ("train-train", "train-val", "val-val")], "regime",
                      data_vars="minimal")  # fmt: skip
    table = rates.every_slope({"one": whole})
    assert len(table) == 2 * 3 * 2
    assert set(table.loc[("one", "between classes", "val-val", "exact")]) == {claims.over_seeds(
        xr.DataArray(list(SLOPES.values()), dims="seed"), 3)}  # fmt: skip
    assert all(
        cell.startswith("\N{MINUS SIGN}0.12") for cell in table.loc[("one", "within classes", "val-val", "exact")]
    )


# What chapter 6 shows


def lines(a, b, seeds=4, noise=0.0):
    """Lines of several seeds in one place; what is observed ends at one."""
    random = np.random.default_rng(0)
    both = np.array([[a, b]]) + noise * random.normal(size=(seeds, 2))
    here = {"at": ["end"], "space": ["input"], "learning_rate": [1e-3]}
    line = xr.DataArray(both, {"seed": range(seeds), "coefficient": ["intercept", "slope"]}, ("seed", "coefficient"))
    observed = xr.DataArray([0.1, 1.0], {"end": ["near", "far"]}, "end") + xr.DataArray(np.zeros(seeds), dims="seed")
    more = {"of": [POOLED], "arithmetic": ["exact"], "measure": ["cos"]}
    return xr.Dataset({"line": line.expand_dims(here | more), "observed": observed.expand_dims(here)})


def test_the_mean_lines_zero_has_an_interval_from_seeds():
    found = domains.over_seeds(lines(0.8, -1.6, noise=0.02), "line", "cos").squeeze()
    assert float(found.low) < 0.5 < float(found.high)
    assert str(found.censored.values) == ""
    out_of_sight = domains.over_seeds(lines(0.8, -0.4, noise=0.02), "line", "cos").squeeze()
    assert (float(out_of_sight.value), str(out_of_sight.censored.values)) == (1.0, "above")
    nothing = domains.over_seeds(lines(np.nan, np.nan), "line", "cos").squeeze()
    assert str(nothing.censored.values) == "unknown"


def test_two_seeds_give_a_zero_without_an_interval():
    assert domains._of_mean_line(np.array([[0.8, -1.6]] * 2), np.array([0.1, 1.0])) == Length(0.5)
    assert domains._of_mean_line(np.array([[0.8, -0.1]] * 2), np.array([0.1, 1.0])).censored == "above"
    assert domains._of_mean_line(np.array([[0.1, -1.6]] * 2), np.array([0.1, 1.0])).censored == "below"


def test_lengths_have_the_interval_of_their_logarithms(shown):
    _, runs = shown
    here = runs.sel(at="end", measure="sign", arithmetic="exact")
    own, found = lengths(here, "first zero"), domains.over_seeds(runs.sel(at="end"), "first zero", "sign")
    whole = (own.censored == "").all("seed") & found.low.notnull()
    assert whole.any()
    logs = t_interval(np.log(own.value))
    for name, of_logs in (("value", "mean"), ("low", "low"), ("high", "high")):
        np.testing.assert_allclose(found[name].where(whole), np.exp(logs[of_logs]).where(whole))


def test_directions_follow_the_interval():
    def of(*values):
        return domains._direction(xr.DataArray(list(values), dims="seed"))

    assert of(-1.0, -1.1, -0.9) == "falls"
    assert of(1.0, 1.1, 0.9) == "rises"
    assert of(-1.0, 1.0, 0.1) == "unclear"
    assert of(0.001, 0.0011, 0.0009) == "stays"
    assert of(1.0) == of(np.nan, 1.0) == "too few"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        p = CriticalLength(**QUICK)
        p.prepare(progress=False)
        yield p, rates.results(p)


def test_runs_lie_along_rate_and_seed(shown):
    p, runs = shown
    assert runs.learning_rate.values.tolist() == [1e-3, 3e-3]
    assert runs.seed.values.tolist() == [1, 2]
    assert runs.attrs["stopping"] == [1.5, 0.8]
    assert "`digits`, network `fc`, Adam at 2 constant rates, 2.5 epochs, 2 seeds each, 60 + 60" in rates.description(
        p, runs
    )


def test_seeds_of_which_a_rate_is_missing_are_left_out(shown, monkeypatch):
    p, runs = shown
    experiments = p.experiments
    last = results.find(experiments[-1])
    assert (last is not None, experiments[-1].training.seed) == (True, 2)
    planned = CriticalLength(**QUICK)
    monkeypatch.setattr(CriticalLength, "to_run", ())  # as if the ledger planned them
    monkeypatch.setattr(results, "find", lambda e, find=results.find: None if e == experiments[-1] else find(e))
    found = rates.results(planned)
    assert found.seed.values.tolist() == [1]
    np.testing.assert_array_equal(found.between, runs.between.sel(seed=[1]))


def test_curves_by_layer_are_means_over_seeds(shown):
    _, runs = shown
    curves = domains.curves(runs, "end", 3e-3, "sign", "exact")
    assert curves.space.values.tolist() == ["input", "layer 1", "layer 2", "layer 3", "output"]
    own = runs.curve.sel(at="end", learning_rate=3e-3, measure="sign", arithmetic="exact", pairs="same class")
    filled = curves.stiffness.sel(pairs="same class").notnull()
    expected = own.sel(space=curves.space).mean("seed").where(filled)
    np.testing.assert_allclose(curves.stiffness.sel(pairs="same class"), expected)
    assert filled.any("distance").all()


def test_curves_of_layers_of_the_gradient_are_means_over_seeds(shown):
    p, _ = shown
    curves = domains.of_gradient_layers(p)
    assert curves.layer.values.tolist() == ["layer 1", "layer 2", "layer 3", "layer 4", "whole"]
    runs = p.found(p.of_layers).isel(images=-1).sel(space="input", measure="cos")
    for name, own in (("layer 2", runs.layer_curve.sel(layer=2)), ("whole", runs.curve.sel(arithmetic="exact"))):
        here = curves.stiffness.sel(layer=name, measure="cos", pairs="same class")
        expected = own.sel(pairs="same class").mean("seed").where(here.notnull())
        np.testing.assert_allclose(here, expected)
        assert here.notnull().any()


def test_nothing_is_shown_of_layers_where_nothing_was_run(no_runs):
    assert domains.of_gradient_layers(CriticalLength()) is None
    assert domains.beside_first_version(claims.read()) is None


def test_lengths_against_epoch_and_rate(shown):
    p, runs = shown
    panels = domains.through_epochs(runs, p.space, p.definition, "cos")
    assert [title.split(",")[0] for title in panels] == ["critical length", "decay", "half of the first value"]
    for panel in panels.values():
        assert panel.epochs.values.tolist() == [1, 2]
    found = domains.against_rate(runs)
    assert found.sizes == {"at": 2, "space": 5, "learning_rate": 2}
    bounds = found.censored != ""
    assert found.low.where(bounds).isnull().all()


def test_the_first_versions_values_stand_beside_its_own_rates():
    planned = claims.read().runs[domains.FIRST_VERSION_RUNS]
    assert planned.axes == {"learning_rate": ADAM}
    assert {len(values) for values in domains.FIRST_VERSION.values()} == {len(ADAM)}


def test_the_multiverse_has_every_definition_and_space(shown):
    _, runs = shown
    table = domains.multiverse(runs)
    assert len(table) == runs.sizes["space"] * 2 * (len(domains.DEFINITIONS) + 1)
    assert set(table["equal loss: it"]) <= {"falls", "rises", "stays", "unclear", "too few"}
    assert set(table.columns) == {f"{p}{end}" for p in PROTOCOLS for end in ("", ": it", ", no value")}


def test_intercepts_and_slopes_are_those_of_the_lines(shown):
    _, runs = shown
    table = domains.line_by_line(runs, "layer 1", "cos")
    here = runs.line.sel(
        of=POOLED, space="layer 1", measure="cos", arithmetic="exact", at="epoch 2", learning_rate=3e-3
    )
    for name in ("intercept", "slope"):
        assert table.loc[(name, "0.003"), "epoch 2"] == claims.over_seeds(here.sel(coefficient=name))


def test_decays_by_set_and_protocol(shown):
    _, runs = shown
    found = domains.decays({"digits": runs})["decay, digits"]
    assert list(found) == list(PROTOCOLS)
    line = runs.line.sel(at="loss 0.8", space="input", of=POOLED, measure="cos", arithmetic="exact")
    expected = -line.sel(coefficient="slope") / line.sel(coefficient="intercept")
    np.testing.assert_allclose(
        found["equal loss"].sel(at="loss 0.8"), expected.transpose(*found["equal loss"].dims[1:])
    )
