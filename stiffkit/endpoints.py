"""The quantities that claims are about: one number a run, from its curves.

Where `within` and `between` enter, the numbers keep the dimension `arithmetic`. An arithmetic that was not measured at
every checkpoint of a window is averaged over those where it was.
"""

import json
from collections.abc import Callable

import numpy as np
import xarray as xr

from stiffkit import windows
from stiffkit.attribution import PAIRS
from stiffkit.experiment import EARLY
from stiffkit.lengths import DEFINITIONS, decay, logarithms
from stiffkit.measurement import ARITHMETICS
from stiffkit.regimes import MEASURES, REGIMES
from stiffkit.spaces import POOLED
from stiffkit.statistics import all_alike, partial_mantel
from stiffkit.superclasses import superclass_of

WINDOWS = ("start", "early", "learning", "late", "last")
SMOOTH = 5  # checkpoints in the running mean that a turning point is looked for in
FAR_APART = 12  # as many checkpoints, or fewer, are too far apart for a running mean
PLACES = ("epoch 1", "end")  # of the windows of `stiffkit.windows`, those that every run has
PROTOCOLS = {"equal loss": "loss ", "equal epoch": "epoch "}  # how the windows of each are called
AROUND = 3.0  # epochs before and after the onset of overfitting that slopes are taken over


def window(runs: xr.Dataset, name: str) -> xr.Dataset:
    """The checkpoints of a window.

    * start: before training.
    * early: at 1,600 images, as v1's Fig 6, or at the checkpoint next to it.
    * learning: from the first epoch to three and a quarter, ten checkpoints of the standard schedule.
    * late: the last ten whole epochs, but none of the first half of the run; the last checkpoint where there is none.
    * last: the last checkpoint alone.
    """
    epochs = runs.epochs.mean("seed") if "seed" in runs.dims else runs.epochs
    last = np.floor(float(epochs.max()) + 0.01)
    chosen = {
        "start": epochs == 0,
        "early": abs(runs.images - EARLY) == abs(runs.images - EARLY).min(),
        "learning": (epochs > 0.99) & (epochs < 3.3),
        "late": (abs(epochs - epochs.round()) < 1e-3) & (epochs > max(last / 2, last - 9.5)),
        "last": epochs == epochs.max(),
    }[name]
    if name == "late" and not chosen.any():
        chosen = epochs == epochs.max()
    return runs.isel(images=chosen.values.nonzero()[0])


def has_learnt(runs: xr.Dataset) -> xr.DataArray:
    r"""Which seeds have learnt anything: whose training loss falls to 99 % of $\log K$, that of uniform answers."""
    uniform = np.log(len(json.loads(runs.attrs["classes"])))
    return runs.loss.sel(split="train", drop=True).min("images") < 0.99 * uniform


def has_overfitted(runs: xr.Dataset) -> xr.DataArray:
    """Which seeds overfit: whose validation loss is least before the late window, and 5 % above that at the end."""
    loss = runs.loss.sel(split="validation", drop=True)
    late = int(window(runs, "late").images[0])
    before, after = (loss.sel(images=part).min("images") for part in (slice(late - 1), slice(late, None)))
    return (before < after) & (loss.isel(images=-1) > 1.05 * before)


def level(runs: xr.Dataset, variable: str, measure: str, regime: str, at: str) -> xr.DataArray:
    """Mean over a window of `within`, `between`, or `diagonal`, which is within less between; `true_` by true class."""
    prefix = "true_" if variable.startswith("true_") else ""
    kinds = {kind: f"{prefix}{kind}" for kind in ("within", "between")}
    here = window(runs[[*kinds.values(), "epochs"]], at).sel(measure=measure, regime=regime)
    within, between = (here[name] for name in kinds.values())
    values = {"within": within, "between": between, "diagonal": within - between}[variable.removeprefix(prefix)]
    return values.mean("images").where(_whole(here))


def change(runs: xr.Dataset, variable: str, measure: str, regime: str, at: str, since: str) -> xr.DataArray:
    """The level in one window less that in another."""
    return level(runs, variable, measure, regime, at) - level(runs, variable, measure, regime, since)


def ratio(runs: xr.Dataset, variable: str, measure: str, regime: str, at: str, since: str) -> xr.DataArray:
    """The level in one window over that in another."""
    return level(runs, variable, measure, regime, at) / level(runs, variable, measure, regime, since)


def arithmetics_apart(
    runs: xr.Dataset, variable: str, measure: str, regime: str, at: str, arithmetic: str
) -> xr.DataArray:
    """The level in exact arithmetic less that in another, at the same checkpoints."""
    both = runs[["within", "between"]]
    here = both.sel(arithmetic="exact", drop=True) - both.sel(arithmetic=arithmetic, drop=True)
    return level(here.assign(epochs=runs.epochs), variable, measure, regime, at)


