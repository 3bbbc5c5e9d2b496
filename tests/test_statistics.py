"""Bootstrap errors against a bootstrap that copies points and on sets of known variance; t intervals over runs."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from stiffkit import GradientGram, class_stiffness, stiffness, within_between
from stiffkit.statistics import bootstrap_error, grouping_test, partial_mantel, t_interval


def made_gram(n, shift=0.0):
    """The Gram matrix of random gradients in three dimensions."""
    g = shift + torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = g.norm(dim=1)
    g = g / norms[:, None]
    return GradientGram((g @ g.T).clamp(-1, 1), norms, norms, torch.eye(n, dtype=torch.bool))


def without_diagonal(S):
    return S.clone().fill_diagonal_(torch.nan)


def errors(S, y, **options):
    found = bootstrap_error(S, y, **options)
    return float(found.within), float(found.between)


def copying_bootstrap(gram, measure, y, resamples, seed):
    """Draw the points themselves and measure the copies, one resample at a time."""
    generator, y = np.random.default_rng(seed), np.asarray(y)
    members = [np.flatnonzero(y == c) for c in np.unique(y)]
    summaries = []
    for _ in range(resamples):
        index = np.concatenate([generator.choice(m, len(m)) for m in members])
        W = within_between(class_stiffness(stiffness(gram.block(index, index), measure), y[index]))
        summaries.append([float(W.within), float(W.between)])
    return np.std(summaries, axis=0, ddof=1)


@pytest.mark.parametrize("measure", ["sign", "cos"])
def test_equals_a_bootstrap_that_copies_points(measure):
    gram, y = made_gram(21), [0] * 8 + [1] * 3 + [2] * 10
    found = errors(stiffness(gram, measure), y, resamples=4000)
    expected = copying_bootstrap(gram, measure, y, 500, seed=1)
    np.testing.assert_allclose(found, expected, rtol=4 * math.sqrt(1 / 8000 + 1 / 1000))  # of two standard deviations


def test_the_order_of_the_points_and_the_names_of_the_classes_do_not_matter():
    S, y = stiffness(made_gram(30), "cos"), torch.arange(30) % 3
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = errors(S[order][:, order], (100 - 7 * y)[order].tolist(), resamples=4000)
    np.testing.assert_allclose(found, errors(S, y, resamples=4000), rtol=0.1)


def test_known_variance_between_classes():
    """With S = (x_i + x_j) / 2 a cell is half the sum of two class means, whose bootstrap variance is s^2 / n."""
    x = torch.cat([torch.linspace(-1, 1, 12), torch.linspace(-0.3, 0.5, 7)]).double()
    y = [0] * 12 + [1] * 7
    _, between = errors(without_diagonal((x[:, None] + x) / 2), y, resamples=20_000)
    variances = x[:12].var(correction=0) / 12, x[12:].var(correction=0) / 7
    assert between == pytest.approx(math.sqrt(sum(variances)) / 2, rel=0.03)


def test_known_variance_within_classes():
    """With S = (x_i + x_j) / 2 a large class's own cell is close to its mean."""
    n = 150
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    within, _ = errors(without_diagonal((x[:, None] + x) / 2), [0] * n, resamples=1500)
    assert within == pytest.approx(float(x.std(correction=0)) / math.sqrt(n), rel=0.1)


def test_copies_of_a_point_are_no_pairs():
    S = without_diagonal(torch.full((12, 12), 0.3, dtype=torch.float64))
    assert errors(S, [0] * 6 + [1] * 6) == pytest.approx((0, 0), abs=1e-12)
    assert errors(S, [0, 1] + [2] * 10) == pytest.approx((0, 0), abs=1e-12)


def test_classes_are_drawn_apart():
    """Cells that differ from class to class, the same for all points, have no error."""
    y = torch.arange(36) % 3
    S = without_diagonal(torch.tensor([[0.9, -0.2, 0.1], [-0.2, 0.5, 0.3], [0.1, 0.3, -1.0]]).double()[y][:, y])
    assert errors(S, y) == pytest.approx((0, 0), abs=1e-12)


def test_errors_fall_as_one_over_the_root_of_the_points():
    few, many = (errors(stiffness(made_gram(n, 0.5), "cos"), torch.arange(n) % 2)[1] for n in (30, 480))
    assert few / many == pytest.approx(4, rel=0.3)


def test_a_seed_means_the_same_draws():
    S, y = stiffness(made_gram(12), "cos"), torch.arange(12) % 2
    assert errors(S, y, seed=3) == errors(S.numpy(), y.numpy(), seed=3) == errors(S, y.tolist(), seed=3)
    assert errors(S, y, seed=3) != errors(S, y, seed=4)


def test_the_matrix_is_left_alone():
    S = stiffness(made_gram(12), "cos")
    before = S.clone()
    bootstrap_error(S, torch.arange(12) % 2)
    torch.testing.assert_close(S, before, rtol=0, atol=0, equal_nan=True)


def test_one_class_and_classes_of_one_point():
    S = stiffness(made_gram(6), "cos")
    within, between = errors(S, [4] * 6)
    assert within > 0
    assert math.isnan(between)
    within, between = errors(S, range(6))
    assert math.isnan(within)
    assert between == pytest.approx(0, abs=1e-12)


# Over runs


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706205), (3, 4.302653), (5, 2.776445), (8, 2.364624)])
def test_t_interval_is_the_textbooks(n, quantile):
    values = np.random.default_rng(n).normal(size=n)
    found = t_interval(xr.DataArray(values, dims="seed"))
    half = quantile * values.std(ddof=1) / math.sqrt(n)
    assert float(found["mean"]) == pytest.approx(values.mean())
    assert (float(found.low), float(found.high)) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=1e-6
    )


