"""What chapter 6 shows: stiffness against distance, and how far it reaches, by every definition in use."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import xarray as xr

from stiffkit import claims
from stiffkit.chapters import CriticalLength
from stiffkit.distances import FEWEST, Length, Line, pooled, zero_of_line
from stiffkit.endpoints import PROTOCOLS, protocol_places, slope_a_decade
from stiffkit.lengths import DEFINITIONS, decay, lengths, logarithms
from stiffkit.rates import MEASURE_NAMES
from stiffkit.spaces import POOLED
from stiffkit.statistics import t_interval

FIRST_VERSION = {  # Fig 10, Fashion-MNIST at training loss 0.1, read off to about a tenth: 1 - similarity by space
    "input": (0.29, 0.29, 0.29, 0.29, 0.14),
    "layer 1": (0.15, 0.21, 0.36, 0.39, 0.44),
    "layer 2": (0.066, 0.117, 0.29, 0.54, 0.37),
    "layer 3": (0.041, 0.085, 0.26, 0.45, 0.30),
}
FIRST_VERSION_RUNS = "fashion_mnist_rates"  # whose data set, optimiser and rates those are
SHOWN = 0.005  # a slope that is less is printed as zero


def curves(runs: xr.Dataset, place: str, rate: float, measure: str, arithmetic: str) -> xr.Dataset:
    """Stiffness against distance in every space with a cosine distance, mean over seeds: as `distances.pooled`."""
    spaces = [name for name in runs.space.values if "," not in name]
    here = runs.sel(at=place, learning_rate=rate, measure=measure, arithmetic=arithmetic, space=spaces)
    return pooled(here[["curve", "count"]].rename(curve="stiffness").mean("seed"), FEWEST)


def of_gradient_layers(p: CriticalLength) -> xr.Dataset | None:
    """Each layer's gradients by themselves, and the whole, against distance in the chosen space, at the end.

    Returns:
        `stiffness` along layer, measure, pairs and distance, mean over seeds, as `distances.pooled` has it; None where
        no such run is there.

    """
    runs = p.found(p.of_layers)
    if runs is None:
        return None
    here = runs.isel(images=-1).sel(space=p.space)
    names = [f"layer {k}" for k in here.layer.values]
    own = here.layer_curve.assign_coords(layer=names)
    every = xr.concat([own, here.curve.sel(arithmetic="exact", drop=True).expand_dims(layer=["whole"])], "layer")
    return pooled(xr.Dataset({"stiffness": every, "count": here["count"]}).mean("seed"), FEWEST)


def over_seeds(runs: xr.Dataset, definition: str, measure: str, arithmetic: str = "exact") -> xr.Dataset:
    """Lengths of all seeds together, (at, space, learning_rate).

    Returns:
        A Dataset with `value`, `low` and `high`, the geometric mean and a 95 % t interval of the logarithms, and
        `censored`, where one of the seeds is: `value` is then the mean of lengths and bounds, itself a bound, without
        an interval. The third version's length is that of the mean line, with Fieller's interval from how three or
        more seeds' lines differ.

    """
    here = runs.sel(measure=measure, arithmetic=arithmetic)
    if definition == "line":
        return _of_mean_lines(here)
    found = lengths(here, definition)
    kinds = [kind for kind in ("unknown", "rising", "below", "above") if (found.censored == kind).any()]
    censored = xr.full_like(found.censored.isel(seed=0, drop=True), "", dtype=object)
    for kind in kinds:
        censored = censored.where(~(found.censored == kind).any("seed"), kind)
    interval = np.exp(t_interval(np.log(found.value.where(found.value > 0))))
    ends = interval[["low", "high"]].where(censored == "")
    return xr.Dataset({"value": interval["mean"], "censored": censored}).assign(ends)


def _of_mean_lines(runs: xr.Dataset) -> xr.Dataset:
    line = runs.line.sel(of=POOLED)
    rest = [name for name in line.dims if name not in ("seed", "coefficient")]
    places = line.stack(place=rest).transpose("place", "seed", "coefficient")
    ends = runs.observed.mean("seed").stack(place=rest).transpose("place", "end")
    found = [_of_mean_line(own.values, seen.values) for own, seen in zip(places, ends, strict=True)]
    columns = {name: ("place", [getattr(one, name) for one in found]) for name in ("value", "low", "high", "censored")}
    return xr.Dataset(columns, places.place.coords).unstack("place")


def _of_mean_line(lines: np.ndarray, observed: np.ndarray) -> Length:
    """The zero of the mean of lines, (seeds, 2), within observed distances, and its interval as far as it was seen."""
    known = lines[np.isfinite(lines).all(axis=1)]
    n = len(known)
    if not n:
        return Length(np.nan, censored="unknown")
    a, b = known.mean(axis=0)
    covariance = np.cov(known.T) / n if n > 2 else np.zeros((2, 2))
    found = zero_of_line(Line(a, b, covariance, max(n, 3), *observed))
    if n < 3:  # nothing is known of how the seeds differ
        return replace(found, low=np.nan, high=np.nan)
    return replace(found, low=max(found.low, observed[0]), high=min(found.high, observed[1]))


def against_rate(runs: xr.Dataset, arithmetic: str = "exact") -> xr.Dataset:
    """The first version's domain sizes at equal loss, in spaces with a cosine distance, as `over_seeds` has them.

    With `alone`: what classes alone would give, NaN where they give no zero.
    """
    spaces = [name for name in runs.space.values if "," not in name]
    here = runs.sel(at=protocol_places(runs, "equal loss"), space=spaces)
    alone = over_seeds(here, "classes alone", "sign", arithmetic)
    return over_seeds(here, "first zero", "sign", arithmetic).assign(alone=alone.value.where(alone.censored == ""))


def beside_first_version(ledger: claims.Ledger) -> xr.Dataset | None:
    """Domain sizes of the recorded Fashion-MNIST runs, in the spaces of which `FIRST_VERSION` has values."""
    runs = claims.recorded_runs(ledger, [FIRST_VERSION_RUNS]).get(FIRST_VERSION_RUNS)
    return None if runs is None else against_rate(runs).sel(space=list(FIRST_VERSION))


def decays(sets: Mapping[str, xr.Dataset]) -> dict[str, dict[str, xr.DataArray]]:
    """The decay with input distance of the cosine within classes, (at, learning_rate, seed), by set and protocol."""
    found = {}
    for title, runs in sets.items():
        own = decay(runs).sel(space="input", measure="cos", arithmetic="exact")
        found[f"decay, {title}"] = {protocol: own.sel(at=protocol_places(runs, protocol)) for protocol in PROTOCOLS}
    return found


def through_epochs(
    runs: xr.Dataset, space: str, definition: str, measure: str, arithmetic: str = "exact"
) -> dict[str, xr.Dataset]:
    """Against the epoch, (epochs, learning_rate): the length, the decay, and the distance of half, by title."""
    places = protocol_places(runs, "equal epoch")
    here = runs.sel(at=places, space=[space])
    reciprocal = t_interval(decay(here).sel(measure=measure, arithmetic=arithmetic)).rename(mean="value")
    found = {
        f"critical length, {definition}": over_seeds(here, definition, measure, arithmetic),
        "decay, one over the line's zero": reciprocal.assign(censored=xr.full_like(reciprocal.value, "", dtype=object)),
        "half of the first value": over_seeds(here, "half", measure, arithmetic),
    }
    epochs = [float(name.split()[1]) for name in places]
    return {
        title: one.isel(space=0, drop=True).assign_coords(at=epochs).rename(at="epochs") for title, one in found.items()
    }


def line_by_line(runs: xr.Dataset, space: str, measure: str, arithmetic: str = "exact") -> pd.DataFrame:
    """Intercept and slope, whose ratio is the decay, of the line through pairs of one class: a row a rate."""
    own = runs.line.sel(of=POOLED, space=space, measure=measure, arithmetic=arithmetic)
    places = [place for protocol in PROTOCOLS for place in protocol_places(runs, protocol)]
    rows = {
        (name, f"{rate:g}"): {p: claims.over_seeds(own.sel(coefficient=name, learning_rate=rate, at=p)) for p in places}
        for name, rate in product(("intercept", "slope"), runs.learning_rate.values)
    }
    index = pd.MultiIndex.from_tuples(rows, names=["", "learning rate"])
    return pd.DataFrame(list(rows.values()), index=index)


def multiverse(runs: xr.Dataset, arithmetic: str = "exact") -> pd.DataFrame:
    """Does the critical length fall as the learning rate rises? By definition, measure and space, in both protocols.

    Of lengths the slope of their logarithm a decade of rate, over the windows and rates where no seed is censored; of
    what always exists the slope itself: minus the decay, so that a fall is below zero throughout. "No value" is the
    share of windows, rates and seeds without one: the loss was not reached, or no zero was seen.
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
                    cells[f"{protocol}: it"] = _direction(slope)
                    cells[f"{protocol}, no value"] = f"{100 * float(values.isnull().mean()):.0f} %"
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
    if max(abs(low), abs(high)) < SHOWN:
        return "stays"
    return "falls" if high < 0 else "rises" if low > 0 else "unclear"


def recorded_sets(ledger: claims.Ledger) -> dict[str, xr.Dataset]:
    """Every set of runs of chapters 5 and 6 that is recorded, by its short title."""
    return claims.recorded_sets(ledger, ledger.of_chapter(5))