def arithmetics_distance(
    runs: xr.Dataset, variable: str, measure: str, regime: str, at: str, arithmetic: str
) -> xr.DataArray:
    """The same in absolute value: how far another arithmetic moves the level, up or down."""
    return abs(arithmetics_apart(runs, variable, measure, regime, at, arithmetic))


def greatest(runs: xr.Dataset, variable: str, measure: str, regime: str) -> xr.DataArray:
    """The greatest running mean of `within` or `between` at any time, over the checkpoints that were measured."""
    values = runs[variable].sel(measure=measure, regime=regime)
    each = [smoothed(values.sel(arithmetic=a).dropna("images", how="all")).max("images") for a in values.arithmetic]
    return xr.concat(each, "arithmetic")


def coherence_rise(runs: xr.Dataset, part: str) -> xr.DataArray:
    """The greatest running mean of m-coherence over its value before training."""
    values = runs.coherence.sel(part=part)
    return smoothed(values).max("images") / values.isel(images=0)


def superclass_excess(runs: xr.Dataset, measure: str, regime: str, at: str) -> xr.DataArray:
    """Stiffness between classes of one superclass less that between classes of different ones, exact gradients."""
    return _excess(runs, "", measure, regime, at)


def realm_excess(runs: xr.Dataset, measure: str, regime: str, at: str) -> xr.DataArray:
    """The same for realms, among classes of different superclasses."""
    return _excess(runs, "realm_", measure, regime, at)


def _excess(runs: xr.Dataset, prefix: str, measure: str, regime: str, at: str) -> xr.DataArray:
    here = runs.sel(arithmetic="exact", measure=measure, regime=regime)
    return _mean(here[f"{prefix}related"] - here[f"{prefix}unrelated"], runs, at)


def beyond_inputs(runs: xr.Dataset, measure: str, regime: str, at: str) -> xr.DataArray:
    """What superclasses explain of a class matrix beyond the inputs' similarity and the matrix before training.

    The partial correlation of `partial_mantel`, run by run, exact gradients; NaN where all cells are alike.
    """
    groups = superclass_of(json.loads(runs.attrs["classes"]))
    C = runs.stiffness.sel(arithmetic="exact", measure=measure, regime=regime)
    late, start = (
        window(C.to_dataset(name="C").assign(epochs=runs.epochs), w).C.isel(images=-1) for w in (at, "start")
    )
    inputs = runs.input_similarity.sel(regime=regime)
    found = []
    for seed in runs.seed.values:
        own, *controls = (matrix.sel(seed=seed) for matrix in (late, inputs, start))
        test = None if all_alike(own) else partial_mantel(own, groups, controls, permutations=2)
        found.append(np.nan if test is None else float(test.observed))
    return xr.DataArray(found, {"seed": runs.seed.values})


def least_of_last_layer(runs: xr.Dataset, measure: str, regime: str) -> xr.DataArray:
    """The least stiffness within classes that the last layer's exact gradients have at any checkpoint."""
    return _layer(runs, "last").sel(measure=measure, regime=regime).min("images")


def layer_change(runs: xr.Dataset, layer: str, measure: str, regime: str, at: str, since: str) -> xr.DataArray:
    """Stiffness within classes of the first or the last layer's exact gradients: one window less another."""
    values = _layer(runs, layer).sel(measure=measure, regime=regime)
    return _mean(values, runs, at) - _mean(values, runs, since)


def _layer(runs: xr.Dataset, layer: str) -> xr.DataArray:
    return runs.layer_within.dropna("layer", how="all").isel(layer={"first": 0, "last": -1}[layer], drop=True)


def pair_change(runs: xr.Dataset, rightness: str, measure: str, regime: str, at: str, since: str) -> xr.DataArray:
    """Exact stiffness within classes over pairs that are classified rightly, or not: one window less another."""
    values = runs.pair_within.sel(rightness=rightness, measure=measure, regime=regime)
    return _mean(values, runs, at) - _mean(values, runs, since)


def _mean(values: xr.DataArray, runs: xr.Dataset, name: str) -> xr.DataArray:
    here = window(values.to_dataset(name="values").assign(epochs=runs.epochs), name)
    return here["values"].mean("images").where(_whole(here))


def _whole(here: xr.Dataset) -> xr.DataArray:
    """Which seeds have all checkpoints of a window: a run that ended within it has no level."""
    return here.epochs.notnull().all("images")