def test_t_interval_covers_the_mean_95_times_in_100_with_three_runs():
    draws = xr.DataArray(np.random.default_rng(0).normal(size=(3, 20_000)), dims=("seed", "draw"))
    found = t_interval(draws)
    assert float(((found.low < 0) & (found.high > 0)).mean()) == pytest.approx(0.95, abs=0.005)


def test_t_interval_of_one_run_has_no_bounds_and_missing_runs_are_left_out():
    values = xr.DataArray([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan], [5.0, np.nan, np.nan]], dims=("seed", "images"))
    found = t_interval(values)
    np.testing.assert_array_equal(found["mean"], [3, 2, np.nan])
    assert np.isfinite(found.low[0])
    assert np.isnan(found.low[1:]).all()
    assert np.isnan(found.high[1:]).all()


# Groups of classes

GROUPS = ["a", "b", "a", "c", "b", "c", "a"]


def class_matrix(values):
    return xr.DataArray(values, dims=("class_a", "class_b"))


def made_matrix(seed=0, size=7):
    return class_matrix(np.random.default_rng(seed).uniform(-1, 1, (size, size)))


def related_less_unrelated(C, groups):
    """Cell by cell."""
    found = {True: [], False: []}
    for i in range(len(groups)):
        for j in range(len(groups)):
            if i != j and C[i, j] == C[i, j]:
                found[groups[i] == groups[j]].append(float(C[i, j]))
    return np.mean(found[True]) - np.mean(found[False])


def test_the_statistic_of_a_grouping():
    C = made_matrix()
    C[2, 5] = C[0, 2] = np.nan
    C[3, 3] = 1e6  # the diagonal is not looked at
    found = grouping_test(C, GROUPS, permutations=99)
    assert float(found.observed) == pytest.approx(related_less_unrelated(C.values, GROUPS))


def test_permutations_are_of_rows_and_columns_together():
    """With two pairs of four classes there are three groupings: all values of the null are among theirs."""
    C = made_matrix(1, 4)
    null = grouping_test(C, [0, 0, 1, 1], permutations=500).null.values
    values = [related_less_unrelated(C.values, g) for g in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0])]
    counts = [int(np.isclose(null, v).sum()) for v in values]
    assert sum(counts) == 500
    assert min(counts) > 120


def test_p_counts_the_permutations_that_reach_the_observed_value():
    C = made_matrix(2)
    found = grouping_test(C, GROUPS, permutations=999)
    reached = int((found.null >= found.observed - 1e-12).sum())
    assert float(found.p) == pytest.approx((1 + reached) / 1000)
    opposite = grouping_test(-C, GROUPS, permutations=999)
    assert float(opposite.p_below) == float(found.p)
    assert float(found.effect) == pytest.approx(float((found.observed - found.null.mean()) / found.null.std(ddof=1)))
    assert grouping_test(C, GROUPS, permutations=99).identical(grouping_test(C, GROUPS, permutations=99))


def test_structure_is_found_and_none_is_not():
    groups = np.repeat(np.arange(5), 4)
    noise = np.random.default_rng(3).normal(size=(100, 20, 20))
    level = [float(grouping_test(class_matrix(n), groups, permutations=199).p) for n in noise]
    assert 0 < np.mean(np.array(level) <= 0.05) < 0.12
    found = grouping_test(class_matrix(noise[0] + (groups[:, None] == groups)), groups)
    assert float(found.p) == 1e-4
    assert float(found.effect) > 5


def residual(y, X):
    return y - X @ np.linalg.lstsq(X, y, rcond=None)[0]


def test_partial_mantel_is_a_partial_correlation():
    C, controls = made_matrix(4), [made_matrix(5), made_matrix(6)]
    off = ~np.eye(7, dtype=bool)
    same = (np.array(GROUPS)[:, None] == np.array(GROUPS))[off].astype(float)
    X = np.stack([np.ones(42), *(c.values[off] for c in controls)], axis=1)
    expected = np.corrcoef(residual(C.values[off], X), residual(same, X))[0, 1]
    assert float(partial_mantel(C, GROUPS, controls, permutations=9).observed) == pytest.approx(expected)


def test_groups_that_only_the_control_explains_are_not_found():
    groups = np.repeat(np.arange(6), 4)
    random = np.random.default_rng(7)
    inputs = (groups[:, None] == groups) + 0.3 * random.normal(size=(24, 24))
    C = class_matrix(inputs + 0.3 * random.normal(size=(24, 24)))
    assert float(grouping_test(C, groups, permutations=999).p) == 1e-3
    assert float(partial_mantel(C, groups, [class_matrix(inputs)], permutations=999).p) > 0.05
    own = class_matrix(C.values + 0.5 * (groups[:, None] == groups))
    assert float(partial_mantel(own, groups, [class_matrix(inputs)], permutations=999).p) == 1e-3


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_groups_that_group_nothing_are_refused(groups):
    with pytest.raises(ValueError, match="at least two"):
        grouping_test(made_matrix(0, 4), groups)


def test_groups_of_another_number_of_classes_and_empty_cells_are_refused():
    with pytest.raises(ValueError, match="one for each class"):
        grouping_test(made_matrix(), [0, 0, 1])
    C = made_matrix()
    C[0, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        partial_mantel(C, GROUPS, [])
