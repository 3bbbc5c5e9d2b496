"""Critical lengths of runs by every definition in use, from the curves and lines that runs keep."""

import numpy as np
import xarray as xr

from stiffkit.distances import FEWEST, PAIRS, crossings, pooled
from stiffkit.spaces import POOLED

DEFINITIONS = {  # of the critical length
    "line": "zero of the line through pairs of one class (third version)",
    "each class": "the same for each class by itself, mean of their zeros",
    "first zero": "first zero of the binned curve of all pairs (first version)",
    "classes alone": "where that curve would first be zero if neither kind of pairs depended on distance",
    "first zero, one class": "first zero of the binned curve of pairs of one class",
    "half": "where the binned curve of pairs of one class has fallen to half of its first value",
}


def lengths(runs: xr.Dataset, definition: str) -> xr.Dataset:
    """The critical length by a definition, run by run, along at, space, arithmetic and measure.

    Returns:
        A Dataset with `value`, and how it is `censored`, as `distances.Length` has it.

    A line's zero beyond the distances at which 1 to 99 % of the pairs of one class lie was not seen: it is censored at
    that end. The mean over classes counts where every class has a zero.

    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition {definition!r} is unknown; known are {', '.join(DEFINITIONS)}")
    near, far = (runs.observed.sel(end=end, drop=True) for end in ("near", "far"))
    if definition == "line":
        return _zeros(runs.line.sel(of=POOLED), near, far)
    if definition == "each class":
        each = _zeros(runs.line.drop_sel(of=POOLED), near, far)
        whole = (each.censored == "").all("of")
        kind = xr.full_like(whole, "below", dtype=object)
        for one in ("rising", "above", "unknown"):
            kind = kind.where(~(each.censored == one).any("of"), one)
        return xr.Dataset({"value": each.value.mean("of"), "censored": kind.where(~whole, "")})
    every = pooled(runs[["curve", "count"]].rename(curve="stiffness"), FEWEST)
    if definition == "classes alone":
        return crossings(every.null)
    curve = every.stiffness.sel(pairs=PAIRS[2] if definition == "first zero" else PAIRS[0])
    if definition == "half":
        curve = curve - curve.isel(distance=curve.notnull().argmax("distance"), drop=True) / 2
    return crossings(curve)


def _zeros(line: xr.DataArray, near: xr.DataArray, far: xr.DataArray) -> xr.Dataset:
    a, b = line.sel(coefficient="intercept", drop=True), line.sel(coefficient="slope", drop=True)
    at_far, at_near = a + b * far > 0, a + b * near > 0
    above, below = at_far & at_near, ~at_far & ~at_near
    kind = xr.where(above, "above", xr.where(below, "below", xr.where(at_far, "rising", "")))
    value = xr.where(above, far, xr.where(below, near, -a / b))
    return xr.Dataset({"value": value, "censored": kind.where(a.notnull(), "unknown")})


def logarithms(runs: xr.Dataset, definition: str) -> xr.DataArray:
    """Decadic logarithms of lengths; NaN where one is censored or zero."""
    found = lengths(runs, definition)
    return np.log10(found.value.where((found.censored == "") & (found.value > 0)))


def decay(runs: xr.Dataset) -> xr.DataArray:
    r"""The reciprocal $-b / a = 1 / \xi$ of the third version's critical length, pairs of one class.

    It exists where the line has no zero in sight, and is zero where stiffness does not depend on distance.
    """
    line = runs.line.sel(of=POOLED)
    return -line.sel(coefficient="slope", drop=True) / line.sel(coefficient="intercept", drop=True)
