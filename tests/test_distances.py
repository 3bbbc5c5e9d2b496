"""Distances, curves against distance, and critical lengths: by hand, by closed form, and by repetition."""

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stiffkit.distances import (
    METRICS,
    Line,
    critical_length,
    crossing,
    distance,
    each_class,
    fitted_line,
    half_decay,
    representations,
    same_class,
    stiffness_by_distance,
    zero_of_line,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Distances


def test_distances_by_hand():
    x, x2 = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[4.0, -3.0], [6.0, 8.0]])
    assert distance(x, x2, "cosine").tolist() == [[1.0, pytest.approx(0.0)], [pytest.approx(1.6), pytest.approx(0.2)]]
    assert distance(x, x2, "l1").tolist() == [[8.0, 7.0], [9.0, 12.0]]
    torch.testing.assert_close(distance(x, x2, "l2")[0], torch.tensor([50.0, 25.0], dtype=torch.float64).sqrt())
    torch.testing.assert_close(distance(x, x2, "similarity"), 1 - distance(x, x2))


@pytest.mark.parametrize("metric", METRICS)
def test_distances_of_images_are_symmetric_and_bounded(metric):
    x = randn(6, 2, 3, 3)
    D = distance(x, metric=metric)
    torch.testing.assert_close(D, D.T)
    assert D.dtype == torch.float64
    if metric in ("cosine", "similarity"):
        assert D.abs().max() <= 2
        torch.testing.assert_close(D, distance(7 * x, metric=metric))


def test_a_point_of_zero_has_no_angle_and_an_unknown_distance_is_refused():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert distance(x).isnan().tolist() == [[True, True], [True, False]]
    assert distance(x, metric="l2")[0, 1] == 1
    with pytest.raises(ValueError, match="'l3' is unknown; known are cosine, similarity, l2, l1"):
        distance(x, metric="l3")


def test_representations_are_what_each_layer_is_given():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 5), nn.Linear(5, 3)
    )
    x = torch.randn(4, 1, 8, 8)
    found = representations(model, x)
    assert list(found) == ["input", "layer 1", "layer 2", "output"]
    torch.testing.assert_close(found["layer 1"], model[:4](x))
    torch.testing.assert_close(found["layer 2"], model[:5](x))
    torch.testing.assert_close(found["output"], model(x))
    assert not any(m._forward_pre_hooks for m in model.modules())


# Curves


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000), st.integers(2, 6))
def test_curves_are_means_of_the_pairs_in_each_bin(n, seed, bins):
    S, D = randn(n, n, seed=seed), randn(n, n, seed=seed + 1).abs()
    S.fill_diagonal_(torch.nan)
    y = torch.arange(n) % 3
    same, edges = same_class(y), np.linspace(0, 2, bins + 1)
    found = stiffness_by_distance(S, D, same, edges, fewest=1)
    for k in range(bins):
        last = k == bins - 1
        inside = (edges[k] <= D) & ((edges[k + 1] >= D) if last else (edges[k + 1] > D)) & ~S.isnan()
        for name, kind in (("same class", same), ("different classes", ~same), ("all", torch.ones_like(same))):
            one = found.sel(pairs=name).isel(distance=k)
            values = S[inside & kind]
            assert int(one["count"]) == len(values)
            assert float(one.stiffness) == pytest.approx(float(values.mean()), nan_ok=True)


def test_too_few_pairs_are_a_hole_with_its_count():
    S, D = torch.ones(5, 5, dtype=torch.float64), torch.full((5, 5), 0.3, dtype=torch.float64)
    D[0, 1] = 1.7
    found = stiffness_by_distance(S, D, same_class(torch.zeros(5)), [0, 1, 2], fewest=2)
    assert found["count"].sel(pairs="all").values.tolist() == [24, 1]
    assert found.stiffness.sel(pairs="same class").isnull().values.tolist() == [False, True]
    assert found.stiffness.sel(pairs="different classes").isnull().all()
    with pytest.raises(ValueError, match="must ascend"):
        stiffness_by_distance(S, D, same_class(torch.zeros(5)), [1, 0])