def clipped_prediction(runs: xr.Dataset, regime: str, by: str) -> xr.DataArray:
    r"""What a clipped loss must give within classes, by sign: the exact value times the share of unclipped pairs.

    A pair counts where neither point is clipped. With the shares u and u' of such points in both parts (the same for
    one part) the value is the exact one times $u u'$: with u the share of each class's points whose clipped gradient is
    not zero, and the product averaged over classes ("class"), or with u the share of all points whose logit gap is not
    above 16 ("all"). No parameter is free. Pairs of a point with itself are not taken out of $u^2$, which matters
    little from some 50 points a class on.
    """
    if by == "class":
        left = runs.unclipped.sel(arithmetic="keras2019", drop=True)
    else:
        left = (1 - runs.past_gap).expand_dims("class_a")
    first, second = (left.sel(part=part, drop=True) for part in regime.split("-"))
    exact = runs.within.sel(arithmetic="exact", measure="sign", regime=regime, drop=True)
    return exact * (first * second).mean("class_a")


def clipped_misfit(runs: xr.Dataset, regime: str, by: str) -> xr.DataArray:
    """The largest distance, at any checkpoint, of clipped stiffness within classes from `clipped_prediction`."""
    clipped = runs.within.sel(arithmetic="keras2019", measure="sign", regime=regime, drop=True)
    return abs(clipped - clipped_prediction(runs, regime, by)).max("images")


def regimes_apart(runs: xr.Dataset, measure: str, at: str) -> xr.DataArray:
    """The largest difference between two regimes, of within or of between."""
    here = window(runs[["within", "between", "epochs"]], at).sel(measure=measure)
    means = here[["within", "between"]].mean("images").to_dataarray()
    return (means.max("regime") - means.min("regime")).max("variable").where(_whole(here))


def larger_change(
    runs: xr.Dataset, variable: str, measure: str, than: str, regime: str, at: str, since: str
) -> xr.DataArray:
    """How much more one measure changes between two windows than the other, in absolute value."""
    a, b = (abs(change(runs, variable, m, regime, at, since)) for m in (measure, than))
    return a - b


def rate_slope(runs: xr.Dataset, variable: str, measure: str, regime: str, protocol: str) -> xr.DataArray:
    """How much `within` or `between` changes a decade of learning rate, at equal loss or at equal epoch.

    The mean of `slope_a_decade` over the stopping losses of the runs, or over their epochs 1, 2, 4, ...
    """
    return rate_slopes(runs[variable].sel(measure=measure, regime=regime), runs, protocol)


def rate_slopes(values: xr.DataArray, runs: xr.Dataset, protocol: str) -> xr.DataArray:
    """The same of any values along the checkpoints, rates and seeds of runs."""
    return slope_a_decade(windows.together(values, runs, protocol_places(runs, protocol))).mean("at")


def protocol_places(runs: xr.Dataset, protocol: str) -> list[str]:
    """The windows of runs that are at equal loss, or at equal epoch, by name."""
    return [str(name) for name in runs["at"].values if name.startswith(PROTOCOLS[protocol])]


def slope_a_decade(values: xr.DataArray) -> xr.DataArray:
    """The least-squares slope of values along `learning_rate` in its decadic logarithm, seed by seed.

    Only rates count for which every seed has a value, so that all seeds say it of the same rates; NaN where there are
    fewer than two.
    """
    there = values.notnull().all("seed")
    x = np.log10(values.learning_rate).where(there)
    x = x - x.mean("learning_rate")
    slope = (x * values).sum("learning_rate") / (x**2).sum("learning_rate")
    return slope.where(there.sum("learning_rate") >= 2)


def line_at_far(runs: xr.Dataset, space: str, measure: str, place: str) -> xr.DataArray:
    """The line through pairs of one class at the distance that 1 % of them exceed: below zero, it crosses in sight.

    The mean over the learning rates; in the window `place`.
    """
    here = runs.sel(at=place, space=space)
    line = here.line.sel(of=POOLED, measure=measure)
    far = here.observed.sel(end="far", drop=True)
    values = line.sel(coefficient="intercept", drop=True) + line.sel(coefficient="slope", drop=True) * far
    return values.mean("learning_rate")


def line_slope(runs: xr.Dataset, space: str, measure: str, place: str) -> xr.DataArray:
    """The slope of that line, mean over the learning rates."""
    line = runs.line.sel(at=place, space=space, of=POOLED, measure=measure)
    return line.sel(coefficient="slope", drop=True).mean("learning_rate")


def decay_change(runs: xr.Dataset, space: str, measure: str, place: str, since: str) -> xr.DataArray:
    """How much `lengths.decay`, one over the critical length, grows between two windows, mean over the rates."""
    found = decay(runs).sel(space=space, measure=measure)
    return (found.sel(at=place) - found.sel(at=since)).mean("learning_rate")


def decay_rate_slope(runs: xr.Dataset, space: str, measure: str, protocol: str) -> xr.DataArray:
    """How much the decay changes a decade of learning rate, mean over the stopping losses or the epochs."""
    found = decay(runs).sel(space=space, measure=measure, at=protocol_places(runs, protocol))
    return slope_a_decade(found).mean("at")


