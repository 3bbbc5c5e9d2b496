"""What chapter 6 shows: stiffness against distance, and how far it reaches, by every definition in use."""

from itertools import product

import numpy as np
import pandas as pd
import xarray as xr

from stiffkit import claims
from stiffkit.distances import FEWEST, Length, Line, pooled, zero_of_line
from stiffkit.endpoints import PROTOCOLS, protocol_places, slope_a_decade
from stiffkit.lengths import DEFINITIONS, decay, logarithms
from stiffkit.rates import MEASURE_NAMES
from stiffkit.spaces import POOLED
from stiffkit.statistics import t_interval

FIRST_VERSION = {  # Fig 10, Fashion-MNIST at training loss 0.1, read off to about a tenth: 1 - similarity by space
    "input": (0.29, 0.29, 0.29, 0.29, 0.14),
    "layer 1": (0.15, 0.21, 0.36, 0.39, 0.44),
    "layer 2": (0.066, 0.117, 0.29, 0.54, 0.37),
    "layer 3": (0.041, 0.085, 0.26, 0.45, 0.30),
}


def curves(runs: xr.Dataset, place: str, rate: float, measure: str, arithmetic: str) -> xr.Dataset:
    """Stiffness against distance in every space with a cosine distance, mean over seeds: as `distances.pooled`."""
    spaces = [name for name in runs.space.values if "," not in name]
    here = runs.sel(at=place, learning_rate=rate, measure=measure, arithmetic=arithmetic, space=spaces)
    return pooled(here[["curve", "count"]].rename(curve="stiffness").mean("seed"), FEWEST)


def over_seeds(runs: xr.Dataset, place: str, rate: float, space: str, measure: str, arithmetic: str) -> Length:
    """The third version's critical length of several seeds, with Fieller's interval from how their lines differ."""
    here = runs.sel(at=place, learning_rate=rate, space=space)
    own = (
        here.line.sel(of=POOLED, measure=measure, arithmetic=arithmetic).transpose("seed", "coefficient").dropna("seed")
    )
    n = own.sizes["seed"]
    if not n:
        return Length(np.nan, censored="unknown")
    covariance = np.cov(own.values.T) / n if n > 1 else np.full((2, 2), np.nan)
    near, far = (float(here.observed.sel(end=end).mean("seed")) for end in ("near", "far"))
    a, b = (float(v) for v in own.mean("seed"))
    return zero_of_line(Line(a, b, covariance, n, near, far))


def multiverse(runs: xr.Dataset, arithmetic: str = "exact") -> pd.DataFrame:
    """Does the critical length fall as the learning rate rises? By definition, measure and space, in both protocols.

    Of lengths the slope of their logarithm a decade of rate, over the windows and rates where no seed is censored; of
    what always exists the slope itself: minus the decay, so that a fall is below zero throughout.
    """
    rows, definitions = {}, (*DEFINITIONS, "minus decay")
    whole = {
        (definition, measure, protocol): _whole(runs, definition, measure, arithmetic, protocol)
        for definition, measure, protocol in product(definitions, MEASURE_NAMES, PROTOCOLS)
    }
    for space in runs.space.values:
        for measure in MEASURE_NAMES:
            for definition in definitions:
                cells = {}
                for protocol in PROTOCOLS:
                    values = whole[definition, measure, protocol].sel(space=space)
                    slope = slope_a_decade(values).mean("at")
                    cells[protocol] = claims.over_seeds(slope)
                    cells[f"{protocol}: "] = _direction(slope)
                    cells[f"{protocol}, missing"] = f"{100 * float(values.isnull().mean()):.0f} %"
                rows[space, MEASURE_NAMES[measure], definition] = cells
    index = pd.MultiIndex.from_tuples(rows, names=["space", "stiffness", "definition"])
    return pd.DataFrame(list(rows.values()), index=index)


def _whole(runs: xr.Dataset, definition: str, measure: str, arithmetic: str, protocol: str) -> xr.DataArray:
    """What is compared between rates: (at, space, learning_rate, seed)."""
    here = runs.sel(at=protocol_places(runs, protocol))
    values = -decay(here) if definition == "minus decay" else logarithms(here, definition)
    return values.sel(measure=measure, arithmetic=arithmetic)


def _direction(slope: xr.DataArray) -> str:
    interval = t_interval(slope)
    low, high = float(interval.low), float(interval.high)
    if np.isnan(low):
        return "too few"
    return "falls" if high < 0 else "rises" if low > 0 else "unclear"


def recorded_sets(ledger: claims.Ledger) -> dict[str, xr.Dataset]:
    """Every set of runs of chapters 5 and 6 that is recorded, by its short title."""
    return claims.recorded_sets(ledger, ledger.of_chapter(5))