def pooled(seed=0, n=400):
    """Two constants, within 0.6 and between -0.4: classes far apart, so that near pairs are of one class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    centres = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    x = centres[y] + 0.8 * torch.randn(n, 8, generator=generator, dtype=torch.float64)
    same = same_class(y)
    S = torch.where(same, 0.6, -0.4).double()
    S.fill_diagonal_(torch.nan)
    return S, distance(x), same, y


def test_pooled_constants_cross_zero_by_composition_alone():
    """As v1 pooled classes: a crossing without any dependence on distance, and the null has the same one."""
    S, D, same, _ = pooled()
    found = stiffness_by_distance(S, D, same, np.linspace(0, 2, 21))
    everything = found.sel(pairs="all")
    length = crossing(everything.stiffness)
    assert not length.censored
    assert crossing(everything.null).value == pytest.approx(length.value, abs=1e-12)
    np.testing.assert_allclose(everything.stiffness - everything.null, 0 * everything.null, atol=1e-12)
    assert crossing(found.stiffness.sel(pairs="same class")).censored == "above"
    assert crossing(found.stiffness.sel(pairs="different classes")).censored == "below"


# Lengths


def curve(values, start=0.0, step=0.1):
    return xr.DataArray(values, {"distance": start + step * np.arange(len(values))}, "distance")


@pytest.mark.parametrize(
    ("values", "length", "censored"),
    [
        ([1, 0.5, -0.5, 1], 0.15, ""),
        ([1, np.nan, -1], 0.1, ""),
        ([1, 0.5, 0.2], 0.2, "above"),
        ([-0.1, 0.5, 0.2], 0.0, "below"),
        ([0.4, 0.0, -0.2], 0.1, ""),
    ],
)
def test_the_first_crossing(values, length, censored):
    found = crossing(curve(values))
    assert (found.value, found.censored) == (pytest.approx(length), censored)


def test_a_curve_of_similarities_is_followed_from_one_down():
    similarities = curve([1, 0.6, 0.2, -0.2], start=1.0, step=-0.1)
    assert crossing(similarities).value == pytest.approx(0.75)


def test_half_of_the_first_value():
    assert half_decay(curve([0.8, 0.6, 0.2, 0.1])).value == pytest.approx(0.15)
    assert half_decay(curve([0.8, 0.6, 0.5])).censored == "above"


def test_a_line_is_least_squares_and_its_covariance_the_jackknife():
    n = 9
    S, D = randn(n, n), randn(n, n, seed=1).abs()
    S, D = (S + S.T) / 2, (D + D.T) / 2
    S.fill_diagonal_(torch.nan)
    everything = torch.ones(n, n, dtype=torch.bool)

    def by_hand(kept):
        s, d = S[kept][:, kept], D[kept][:, kept]
        here = ~s.isnan()
        return np.polyfit(d[here], s[here], 1)[::-1]

    line = fitted_line(S, D, everything, symmetric=True)
    np.testing.assert_allclose([line.intercept, line.slope], by_hand(list(range(n))))
    left_out = np.array([by_hand([k for k in range(n) if k != i]) for i in range(n)])
    about = left_out - left_out.mean(0)
    np.testing.assert_allclose(line.covariance, (n - 1) / n * about.T @ about)
    assert line.points == n


def test_a_line_between_two_sets_leaves_points_of_both_out():
    S, D = randn(5, 7), randn(5, 7, seed=1).abs()
    line = fitted_line(S, D, torch.ones(5, 7, dtype=torch.bool), symmetric=False)
    assert line.points == 12
    s, d = S.numpy(), D.numpy()
    kept = [np.polyfit(np.delete(d, i, 0).ravel(), np.delete(s, i, 0).ravel(), 1)[::-1] for i in range(5)]
    kept += [np.polyfit(np.delete(d, i, 1).ravel(), np.delete(s, i, 1).ravel(), 1)[::-1] for i in range(7)]
    about = np.array(kept) - np.mean(kept, 0)
    np.testing.assert_allclose(line.covariance, 11 / 12 * about.T @ about)


def made(xi, seed, n=40, effect=0.15):
    """Stiffness that falls to zero at xi, with an effect of each point that all of its pairs share."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    D = torch.cdist(x, x)
    u = effect * torch.randn(n, generator=generator, dtype=torch.float64)
    noise = 0.2 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    S = 0.5 * (1 - D / xi) + u[:, None] + u + (noise + noise.T) / 2
    S.fill_diagonal_(torch.nan)
    return S, D, torch.ones(n, n, dtype=torch.bool)


def test_the_interval_covers_a_known_length_as_often_as_it_says():
    """95 % of 200 repetitions is 190, and 181 to 197 is what chance allows around it."""
    covered = 0
    for seed in range(200):
        found = critical_length(*made(0.5, seed), symmetric=True)
        covered += found.low <= 0.5 <= found.high
    assert 181 <= covered <= 197


