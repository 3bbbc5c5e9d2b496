r"""Stiffness against distance: curves, what classes alone would give, and the length at which stiffness vanishes.

The third version measures $d = 1 - \cos(X_1, X_2)$ between inputs, fits a line to the stiffness of pairs of one class,
and calls the distance of its zero the dynamical critical length $\xi$. The first version takes the cosine itself, one
at the same place, in the input and in every layer's representation, and the first zero of the binned curve. Pairs share
points, and so are no independent observations: intervals come from a jackknife over points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from stiffkit.alignment import Labels
from stiffkit.measuring import undisturbed

METRICS = ("cosine", "similarity", "l2", "l1")
PAIRS = ("same class", "different classes", "all")
FEWEST = 20  # pairs in a bin, of fewer no mean is taken


def distance(points: Tensor, points2: Tensor | None = None, metric: str = "cosine") -> Tensor:
    r"""Distances between points, or between their representations.

    Args:
        points: (n, ...); everything after the first dimension is one vector.
        points2: (m, ...); the same set if left out.
        metric: "cosine", $1 - x \cdot x' / (\|x\| \|x'\|)$ in [0, 2] (Fort et al., v3); "similarity", the cosine itself
            (v1's "dot product distance", one at the same place); "l2" or "l1", norms of $x - x'$.

    Returns:
        float64, (n, m), on the CPU; NaN where a cosine is taken of a point whose norm is zero.

    Raises:
        ValueError: an unknown metric, with the known ones.

    """
    if metric not in METRICS:
        raise ValueError(f"distance {metric!r} is unknown; known are {', '.join(METRICS)}")
    x = points.detach().flatten(1).double().cpu()
    x2 = x if points2 is None else points2.detach().flatten(1).double().cpu()
    if metric in ("l2", "l1"):
        return torch.cdist(x, x2, p=float(metric[1]), compute_mode="donot_use_mm_for_euclid_dist")
    unit, unit2 = ((v / v.norm(dim=1, keepdim=True)) for v in (x, x2))  # 0 / 0 is NaN, as it should be
    similarity = (unit @ unit2.T).clamp(-1, 1)
    return similarity if metric == "similarity" else 1 - similarity


def representations(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What each layer with weights is given, by "input", "layer 1", ..., and the logits, "output"; in eval mode.

    Args:
        model: in which each linear or convolutional layer is called once; or with a method `representations`, which
            then is asked.
        inputs: (n, ...).

    Returns:
        Tensors (n, ...), from the input, which the first layer is given, to the output. "layer 1" is what the first
        layer's units say after their non-linearity, that is, what the second layer is given.

    """
    if hasattr(model, "representations"):
        return model.representations(inputs)
    found: list[Tensor] = []
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [
        module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    try:
        with undisturbed(model), torch.no_grad():
            output = model.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {"input": inputs} | {f"layer {k}": h for k, h in enumerate(found[1:], start=1)} | {"output": output}


def same_class(y: Labels, y2: Labels | None = None) -> Tensor:
    """Whether two points have the same label, (n, m)."""
    y, y2 = torch.as_tensor(y).cpu(), torch.as_tensor(y if y2 is None else y2).cpu()
    return y[:, None] == y2


def stiffness_by_distance(
    S: Tensor, D: Tensor, same: Tensor, edges: Sequence[float], fewest: int = FEWEST
) -> xr.Dataset:
    r"""Mean stiffness of pairs in bins of their distance: of one class, of different classes, and of all pairs.

    Args:
        S: stiffness, (n, m); pairs that are NaN are left out.
        D: distance, (n, m); pairs that are NaN are left out.
        same: whether the points are of one class, (n, m).
        edges: of the bins, ascending; what lies outside of them is left out, the last edge belongs to the last bin.
        fewest: pairs; a bin with fewer has no mean, and its count says so.

    Returns:
        As `pooled`.

    """
    return pooled(binned(S, D, same, edges), fewest)


def binned(S: Tensor, D: Tensor, same: Tensor, edges: Sequence[float]) -> xr.Dataset:
    """The means of pairs of one class and of different ones, without holes and without all pairs together.

    Args:
        S: stiffness, (..., n, m), in whatever measures and arithmetics; NaN in the same places.
        D: distance, (n, m), as for `stiffness_by_distance`.
        same: likewise.
        edges: likewise.

    Returns:
        A Dataset along pairs (the first two of `PAIRS`) and distance (the middle of each bin): `count`, and
        `stiffness`, with leading dimensions dim_0, ... as S has them; NaN in an empty bin.

    """
    edges = np.asarray(edges, dtype=float)
    if edges.ndim != 1 or len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ValueError("edges of bins must ascend, two of them at least")
    bins, leading = len(edges) - 1, S.shape[:-2]
    place = torch.bucketize(D.nan_to_num(-np.inf), torch.from_numpy(edges), right=True) - 1
    place[edges[-1] == D] = bins - 1
    here = ~(S.flatten(end_dim=-3)[0] if leading else S).isnan() & ~D.isnan() & (place >= 0) & (place < bins)
    kind = place[here] + bins * (~same[here]).long()
    count = torch.bincount(kind, minlength=2 * bins).double()
    sums = [torch.bincount(kind, weights=values[here], minlength=2 * bins) for values in S.reshape(-1, *S.shape[-2:])]
    means = (torch.stack(sums) / count).reshape(*leading, 2, bins)
    return xr.Dataset(
        {
            "stiffness": ((*(f"dim_{k}" for k in range(len(leading))), "pairs", "distance"), means.numpy()),
            "count": (("pairs", "distance"), count.long().reshape(2, bins).numpy()),
        },
        {"pairs": list(PAIRS[:2]), "distance": (edges[1:] + edges[:-1]) / 2},
    )


def pooled(curves: xr.Dataset, fewest: int = FEWEST) -> xr.Dataset:
    r"""Add all pairs together to binned curves, what classes alone would give them, and holes.

    Args:
        curves: `stiffness` and `count` as `binned` has them.
        fewest: pairs; a bin with fewer has no mean.

    Returns:
        A Dataset along pairs (`PAIRS`) and distance: `stiffness`, NaN in a hole, and `count`. `null` (distance): what
        all pairs would give if neither kind depended on distance, $P(\text{same} \mid d)\, W + (1 - P)\, B$ with the
        means W and B of each kind. Data less null is what distance does beyond the composition of a bin by classes.

    """
    count, means = curves["count"], curves.stiffness.fillna(0.0)
    every = count.sum("pairs")
    share = count / every.where(every > 0)
    whole = (means * count).sum("distance") / count.sum("distance")
    all_pairs = (means * share).sum("pairs", min_count=1).expand_dims(pairs=[PAIRS[2]])
    counts = xr.concat([count, every.expand_dims(pairs=[PAIRS[2]])], "pairs")
    values = xr.concat([means, all_pairs], "pairs").transpose(*curves.stiffness.dims)
    return xr.Dataset(
        {
            "stiffness": values.where(counts >= fewest),
            "count": counts,
            "null": (share * whole.fillna(0.0)).sum("pairs").where(every >= fewest),
        }
    )


@dataclass(frozen=True)
class Length:
    """A critical length, or the bound that is known of it.

    Attributes:
        value: the length; where it is censored, the bound; NaN where there is nothing to say.
        low, high: its 95 % interval; infinite on a side that the observed distances do not bound, NaN where none was
            asked for.
        censored: "" for a length; "above" where stiffness is positive at every observed distance, so that the length is
            larger than `value`; "below" where it is at none; "rising" where it goes from harm to help; "unknown" where
            there are too few pairs, or none.

    """

    value: float
    low: float = np.nan
    high: float = np.nan
    censored: str = ""


def crossing(curve: xr.DataArray, level: float = 0.0) -> Length:
    """Where a binned curve first falls to a level, going away from the same place; straight lines between bins.

    Args:
        curve: along `distance`, in the order in which places move away: for similarities from one down. Holes (NaN) are
            bridged.
        level: that is crossed.

    Returns:
        The length; censored at the last bin where the curve stays above, and at the first where it begins below.

    """
    found = crossings(curve - level)
    return Length(float(found.value), censored=str(found.censored.values))


def crossings(curves: xr.DataArray) -> xr.Dataset:
    """Where each of many curves first falls to zero, as `crossing` has it: `value` and `censored`."""
    v = curves.transpose(..., "distance").values
    d, last, known = curves.distance.values, v.shape[-1] - 1, ~np.isnan(v)
    place = np.arange(v.shape[-1])
    before = np.maximum.accumulate(np.where(known, place, -1), axis=-1)  # the last known bin so far
    fallen = np.where(known, v <= 0, False)
    first, end = (np.argmax(known, axis=-1), last - np.argmax(known[..., ::-1], axis=-1))
    k = np.argmax(fallen, axis=-1)
    j = np.maximum(np.take_along_axis(before, np.maximum(k - 1, 0)[..., None], -1)[..., 0], 0)
    high, low = (np.take_along_axis(v, i[..., None], -1)[..., 0] for i in (j, k))
    with np.errstate(invalid="ignore", divide="ignore"):
        zero = d[j] + (d[k] - d[j]) * high / (high - low)
    none, below, above = ~known.any(axis=-1), fallen.any(axis=-1) & (k == first), ~fallen.any(axis=-1)
    cases = [none, below, above]
    dims = [name for name in curves.dims if name != "distance"]
    coords = {name: c for name, c in curves.coords.items() if "distance" not in c.dims}
    value = np.select(cases, [np.nan, d[first], d[end]], zero)
    return xr.Dataset(
        {"value": (dims, value), "censored": (dims, np.select(cases, ["unknown", "below", "above"], ""))}, coords
    )


def half_decay(curve: xr.DataArray) -> Length:
    """The distance at which a binned curve has fallen to half of its first value; it exists without a zero."""
    first = curve.dropna("distance")
    return crossing(curve, float(first[0]) / 2 if len(first) else 0.0)


@dataclass(frozen=True)
class Line:
    r"""Stiffness as a line in distance, $S = a + b\, d$, by least squares over pairs.

    Attributes:
        intercept, slope: a and b.
        covariance: of both, (2, 2), from the jackknife over points.
        points: behind it.
        shortest, longest: observed distances.

    """

    intercept: float
    slope: float
    covariance: np.ndarray
    points: int
    shortest: float
    longest: float


def fitted_line(S: Tensor, D: Tensor, chosen: Tensor, *, symmetric: bool) -> Line:
    r"""Fit a line to the stiffness of pairs (Fort et al., v3), with a covariance that knows that pairs share points.

    The jackknife leaves out one point at a time, with all of its pairs: $\widehat{\mathrm{Cov}} = \frac{n-1}{n} \sum_i
    (\theta_{(i)} - \bar\theta)(\theta_{(i)} - \bar\theta)^\top$.

    Args:
        S: stiffness, (n, m), NaN pairs left out.
        D: distance, (n, m), likewise.
        chosen: which pairs, (n, m).
        symmetric: rows and columns are the same points, so that a point leaves with its row and its column; otherwise
            rows and columns are different points.

    """
    here = (chosen & ~(S.isnan() | D.isnan())).double()
    d, s = D.nan_to_num(0.0) * here, S.nan_to_num(0.0) * here
    moments = torch.stack([here, d, d * d, s, d * s])  # of each pair: 1, d, d^2, s, d s
    total = moments.sum(dim=(1, 2))
    rows, columns = moments.sum(dim=2), moments.sum(dim=1)
    if symmetric:
        without = total[:, None] - rows - columns + torch.diagonal(moments, dim1=1, dim2=2)
    else:
        without = torch.cat([total[:, None] - rows, total[:, None] - columns], dim=1)
    touched = (rows[0] + columns[0] > 0) if symmetric else torch.cat([rows[0], columns[0]]) > 0
    left_out = torch.stack(_coefficients(without[:, touched]))
    n = left_out.shape[1]
    about = left_out - left_out.mean(dim=1, keepdim=True)
    a, b = (float(v) for v in _coefficients(total))
    observed = D[here.bool()]
    ends = (float(observed.min()), float(observed.max())) if len(observed) else (np.nan, np.nan)
    return Line(a, b, ((n - 1) / max(n, 1) * about @ about.T).numpy(), n, *ends)


def coefficients(S: Tensor, D: Tensor, members: Tensor) -> Tensor:
    """Intercepts and slopes of the lines through pairs of several kinds, by least squares, without their covariance.

    Args:
        S: stiffness, (..., n, m), NaN in the same places.
        D: distance, (n, m); pairs that are NaN are left out.
        members: which pairs are of each kind, (kinds, n, m).

    Returns:
        float64, (..., kinds, 2); NaN where a line is not determined.

    """
    leading = S.shape[:-2]
    stiff = S.reshape(-1, *S.shape[-2:])
    here = members.any(dim=0) & ~D.isnan() & ~stiff[0].isnan()
    d, s, kinds = D[here], stiff[:, here], members[:, here].double()
    one, first, second = (kinds @ power for power in (torch.ones_like(d), d, d * d))
    a, b = _coefficients((one, first, second, s @ kinds.T, (s * d) @ kinds.T))
    return torch.stack([a, b], dim=-1).reshape(*leading, len(members), 2)


def _coefficients(moments: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    one, d, dd, s, ds = moments
    slope = (one * ds - d * s) / (one * dd - d * d)
    return (s - slope * d) / one, slope


def zero_of_line(line: Line, level: float = 0.95) -> Length:
    r"""The distance $\xi = -a / b$ at which a line falls to zero, with Fieller's interval.

    The interval holds the $\xi$ with $(a + b \xi)^2 \le t^2\, \mathrm{Var}(a + b \xi)$, as far as they were observed:
    where the shortest, or the longest, observed distance is one of them, nothing bounds it on that side. A zero outside
    of the observed distances is none that was seen: it is censored at their end.
    """
    from scipy.special import stdtrit

    a, b, C, ends = line.intercept, line.slope, line.covariance, (line.shortest, line.longest)
    if line.points < 3 or not np.isfinite([a, b, *C.flat]).all():
        return Length(np.nan, censored="unknown")
    t = float(stdtrit(line.points - 1, (1 + level) / 2))
    q = [b * b - t * t * C[1, 1], 2 * (a * b - t * t * C[0, 1]), a * a - t * t * C[0, 0]]  # of xi^2, xi, 1
    roots = [float(r.real) for r in np.roots(q) if abs(r.imag) < 1e-12 and ends[0] < r.real < ends[1]]
    low, high = (np.polyval(q, end) <= 0 for end in ends)
    low = -np.inf if low else min(roots, default=ends[1])
    high = np.inf if high else max(roots, default=ends[0])
    near, far = (a + b * end > 0 for end in ends)
    if near and far:
        return Length(ends[1], low, np.inf, "above")
    if not near and not far:
        return Length(ends[0], -np.inf, high, "below")
    return Length(-a / b, low, high, "" if near else "rising")


def critical_length(S: Tensor, D: Tensor, same: Tensor, *, symmetric: bool, metric: str = "cosine") -> Length:
    """The third version's critical length: where the line through the pairs of one class is zero.

    Args:
        S: stiffness, (n, m), sign or cosine.
        D: distance, (n, m), NaN pairs left out.
        same: whether the points are of one class, (n, m).
        symmetric: rows and columns are the same points.
        metric: of D; a similarity is turned into a distance first.

    """
    D = 1 - D if metric == "similarity" else D
    return zero_of_line(fitted_line(S, D, same, symmetric=symmetric))


def each_class(measure: Callable[[Tensor], Length], y: Labels, y2: Labels | None = None) -> list[Length]:
    """A length of the pairs of each class by themselves: `measure` is given which pairs those are, (n, m)."""
    y, y2 = torch.as_tensor(y).cpu(), torch.as_tensor(y if y2 is None else y2).cpu()
    return [measure((y[:, None] == c) & (y2 == c)) for c in y.unique()]