def length_rate_slope(runs: xr.Dataset, definition: str, space: str, measure: str, protocol: str) -> xr.DataArray:
    """How much the logarithm of a length changes a decade of learning rate, over the rates that no seed is censored at.

    The mean over the stopping losses or the epochs; "hidden": over the hidden layers as well.
    """
    here = runs.sel(at=protocol_places(runs, protocol), measure=measure)
    names = [str(n) for n in runs.space.values if n.startswith("layer")] if space == "hidden" else [space]
    return slope_a_decade(logarithms(here.sel(space=names), definition)).mean(["at", "space"])


def smoothed(values: xr.DataArray) -> xr.DataArray:
    """Running mean over five checkpoints; NaN for the first and the last two, whose neighbours are on one side alone.

    Values as they are where there are twelve checkpoints or fewer.
    """
    return values.rolling(images=SMOOTH, center=True).mean() if values.sizes["images"] > FAR_APART else values


def onset(runs: xr.Dataset, by: str = "loss") -> xr.DataArray:
    """Where overfitting begins, in images seen: at the least smoothed validation loss, or the greatest accuracy.

    NaN where that is the last smoothed value: the run has not come to overfit.
    """
    values = runs[by].sel(split="validation", drop=True)
    found, ends = turning_point(values, "min" if by == "loss" else "max"), smoothed(values).notnull()
    return found.where(found < ends.images.where(ends).max("images"))


def slope_change(runs: xr.Dataset, variable: str, measure: str, regime: str) -> xr.DataArray:
    """The slope an epoch in the three epochs after the onset, by loss, less that in the three epochs before."""
    values, epochs = runs[variable].sel(measure=measure, regime=regime), runs.epochs
    middle = _at(epochs, onset(runs))
    sides = (epochs >= middle - AROUND) & (epochs <= middle), (epochs >= middle) & (epochs <= middle + AROUND)
    before, after = (_slope(values.where(side), epochs) for side in sides)
    return after - before


def _slope(values: xr.DataArray, epochs: xr.DataArray) -> xr.DataArray:
    """Least squares along the checkpoints; NaN for fewer than three."""
    x = epochs.where(values.notnull())
    x = x - x.mean("images")
    slope = (x * values).sum("images") / (x**2).sum("images")
    return slope.where(values.notnull().sum("images") >= 3)


def turning_point(values: xr.DataArray, turn: str) -> xr.DataArray:
    """Where the running mean of a curve has its maximum ("max") or minimum ("min"), in images seen."""
    return {"max": smoothed(values).idxmax, "min": smoothed(values).idxmin}[turn]("images")


def stopping_excess(runs: xr.Dataset, signal: str, turn: str, measure: str = "", regime: str = "") -> xr.DataArray:
    """What stopping at a signal's turning point costs: validation loss there over the least one, less 1; running means.

    The turning point is the maximum or minimum of the signal's running mean; `train-train` signals and those from
    gradients of training points need no validation data.
    """
    values = runs[signal].sel(measure=measure, regime=regime) if measure else runs[signal]
    stop = turning_point(values, turn)
    loss = smoothed(runs.loss.sel(split="validation", drop=True))
    return _at(loss, stop) / loss.min("images") - 1


def _at(values: xr.DataArray, images: xr.DataArray) -> xr.DataArray:
    """The value at a checkpoint, NaN for none."""
    return values.where(values.images == images).max("images")


ALLOWED = {  # values of the arguments, so that a ledger can be checked without runs
    "variable": ("within", "between", "diagonal", "true_within", "true_between", "true_diagonal"),
    "measure": MEASURES,
    "than": MEASURES,
    "regime": REGIMES,
    "at": WINDOWS,
    "since": (*WINDOWS, *PLACES),
    "arithmetic": tuple(ARITHMETICS),
    "turn": ("max", "min"),
    "layer": ("first", "last"),
    "rightness": PAIRS,
    "by": ("class", "all"),
    "part": ("train", "val"),
    "protocol": tuple(PROTOCOLS),
    "place": PLACES,
    "space": ("input", "hidden", "output"),
    "definition": tuple(DEFINITIONS),
    "signal": ("within", "between", "gradient_norm", "mean_norm", "disparity"),
}
QUANTITIES: dict[str, Callable[..., xr.DataArray]] = {
    f.__name__: f
    for f in (
        level,
        change,
        ratio,
        arithmetics_apart,
        arithmetics_distance,
        greatest,
        coherence_rise,
        superclass_excess,
        realm_excess,
        beyond_inputs,
        least_of_last_layer,
        layer_change,
        pair_change,
        clipped_misfit,
        regimes_apart,
        larger_change,
        slope_change,
        stopping_excess,
        rate_slope,
        line_at_far,
        line_slope,
        decay_change,
        decay_rate_slope,
        length_rate_slope,
    )
}