def test_pairs_counted_as_independent_would_claim_too_much():
    """The control: the interval of ordinary least squares, which takes pairs as observations, is far too short."""
    covered = 0
    for seed in range(60):
        S, D, chosen = made(0.5, seed)
        fit = fitted_line(S, D, chosen, symmetric=True)
        here = ~S.isnan()
        d, s = D[here].numpy(), S[here].numpy()
        design = np.stack([np.ones_like(d), d], 1)
        rest = s - design @ [fit.intercept, fit.slope]
        naive = rest @ rest / (len(s) - 2) * np.linalg.inv(design.T @ design)
        found = zero_of_line(Line(fit.intercept, fit.slope, naive, len(s), fit.shortest, fit.longest))
        covered += found.low <= 0.5 <= found.high
    assert covered < 48


def test_no_zero_among_the_observed_distances_is_censored():
    S, D, chosen = made(0.5, 1)
    never = critical_length(S.abs() + 1, D, chosen, symmetric=True)
    assert never.censored == "above"
    assert never.value == pytest.approx(float(D.max()))
    always = critical_length(S - 10, D, chosen, symmetric=True)
    assert always.censored == "below"
    far, D, chosen = made(3.0, 1)
    assert critical_length(far, D, chosen, symmetric=True).censored == "above"


def line(a, b, deviations, ends=(0.4, 1.0), points=100):
    return Line(a, b, np.diag(np.square(deviations)), points, *ends)


@pytest.mark.parametrize(
    ("fitted", "value", "censored"),
    [
        (line(0.5, -1.0, (0.01, 0.01), (0.0, 1.0)), 0.5, ""),
        (line(-0.1, 1.0, (0.01, 0.01)), 1.0, "above"),
        (line(0.1, -1.0, (0.01, 0.01)), 0.4, "below"),
        (line(-0.5, 0.0, (0.01, 0.01)), 0.4, "below"),
        (line(-0.6, 1.0, (0.01, 0.01)), 0.6, "rising"),
        (line(np.nan, np.nan, (0.01, 0.01)), np.nan, "unknown"),
    ],
)
def test_where_a_line_is_zero_among_the_observed_distances(fitted, value, censored):
    found = zero_of_line(fitted)
    assert (found.value, found.censored) == (pytest.approx(value, nan_ok=True), censored)


def test_a_slope_that_may_be_zero_leaves_the_interval_open():
    found = zero_of_line(line(0.1, -0.2, (0.2, 0.5), (0.0, 1.0), points=6))
    assert (found.low, found.high) == (-np.inf, np.inf)


def test_bounds_do_not_jump_where_a_slope_changes_its_sign_or_a_zero_leaves_the_observed():
    for a, b in ((0.3, 1e-6), (0.3, -1e-6)):
        found = zero_of_line(line(a, b, (0.1, 0.5), (0.0, 1.0)))
        assert (found.censored, found.high) == ("above", np.inf)
        assert found.low == pytest.approx(0.22, abs=0.05)
    just_in, just_out = (zero_of_line(line(a, -1.0, (0.05, 0.05), (0.1, 1.0))) for a in (0.105, 0.095))
    assert (just_in.censored, just_out.censored) == ("", "below")
    assert just_in.low == just_out.low == -np.inf
    assert just_in.high == pytest.approx(just_out.high, abs=0.02)


def test_too_few_pairs_say_so():
    S, D, chosen = made(0.5, 1)
    nothing = critical_length(S, D, torch.zeros_like(chosen), symmetric=True)
    assert (nothing.censored, np.isnan(nothing.value)) == ("unknown", True)
    y = torch.zeros(40, dtype=torch.long)
    y[0] = 1  # a class of one point
    found = each_class(lambda chosen: critical_length(S, D, chosen, symmetric=True), y)
    assert [length.censored for length in found] == ["", "unknown"]
    assert crossing(curve([np.nan, np.nan])).censored == "unknown"


def test_similarities_are_turned_into_distances():
    S, D, chosen = made(0.5, 2)
    one = critical_length(S, D, chosen, symmetric=True)
    other = critical_length(S, 1 - D, chosen, symmetric=True, metric="similarity")
    assert one.value == pytest.approx(other.value)


def test_each_class_by_itself():
    S, D, _ = made(0.5, 4, n=60, effect=0.0)
    y = torch.arange(60) % 2
    found = each_class(lambda chosen: critical_length(S, D, chosen, symmetric=True), y)
    assert len(found) == 2
    first = critical_length(S[::2, ::2], D[::2, ::2], torch.ones(30, 30, dtype=torch.bool), symmetric=True)
    assert found[0].value == pytest.approx(first.value)
    assert (found[0].low, found[0].high) == (pytest.approx(first.low), pytest.approx(first.high))
