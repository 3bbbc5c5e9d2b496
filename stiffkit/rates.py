"""What chapter 5 shows: stiffness against the learning rate, at equal training loss and at equal epoch."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
import xarray as xr

from stiffkit import claims, windows
from stiffkit.chapters import LearningRate, Rates, rounded
from stiffkit.endpoints import PROTOCOLS, protocol_places, rate_slope, rate_slopes, slope_a_decade
from stiffkit.measurement import SPOKEN
from stiffkit.regimes import MEASURES, REGIMES
from stiffkit.statistics import t_interval

MEASURE_NAMES = {"cos": "cosine", "sign": "sign"}
GRID = np.geomspace(2, 1e-3, 60)  # losses that curves against the loss are drawn at


def results(p: Rates) -> xr.Dataset:
    """The runs of chapters 5 and 6, side by side along `learning_rate` and `seed`: recorded, cached, or computed now.

    Seeds of which a rate is missing are left out.

    Raises:
        TooLongError: before anything is computed, if that would take longer than `p.max_minutes`.
        ParameterError: if the runs are planned by the ledger and no seed has all of its rates.

    """
    p.allow()
    runs = p.found(p.experiments, "learning_rate", "seed")
    if runs is not None:
        rates = sorted({e.training.learning_rate for e in p.experiments})
        whole = runs.epochs.notnull().any("images").reindex(learning_rate=rates, fill_value=False).all("learning_rate")
        runs = runs.sel(seed=whole)
    if runs is None or not runs.sizes["seed"]:
        raise p.missing(f"seed of {p.dataset} with runs at all of these rates", chapter=5)
    return runs.assign_attrs(stopping=[float(name.split()[1]) for name in protocol_places(runs, "equal loss")])


def description(p: Rates, runs: xr.Dataset) -> str:
    """What is shown, and where it comes from, in a sentence."""
    training, points = p.experiments[0].training, p.experiments[0].measurement.points
    name = {"adam": "Adam", "sgd": "gradient descent"}[training.optimizer]
    seeds = runs.sizes["seed"]
    return (
        f"Shown here: `{training.dataset}`, network `{training.model}`, {name} at {runs.sizes['learning_rate']} "
        f"constant rates, {training.epochs:g} epochs, {seeds} {'seed' if seeds == 1 else 'seeds'} each, {points} + "
        f"{points} images ({runs.source})."
    )


def crossings(runs: xr.Dataset) -> pd.DataFrame:
    """When each rate comes to each stopping loss, in epochs, or why it is missing there."""
    rows: dict[str, dict[str, str]] = {}
    for place in protocol_places(runs, "equal loss"):
        epochs = windows.at(runs.epochs, runs, place)
        for rate in runs.learning_rate.values:
            own = epochs.sel(learning_rate=rate)
            rows.setdefault(f"{rate:g}", {})[place] = _when(runs.sel(learning_rate=rate), own, float(place.split()[1]))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("learning rate").rename_axis("epochs to", axis=1)


def _when(runs: xr.Dataset, epochs: xr.DataArray, loss: float) -> str:
    missing = [int(seed) for seed in runs.seed.values[epochs.isnull().values]]
    if not missing:
        return claims.over_seeds(epochs)
    end = windows.at(runs.loss.sel(split="train"), runs, "end").sel(seed=missing)
    who = "no seed" if len(missing) == runs.sizes["seed"] else f"not {claims.seeds_by_number(missing)}"
    if bool((end < loss).any()):
        return f"{who}: below it from the first window on"
    return f"{who}: {rounded(float(end.mean()), 3)} after {float(runs.epochs.max()):.3g} epochs"


def against_rate(runs: xr.Dataset, variable: str, regime: str, arithmetic: str) -> dict[str, dict[str, xr.DataArray]]:
    """Stiffness at equal loss and at equal epoch, (at, learning_rate, seed), by measure and protocol."""
    here = runs[variable].sel(regime=regime, arithmetic=arithmetic)
    return {
        f"{variable} classes, {MEASURE_NAMES[measure]}": {
            protocol: windows.together(here.sel(measure=measure), runs, protocol_places(runs, protocol))
            for protocol in PROTOCOLS
        }
        for measure in MEASURE_NAMES
    }


def against_loss(runs: xr.Dataset, variable: str, regime: str, arithmetic: str) -> dict[str, xr.DataArray]:
    """Stiffness against the training loss, (loss, learning_rate, seed), by measure."""
    here = runs[variable].sel(regime=regime, arithmetic=arithmetic)
    curves = [windows.at(here, runs, f"loss {loss:.6g}") for loss in GRID]
    together = xr.concat(curves, "loss").assign_coords(loss=GRID)
    return {name: together.sel(measure=measure) for measure, name in MEASURE_NAMES.items()}


def gaps(runs: xr.Dataset, part: str = "val") -> xr.DataArray:
    """Quantiles of the logit gap at equal loss, (at, learning_rate, seed, quantile)."""
    return windows.together(runs.gap.sel(part=part), runs, protocol_places(runs, "equal loss"))


def slopes(runs: xr.Dataset, variable: str, regime: str, arithmetic: str, measure: str, protocol: str) -> xr.DataArray:
    """The change a decade of learning rate, seed by seed, for each window of a protocol, (at, seed)."""
    values = runs[variable].sel(regime=regime, arithmetic=arithmetic, measure=measure)
    return slope_a_decade(windows.together(values, runs, protocol_places(runs, protocol)))


def forest(
    sets: Mapping[str, xr.Dataset], variable: str = "between", regime: str = "val-val", arithmetic: str = "exact"
) -> xr.Dataset:
    """Six rows where there are three sets: the change a decade of learning rate with its interval over seeds.

    Returns:
        A Dataset along row (set and protocol) and measure: `mean`, `low`, `high`.

    """
    found, rows = [], []
    if not sets:
        nothing = xr.DataArray(np.empty((0, 2)), {"row": [], "measure": list(MEASURE_NAMES)}, ("row", "measure"))
        return xr.Dataset({"mean": nothing, "low": nothing, "high": nothing})
    for title, runs in sets.items():
        for protocol in PROTOCOLS:
            each = [rate_slope(runs, variable, measure, regime, protocol) for measure in MEASURE_NAMES]
            own = [slope.sel(arithmetic=arithmetic) for slope in each]
            found.append(t_interval(xr.concat(own, "measure").assign_coords(measure=list(MEASURE_NAMES))))
            rows.append(f"{title}, {protocol}")
    return xr.concat(found, "row").assign_coords(row=rows)


def every_slope(sets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """The change a decade of learning rate in every combination: sets, protocols, regimes, arithmetics, measures."""
    rows = {}
    for title, runs in sets.items():
        for variable in ("between", "within"):
            slopes = {protocol: rate_slopes(runs[variable], runs, protocol) for protocol in PROTOCOLS}
            for regime, arithmetic in product(REGIMES, runs.arithmetic.values):
                rows[title, f"{variable} classes", regime, SPOKEN[str(arithmetic)]] = {
                    f"{name}, {protocol}": claims.over_seeds(
                        slopes[protocol].sel(measure=measure, regime=regime, arithmetic=arithmetic), 3
                    )
                    for (measure, name), protocol in product(MEASURE_NAMES.items(), PROTOCOLS)
                }
    index = pd.MultiIndex.from_tuples(rows, names=["runs", "pairs", "regime", "arithmetic"])
    return pd.DataFrame(list(rows.values()), index=index)


def by_loss(runs: xr.Dataset, regime: str, arithmetic: str) -> pd.DataFrame:
    """The change a decade of learning rate at each stopping loss and epoch, and which rates it rests on."""
    rows = {}
    for protocol in PROTOCOLS:
        cells = {m: slopes(runs, "between", regime, arithmetic, m, protocol) for m in MEASURES}
        values = windows.together(
            runs.between.isel(regime=0, measure=0, arithmetic=0), runs, protocol_places(runs, protocol)
        )
        for place in cells["sign"]["at"].values:
            whole = values.sel(at=place).notnull().all("seed")
            rows[str(place)] = {MEASURE_NAMES[m]: claims.over_seeds(cells[m].sel(at=place), 3) for m in MEASURE_NAMES}
            rows[str(place)]["rates"] = ", ".join(f"{r:g}" for r in whole.learning_rate.values[whole.values])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("between classes")


def recorded_sets(ledger: claims.Ledger, optimizer: str = "") -> dict[str, xr.Dataset]:
    """Every set of runs of this chapter that is recorded, or those of one optimiser, by its short title."""
    names = ledger.of_chapter(LearningRate.number)
    own = [n for n in names if optimizer in ("", ledger.runs[n].experiments()[0].training.optimizer)]
    return claims.recorded_sets(ledger, own)
