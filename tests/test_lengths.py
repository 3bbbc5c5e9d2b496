"""Critical lengths of runs, and what claims make of them: made-up lines and curves whose lengths are known."""

import numpy as np
import pytest
import xarray as xr

from stiffkit.distances import PAIRS, crossing, half_decay, pooled
from stiffkit.endpoints import (
    decay_change,
    decay_rate_slope,
    length_rate_slope,
    line_at_far,
    line_slope,
    slope_a_decade,
)
from stiffkit.lengths import DEFINITIONS, decay, lengths, logarithms

RATES, SEEDS = (1e-4, 1e-3, 1e-2), (1, 2)
AT = ("loss 0.3", "loss 0.1", "epoch 1", "end")
SPACES = ("input", "layer 1", "layer 2", "output")
DISTANCES = np.arange(0.025, 2, 0.05)


def made_up(xi=None, height=0.8, classes=3, far=1.0):
    """Runs in which pairs of one class fall from `height` to zero at xi, and others are at -0.1."""
    dims = ("at", "space", "arithmetic", "measure", "learning_rate", "seed")
    coords = {
        "at": list(AT),
        "space": list(SPACES),
        "arithmetic": ["exact", "keras2019"],
        "measure": ["sign", "cos"],
        "learning_rate": list(RATES),
        "seed": list(SEEDS),
    }
    ones = xr.DataArray(np.ones([len(coords[d]) for d in dims]), coords, dims)
    xi = ones * (0.5 if xi is None else xi)
    d = xr.DataArray(DISTANCES, {"distance": DISTANCES}, "distance")
    same = height * (1 - d / xi)
    curve = xr.concat([same, xr.full_like(same, -0.1)], "pairs").assign_coords(pairs=list(PAIRS[:2]))
    line = xr.concat([height * ones, -height / xi], "coefficient").assign_coords(coefficient=["intercept", "slope"])
    of = ["pooled", *map(str, range(classes))]
    seen = d <= 1.2
    return xr.Dataset(
        {
            "curve": curve.where(seen),
            "count": (xr.full_like(curve.isel(arithmetic=0, measure=0, drop=True), 100) * seen).astype(int),
            "line": xr.concat([line] * len(of), "of").assign_coords(of=of),
            "observed": xr.concat([0 * ones + 0.1, 0 * ones + far], "end")
            .assign_coords(end=["near", "far"])
            .isel(arithmetic=0, measure=0, drop=True),
        }
    )


def along(name, values):
    return xr.DataArray(list(values), {name: {"learning_rate": list(RATES), "at": list(AT), "seed": list(SEEDS)}[name]})


def test_every_definition_of_a_line_finds_its_zero():
    runs = made_up(xi=0.5)
    assert set(DEFINITIONS) == {"line", "each class", "first zero", "classes alone", "first zero, one class", "half"}
    for definition, expected in (("line", 0.5), ("each class", 0.5), ("first zero, one class", 0.5)):
        found = lengths(runs, definition)
        assert (found.censored == "").all(), definition
        np.testing.assert_allclose(found.value, expected, err_msg=definition)
    first = 0.8 * (1 - 0.025 / 0.5)
    half = 0.5 * (1 - first / 2 / 0.8)
    np.testing.assert_allclose(lengths(runs, "half").value, half)
    pooled = lengths(runs, "first zero")
    equal_shares = 0.5 * (1 - 0.1 / 0.8)  # as many pairs of either kind: zero where one class is at 0.1
    np.testing.assert_allclose(pooled.value, equal_shares)


@pytest.mark.parametrize("definition", ["first zero, one class", "half"])
def test_they_are_those_of_one_curve(definition):
    runs = made_up(xi=along("learning_rate", (0.3, 0.7, 5.0)))
    one = {"first zero, one class": crossing, "half": half_decay}[definition]
    found = lengths(runs, definition).isel(at=0, space=0, arithmetic=0, measure=0, seed=0)
    curves = runs.curve.sel(pairs="same class").isel(at=0, space=0, arithmetic=0, measure=0, seed=0)
    for rate in RATES:
        expected = one(curves.sel(learning_rate=rate))
        assert float(found.value.sel(learning_rate=rate)) == pytest.approx(expected.value)
        assert str(found.censored.sel(learning_rate=rate).values) == expected.censored


def test_classes_alone_give_the_zero_of_the_null():
    runs = made_up(xi=along("learning_rate", (0.3, 0.7, 5.0)))
    here = runs.isel(at=0, space=0, arithmetic=0, measure=0, seed=0)
    found = lengths(runs, "classes alone").isel(at=0, space=0, arithmetic=0, measure=0, seed=0)
    for rate in RATES:
        own = here.sel(learning_rate=rate)[["curve", "count"]].rename(curve="stiffness")
        assert float(found.value.sel(learning_rate=rate)) == pytest.approx(crossing(pooled(own).null).value)


