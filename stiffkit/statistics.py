"""How sure one is of a class matrix and its summaries."""

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stiffkit.alignment import Labels, class_indicators, weighted_cells, within_between


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
