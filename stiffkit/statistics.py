"""How sure one is of a class matrix and its summaries."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stiffkit.alignment import Labels, class_indicators, same_group, weighted_cells, within_between


def t_interval(values: xr.DataArray, dimension: str = "seed", level: float = 0.95) -> xr.Dataset:
    r"""Mean and t interval $\bar v \pm t_{n-1}\, s / \sqrt n$ over runs.

    Args:
        values: with `dimension`, one value a run, further dimensions are kept; NaN where a run has none is left out.
        dimension: of the runs.
        level: of confidence.

    Returns:
        A Dataset with `mean`, `low` and `high`; NaN bounds where fewer than two values are there.

    >>> t_interval(xr.DataArray([1.0, 2.0, 3.0], dims="seed")).to_array().round(3).values.tolist()
    [2.0, -0.484, 4.484]

    """
    from scipy.special import stdtrit  # quantiles of t; scipy.stats takes a second to import

    n = values.notnull().sum(dimension)
    quantile = xr.apply_ufunc(lambda k: stdtrit(np.maximum(k - 1, 1), (1 + level) / 2), n)
    mean = values.mean(dimension)
    half = (quantile * values.std(dimension, ddof=1) / np.sqrt(n)).where(n > 1)
    return xr.Dataset({"mean": mean, "low": mean - half, "high": mean + half})


def bootstrap_error(S: Tensor, y: Labels, *, resamples: int = 500, seed: int = 0) -> xr.Dataset:
    """Standard errors of within- and between-class stiffness over the choice of points, by bootstrap.

    Points are drawn anew with replacement within each class, never pairs: pairs share points. A pair of two copies of
    one point counts as a pair of a point with itself and is left out; counted, it would lift the diagonal.

    Args:
        S: stiffness of a set with itself, (n, n), NaN on the diagonal.
        y: class of each point, (n,).
        resamples: how many times the points are drawn.
        seed: of the draws.

    Returns:
        A Dataset with `within` and `between`: the standard deviation over the resamples, in the unit of stiffness. It
        covers the choice of points for one trained network, not the variation between networks. It wants some ten
        points a class: of fewer, a resample may be all copies of one point, and its cell is left out.

    """
    S = torch.as_tensor(S, dtype=torch.float64)
    if S.ndim != 2 or S.shape != (len(y), len(y)) or not S.diagonal().isnan().all():
        raise ValueError(f"S must be a set of {len(y)} points with itself, its diagonal NaN; got {tuple(S.shape)}")
    _, indicators = class_indicators(torch.as_tensor(y).cpu())
    members = [indicator.nonzero()[:, 0].numpy() for indicator in indicators.T]
    generator = np.random.default_rng(seed)
    cells = []
    for _ in range(resamples):
        drawn = np.concatenate([generator.choice(points, len(points)) for points in members])
        weights = indicators * torch.from_numpy(np.bincount(drawn, minlength=len(S)))[:, None]
        cells.append(weighted_cells(S, weights, weights)[0].numpy())
    matrices = xr.DataArray(np.stack(cells), dims=("resample", "class_a", "class_b"))
    return within_between(matrices).std("resample", ddof=1)


def grouping_test(
    C: xr.DataArray, groups: Sequence[Hashable], *, permutations: int = 9_999, seed: int = 0
) -> xr.Dataset:
    r"""Whether classes of one group are stiffer towards each other than classes of random groups of the same sizes.

    The statistic is the mean cell of two classes of one group less that of two classes of different groups. Under the
    null hypothesis the groups could as well be dealt out at random: the labels of rows and columns are permuted
    together, B times, and $p = (1 + b) / (1 + B)$ with b the permutations that reach the observed value.

    Args:
        C: one class matrix, (K, K), averaged over seeds first; its diagonal is not looked at, NaN cells are left out.
        groups: the group of each class, in the order of `C.class_a`.
        permutations: B.
        seed: of the permutations.

    Returns:
        A Dataset with `observed`; `null` (permutation); `p`, one-sided; `p_below`, of the other side; `p_two_sided`,
        twice the smaller of them, where the side was not fixed beforehand; and `effect`, the
        observed value in standard deviations of the null from its mean.

    """
    cells = _off_diagonal(C)
    kept = np.isfinite(cells)
    values = np.where(kept, cells, 0.0)

    def statistic(same: np.ndarray) -> np.ndarray:
        inside, number = same @ values, same @ kept
        return inside / number - (values.sum() - inside) / (kept.sum() - number)

    return _permuted(C, groups, statistic, permutations, seed)


def partial_mantel(
    C: xr.DataArray,
    groups: Sequence[Hashable],
    controls: Sequence[xr.DataArray],
    *,
    permutations: int = 9_999,
    seed: int = 0,
) -> xr.Dataset:
    r"""Whether groups of classes explain a class matrix beyond other matrices: a partial Mantel test.

    After Smouse, Long and Sokal (1986). The statistic is the correlation of the cells off the diagonal with the
    indicator of "same group", after the controls and a constant have been regressed out of both. The labels of the
    groups are permuted, not the matrices.

    Args:
        C: as for `grouping_test`, without NaN off the diagonal.
        groups: as for `grouping_test`.
        controls: matrices like C, such as the similarity of inputs and the class matrix before training.
        permutations: as for `grouping_test`.
        seed: as for `grouping_test`.

    Returns:
        As for `grouping_test`; `observed` is a partial correlation.

    """
    cells = _off_diagonal(C)
    design = np.stack([np.ones_like(cells), *(_off_diagonal(control) for control in controls)], axis=1)
    if not np.isfinite([*cells, *design.flat]).all():
        raise ValueError("a cell off the diagonal is NaN: leave out classes without points")
    lengths = np.linalg.norm(design, axis=0)
    left, sizes, _ = np.linalg.svd(design / np.where(lengths > 0, lengths, 1.0), full_matrices=False)
    basis = left[:, sizes > 1e-9]  # a control that is constant, or a sum of others, adds no direction
    rest = cells - basis @ (basis.T @ cells)
    if np.linalg.norm(rest) < 1e-9 * np.linalg.norm(cells) or not cells.any():
        raise ValueError("the controls, or a constant, explain C wholly: nothing is left for the groups to explain")

    def statistic(same: np.ndarray) -> np.ndarray:
        unexplained = same.sum(axis=1) - np.square(same @ basis).sum(axis=1)
        return same @ rest / (np.linalg.norm(rest) * np.sqrt(unexplained))

    return _permuted(C, groups, statistic, permutations, seed)


def all_alike(C: xr.DataArray) -> bool:
    """Whether all classes are alike to each other, to 1/500: a network that answers uniformly."""
    return bool(np.ptp(_off_diagonal(C)) < 1 / 500)


def _off_diagonal(C: xr.DataArray) -> np.ndarray:
    values = C.transpose("class_a", "class_b").values.astype(float)
    return values[~np.eye(len(values), dtype=bool)]


def _permuted(
    C: xr.DataArray,
    groups: Sequence[Hashable],
    statistic: Callable[[np.ndarray], np.ndarray],
    permutations: int,
    seed: int,
) -> xr.Dataset:
    """The statistic of the groups, and its distribution over permutations of them; each a row of "same group" cells."""
    same = same_group(C, groups)
    if not 1 < len(np.unique(same, axis=0)) < len(groups):
        raise ValueError("there must be at least two groups, and one of at least two classes")
    off, generator = ~np.eye(len(groups), dtype=bool), np.random.default_rng(seed)
    observed = float(statistic(same[off][None].astype(float))[0])
    null = np.empty(permutations)
    for start in range(0, permutations, 256):
        orders = [generator.permutation(len(groups)) for _ in null[start : start + 256]]
        null[start : start + 256] = statistic(np.stack([same[order][:, order][off] for order in orders]).astype(float))
    slack = 1e-12 * abs(null).max()  # permutations that leave the groups as they are differ by rounding
    shares = {
        "p": (1 + (null >= observed - slack).sum()) / (1 + permutations),
        "p_below": (1 + (null <= observed + slack).sum()) / (1 + permutations),
    }
    shares["p_two_sided"] = min(1.0, 2 * min(shares.values()))
    effect = (observed - null.mean()) / null.std(ddof=1)
    return xr.Dataset({"observed": observed, "effect": effect, **shares, "null": ("permutation", null)})