def test_a_zero_out_of_sight_is_censored_and_has_no_logarithm():
    runs = made_up(xi=along("learning_rate", (0.5, 0.05, 3.0)))
    found = lengths(runs, "line").isel(at=0, space=0, arithmetic=0, measure=0, seed=0)
    assert found.censored.values.tolist() == ["", "below", "above"]
    assert found.value.values.tolist() == pytest.approx([0.5, 0.1, 1.0])
    assert logarithms(runs, "line").isnull().any(["at", "space", "arithmetic", "measure", "seed"]).values.tolist() == [
        False,
        True,
        True,
    ]
    each = lengths(runs, "each class").isel(at=0, space=0, arithmetic=0, measure=0, seed=0)
    assert each.censored.values.tolist() == ["", "below", "above"]


def test_one_class_without_a_zero_censors_the_mean():
    runs = made_up(xi=0.5)
    runs["line"] = runs.line.where((runs.of != "1") | (runs.coefficient != "slope"), -0.1)
    assert (lengths(runs, "line").censored == "").all()
    assert (lengths(runs, "each class").censored == "above").all()
    missing = runs.assign(line=runs.line.where(runs.of != "1"))
    assert (lengths(missing, "each class").censored == "unknown").all()


def test_an_unknown_definition_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="'xi' is unknown; known are line, each class, first zero, classes alone, first zero, one"
    ):
        lengths(made_up(), "xi")


def test_the_decay_is_one_over_the_length_and_zero_without_any_dependence():
    np.testing.assert_allclose(decay(made_up(xi=0.4)), 2.5)
    flat = made_up(xi=np.inf)
    np.testing.assert_array_equal(decay(flat), 0)
    assert (lengths(flat, "line").censored == "above").all()


# What claims make of them


def test_a_slope_a_decade_is_over_the_rates_that_every_seed_has():
    values = along("learning_rate", (1.0, 3.0, 5.0)) + along("seed", (0.0, 10.0))
    assert slope_a_decade(values).values.tolist() == pytest.approx([2.0, 2.0])
    uneven = values.where((values.seed != 2) | (values.learning_rate != 1e-4), np.nan)
    assert slope_a_decade(uneven + along("learning_rate", (7.0, 0.0, 0.0))).values.tolist() == pytest.approx([2.0, 2.0])
    assert slope_a_decade(values.where(values.learning_rate < 1e-3)).isnull().all()


def test_lines_at_the_far_end_and_their_slopes():
    runs = made_up(xi=along("learning_rate", (0.5, 1.0, 2.0)), height=1.0)
    found = line_at_far(runs, "input", "cos", "end").sel(arithmetic="exact")
    assert found.dims == ("seed",)
    assert found.values.tolist() == pytest.approx([(-1 + 0 + 0.5) / 3] * 2)
    slope = line_slope(runs, "input", "cos", "end").sel(arithmetic="exact")
    assert slope.values.tolist() == pytest.approx([-(2 + 1 + 0.5) / 3] * 2)


def test_changes_of_the_decay():
    runs = made_up(xi=1 / along("at", (1.0, 2.0, 3.0, 5.0)))
    found = decay_change(runs, "input", "cos", "end", "epoch 1").sel(arithmetic="exact")
    assert found.values.tolist() == pytest.approx([2.0, 2.0])
    runs = made_up(xi=1 / along("learning_rate", (1.0, 1.5, 2.0)))
    for protocol in ("equal loss", "equal epoch"):
        found = decay_rate_slope(runs, "input", "cos", protocol).sel(arithmetic="exact")
        assert found.values.tolist() == pytest.approx([0.5, 0.5])


def test_lengths_that_grow_tenfold_have_slope_one_where_they_are_seen():
    runs = made_up(xi=along("learning_rate", (0.02, 0.2, 2.0)))
    hidden = length_rate_slope(runs, "line", "hidden", "cos", "equal loss").sel(arithmetic="exact")
    assert hidden.isnull().all(), "one of three is in sight"
    wide = runs.assign(observed=xr.where(runs.end == "near", 0.01, 3.0) * xr.ones_like(runs.observed))
    for space in ("hidden", "input"):
        found = length_rate_slope(wide, "line", space, "cos", "equal loss").sel(arithmetic="exact")
        assert found.values.tolist() == pytest.approx([1.0, 1.0])
