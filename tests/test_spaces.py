"""Stiffness against distance at a checkpoint: held to the functions for one space, and to loops over pairs."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from stiffkit.alignment import stiffness
from stiffkit.distances import FEWEST, distance, fitted_line, pooled, same_class, stiffness_by_distance
from stiffkit.gradients import gradient_gram
from stiffkit.losses import cross_entropy, cross_entropy_float32, cross_entropy_keras2019
from stiffkit.spaces import EDGES, JUDGED, Spaces

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made():
    """A small network, thirty points of three classes on the unit sphere, their Gram matrices, what is measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = nn.functional.normalize(torch.randn(30, 6), dim=1).reshape(30, 1, 2, 3), torch.arange(30) % 3
    losses = {"exact": cross_entropy, "float32": cross_entropy_float32, "keras2019": cross_entropy_keras2019}
    grams = {name: gradient_gram(model, loss, (x, y)) for name, loss in losses.items()}
    return model, x, y, grams, Spaces(x, y).measured(model, grams)


def test_what_is_measured(made):
    found = made[-1]
    assert set(found.data_vars) == {"curve", "count", "line", "observed", "no_angle"}
    assert found.space.values.tolist() == ["input", "input, L2", "input, L1", "layer 1", "output"]
    assert found.arithmetic.values.tolist() == list(JUDGED)
    assert found.of.values.tolist() == ["pooled", "0", "1", "2"]


def test_each_space_is_its_own_curve_and_line(made):
    model, x, y, grams, found = made
    h = model[:3](x)
    spaces = {
        "input": distance(x),
        "input, L2": distance(x, metric="l2"),
        "input, L1": distance(x, metric="l1") / 6**0.5,
        "layer 1": distance(h),
        "output": distance(model(x)),
    }
    for space, D in spaces.items():
        for arithmetic in JUDGED:
            for measure in ("sign", "cos"):
                S = stiffness(grams[arithmetic], measure)
                here = found.sel(space=space, arithmetic=arithmetic, measure=measure)
                expected = stiffness_by_distance(S, D, same_class(y), EDGES, fewest=1).drop_sel(pairs="all")
                np.testing.assert_allclose(here.curve.transpose(*expected.stiffness.dims), expected.stiffness)
                np.testing.assert_array_equal(here["count"], expected["count"])
                for of in here.of.values:
                    chosen = same_class(y) if of == "pooled" else (y == int(of))[:, None] & (y == int(of))
                    line = fitted_line(S, D, chosen, symmetric=True)
                    np.testing.assert_allclose(
                        here.line.sel(of=of), [line.intercept, line.slope], rtol=1e-8, atol=1e-12
                    )


def test_curves_of_layers_are_those_of_their_own_gradients_and_only_there_when_asked_for(made):
    model, x, y, grams, found = made
    layers = gradient_gram(model, cross_entropy, (x, y), by="layer")
    more = Spaces(x, y).measured(model, grams, layers)
    xr.testing.assert_identical(more.drop_vars(["layer_curve", "layer"]), found)
    assert more.layer.values.tolist() == [1, 2]
    for k, gram in enumerate(layers.values(), start=1):
        for measure in ("sign", "cos"):
            expected = stiffness_by_distance(stiffness(gram, measure), distance(x), same_class(y), EDGES, fewest=1)
            own = more.layer_curve.sel(space="input", layer=k, measure=measure)
            np.testing.assert_allclose(own, expected.stiffness.drop_sel(pairs="all"))


def test_the_observed_distances_are_those_of_pairs_of_one_class(made):
    _, x, y, _, found = made
    pairs = same_class(y) & ~torch.eye(30, dtype=torch.bool)
    expected = np.quantile(distance(x)[pairs], [0.01, 0.99])
    np.testing.assert_allclose(found.observed.sel(space="input"), expected)


def test_all_pairs_and_the_null_follow_from_what_is_kept(made):
    _, x, y, grams, found = made
    kept = found.sel(space="input", arithmetic="exact", measure="cos").rename(curve="stiffness")[["stiffness", "count"]]
    expected = stiffness_by_distance(stiffness(grams["exact"], "cos"), distance(x), same_class(y), EDGES)
    derived = pooled(kept, FEWEST)
    for name in ("stiffness", "count", "null"):
        np.testing.assert_allclose(derived[name].transpose(*expected[name].dims), expected[name])


def test_points_without_an_angle_are_left_out_and_counted():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].bias.fill_(0.0)
        model[0].weight.copy_(torch.eye(5, 4))
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    x[:3] *= -1  # nothing passes the non-linearity
    y = torch.arange(20) % 2
    found = Spaces(x, y).measured(model, {"exact": gradient_gram(model, cross_entropy, (x, y))})
    assert found.no_angle.sel(space=["input", "layer 1"]).values.tolist() == [0, 3]
    pairs = found["count"].sum(["pairs", "distance"])
    assert pairs.sel(space=["input", "layer 1"]).values.tolist() == [20 * 19, 17 * 16]
    assert found.line.sel(space="layer 1", of="pooled").notnull().all()
