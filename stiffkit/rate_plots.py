"""The figures of chapters 5 and 6, one function each: data first, axes last and returned, nothing shown."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.ticker import LogLocator, NullLocator

from stiffkit.distances import crossing
from stiffkit.statistics import t_interval
from stiffkit.style import BLUE, GREEN, GREY, ORANGE, WIDTH, in_a_row, legend_above, shades, styled

NOTHING = "no recorded run"
PAIRS = {"same class": (GREEN, "-."), "different classes": (ORANGE, "--"), "all": (BLUE, "-")}


@styled
def against_rate(panels: Mapping[str, Mapping[str, xr.DataArray]], axes: Any = None) -> np.ndarray:
    """Values against the learning rate with 95 % t intervals over seeds, a curve a window.

    Args:
        panels: {name: {protocol: values (at, learning_rate, seed)}}; a row a name, a column a protocol.
        axes: (rows, columns) of them; made if left out.

    Returns:
        The axes. A rate of which a seed has no such window is left out of that curve.

    """
    columns = len(next(iter(panels.values()))) if panels else 1
    alike = len({_shown(protocols) for protocols in panels.values()}) == 1
    if axes is None:
        size = (WIDTH, 0.8 + (2.3 if alike else 3.2) * max(len(panels), 1))
        options = {"figsize": size, "sharex": alike or "row", "sharey": "row", "squeeze": False}
        _, axes = plt.subplots(max(len(panels), 1), columns, **options)
    axes = np.reshape(axes, (-1, columns))
    for row, (name, protocols) in zip(axes, panels.items(), strict=False):
        for ax, (protocol, values) in zip(row, protocols.items(), strict=True):
            _windows(ax, values)
            ax.set_title(protocol if name == next(iter(panels)) else "")
            if not alike or name == list(panels)[-1]:
                _rates(ax, values.learning_rate.values)
                ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.4), ncols=2)
        row[0].set_ylabel(fill(name, 24))
    for ax in axes.flat if not panels else ():
        ax.set_title(NOTHING)
    return axes


def _shown(protocols: Mapping[str, xr.DataArray]) -> tuple:
    """The windows and rates of a row's panels."""
    return tuple((*values["at"].values, *values.learning_rate.values) for values in protocols.values())


def _windows(ax: Any, values: xr.DataArray) -> None:
    colours, sides = shades("viridis", values.sizes["at"]), _sides(values.sizes["at"])
    for k, (colour, side, place) in enumerate(zip(colours, sides, values["at"].values, strict=True)):
        whole = values.sel(at=place).dropna("learning_rate", how="any")
        interval, x = t_interval(whole), whole.learning_rate * side
        look = {"color": colour, "marker": "osD^v<"[k % 6], "markersize": 4, "linewidth": 1.2, "label": str(place)}
        ax.plot(x, interval["mean"], "-", **look)
        ax.vlines(x, interval.low, interval.high, color=colour, linewidth=1.2)
    ax.axhline(0, color=GREY, linewidth=0.7)
    ax.set_xscale("log")


def _sides(n: int) -> np.ndarray:
    """Factors that put n points of one place on a logarithmic axis side by side."""
    return 1.07 ** (np.arange(n) - (n - 1) / 2)


def _rates(ax: Any, rates: np.ndarray) -> None:
    """A logarithmic axis whose ticks are the learning rates themselves."""
    ax.set(xscale="log", xlabel="learning rate", xlim=(rates.min() / 1.4, rates.max() * 1.4))
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=60, fontsize=8)
    ax.set_xticks([], minor=True)


@styled
def against_loss(panels: Mapping[str, xr.DataArray], losses: Sequence[float] = (), axes: Any = None) -> np.ndarray:
    """Stiffness against the training loss, which falls to the right, a curve a learning rate, mean and band over seeds.

    Args:
        panels: {measure: values (loss, learning_rate, seed)}.
        losses: stopping losses, which are marked.
        axes: one a panel; made if left out.

    """
    axes = in_a_row(axes, len(panels), 3.2)
    for ax, (measure, values) in zip(axes, panels.items(), strict=True):
        for colour, rate in _by_rate(values):
            whole = values.sel(learning_rate=rate).dropna("loss", how="any")
            interval = t_interval(whole)
            ax.plot(whole.loss, interval["mean"], color=colour, linewidth=1.4, label=f"{rate:g}")
            ax.fill_between(whole.loss, interval.low, interval.high, color=colour, alpha=0.2, linewidth=0)
        for loss in losses:
            ax.axvline(loss, color=GREY, linewidth=0.7, linestyle=":")
        ax.axhline(0, color=GREY, linewidth=0.7)
        known = values.loss.where(values.notnull().any(["learning_rate", "seed"]))
        ax.set(xscale="log", xlabel="training loss", title=measure)
        ax.set_xlim(float(known.max()) * 1.1, float(known.min()) / 1.1)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("stiffness between classes")
    legend_above(axes[0], 5, title="learning rate")
    return axes


@styled
def forest(estimates: xr.Dataset, xlabel: str, axes: Any = None) -> np.ndarray:
    """Means with intervals, a line a row: cosines in the first panel, signs in the second, each on its own scale.

    Args:
        estimates: `mean`, `low`, `high` along row and measure ("cos", "sign").
        xlabel: what they are.
        axes: two; made if left out.

    """
    axes = in_a_row(axes, 2, 1.1 + 0.35 * estimates.sizes["row"], sharey=True)
    places = np.arange(estimates.sizes["row"])[::-1]
    for ax, (measure, title) in zip(axes, {"cos": "cosine", "sign": "sign"}.items(), strict=True):
        own = estimates.sel(measure=measure)
        ax.hlines(places, own.low, own.high, color=BLUE, linewidth=1.6)
        ax.scatter(own["mean"], places, 28, color=BLUE, zorder=3)
        ax.axvline(0, color=GREY, linewidth=0.7)
        ax.set(title=title if len(places) else NOTHING, ylim=(-0.6, max(len(places), 1) - 0.4))
    axes[0].set_yticks(places, [fill(row, 24) for row in estimates.row.values], fontsize=8)
    axes[0].figure.supxlabel(xlabel, fontsize="medium")
    return axes


@styled
def quantiles_at_loss(gaps: xr.DataArray, axes: Any = None) -> np.ndarray:
    """Quantiles of the logit gap against the learning rate, a panel a stopping loss: median, quartiles, 5 and 95 %.

    Args:
        gaps: (at, learning_rate, seed, quantile).
        axes: one a window; made if left out.

    """
    axes = in_a_row(axes, gaps.sizes["at"], 2.6, sharey=True)
    rates = gaps.learning_rate.values
    for ax, place in zip(axes, gaps["at"].values, strict=True):
        own = gaps.sel(at=place).dropna("learning_rate", how="any").mean("seed")
        for low, high, alpha in ((0.05, 0.95, 0.2), (0.25, 0.75, 0.35)):
            ends = (own.sel(quantile=q) for q in (low, high))
            look = {"color": BLUE, "alpha": alpha, "linewidth": 0, "label": f"{100 * low:.0f} to {100 * high:.0f} %"}
            ax.fill_between(own.learning_rate, *ends, **look)
        ax.plot(own.learning_rate, own.sel(quantile=0.5), "o-", color=BLUE, markersize=3, label="median")
        ax.axhline(16, color=ORANGE, linestyle=":", linewidth=1, label="16: clipped")
        ax.axhline(0, color=GREY, linewidth=0.7)
        _rates(ax, rates)
        ax.set_title(str(place))
        if not own.sizes["learning_rate"]:
            ax.text(0.5, 0.5, "not reached", transform=ax.transAxes, ha="center", fontsize=8)
    axes[0].set_ylabel("logit gap")
    legend_above(axes[0], 4)
    return axes


@styled
def by_distance(curves: xr.Dataset, measure: str, axes: Any = None) -> np.ndarray:
    """Stiffness against distance, a row a space: pairs and what classes alone would give, then the difference.

    Args:
        curves: `stiffness` along space, pairs and distance, and `null`, as `distances.pooled` gives them.
        measure: "sign" or "cosine", for the labels.
        axes: (spaces, 2) of them; made if left out.

    Returns:
        The axes. A dot marks where all pairs first fall to zero, a cross where what classes alone give does.

    """
    spaces = curves.space.values
    if axes is None:
        _, axes = plt.subplots(len(spaces), 2, figsize=(WIDTH, 0.7 + 1.7 * len(spaces)), sharex="row", sharey="col")
    axes = np.reshape(axes, (-1, 2))
    for row, space in zip(axes, spaces, strict=True):
        _curves(*row, curves.sel(space=space))
        row[0].set_ylabel(f"{space}\n{measure}")
    for ax, title in zip(axes[0], ("stiffness", "all less classes alone"), strict=True):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel("distance, 1 \N{MINUS SIGN} cosine")
    legend_above(axes[0, 0])
    return axes


def _curves(left: Any, right: Any, here: xr.Dataset) -> None:
    every = here.stiffness.sel(pairs="all")
    drawn = [(here.stiffness.sel(pairs=pairs), *look, pairs) for pairs, look in PAIRS.items()]
    for values, colour, line, label in (*drawn, (here.null, "black", ":", "all, by classes alone")):
        own = values.dropna("distance")
        left.plot(own.distance, own, line, color=colour, linewidth=1.3, label=label)
    for values, colour, marker in ((every, BLUE, "o"), (here.null, "black", "x")):
        found = crossing(values)
        if not found.censored:
            left.plot(found.value, 0, marker, color=colour, markersize=5)
    more = (every - here.null).dropna("distance")
    right.plot(more.distance, more, "-", color=BLUE, linewidth=1.3)
    for ax in (left, right):
        ax.axhline(0, color=GREY, linewidth=0.7)


@styled
def by_gradient_layer(curves: xr.Dataset | None, axes: Any = None) -> np.ndarray:
    """Stiffness of each layer's gradients against distance: a row a measure, a column a kind of pairs.

    Args:
        curves: `stiffness` along layer, "whole" the last of them, measure, pairs and distance; or nothing.
        axes: (2, 2) of them; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.2), sharex=True, sharey="row")
    axes = np.reshape(axes, (2, 2))
    for row, (measure, name) in zip(axes, {"cos": "cosine", "sign": "sign"}.items(), strict=True):
        row[0].set_ylabel(name)
        for ax, pairs in zip(row, list(PAIRS)[:2], strict=True):
            _layers(ax, curves.stiffness.sel(measure=measure, pairs=pairs) if curves else None)
            ax.axhline(0, color=GREY, linewidth=0.7)
            ax.set_title((pairs if curves else NOTHING) if ax in axes[0] else "")
    for ax in axes[1]:
        ax.set_xlabel("distance")
    if curves:
        legend_above(axes[0, 0], 5)
    return axes


def _layers(ax: Any, values: xr.DataArray | None) -> None:
    if values is None:
        return
    for colour, layer in zip(shades("viridis", values.sizes["layer"] - 1), values.layer.values[:-1], strict=True):
        own = values.sel(layer=layer).dropna("distance")
        ax.plot(own.distance, own, color=colour, linewidth=1.3, label=str(layer))
    own = values.isel(layer=-1).dropna("distance")
    ax.plot(own.distance, own, "--", color="black", linewidth=1.3, label="whole gradient")


@styled
def lengths_through_training(panels: Mapping[str, xr.Dataset], axes: Any = None) -> np.ndarray:
    """Lengths against the epoch, a panel a definition, a curve a learning rate; bounds as hollow triangles.

    Args:
        panels: {title: `value`, `low`, `high`, `censored` along epochs and learning_rate}.
        axes: one a panel; made if left out.

    """
    axes = in_a_row(axes, len(panels), 3.2)
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        for (colour, rate), side in zip(_by_rate(found), _sides(found.sizes["learning_rate"]), strict=True):
            _lengths(ax, "epochs", found.sel(learning_rate=rate), colour, f"{rate:g}", side)
        unit = "1 / distance" if title.startswith("decay") else "distance"
        ax.set(xscale="log", xlabel="epoch", ylabel=unit, title=fill(title, 20))
        ax.set_ylim(bottom=0)
        ax.set_xticks(found.epochs.values, [f"{e:g}" for e in found.epochs.values], minor=False)
        ax.set_xticks([], minor=True)
    legend_above(axes[0], 5, title="learning rate")
    return axes


@styled
def lengths_against_rate(
    found: xr.Dataset | None, reported: Mapping[str, Sequence[float]] | None = None, axes: Any = None
) -> np.ndarray:
    """Lengths against the learning rate, a panel a space, a curve a window; bounds as hollow triangles.

    Args:
        found: `value`, `low`, `high`, `censored` along at, space and learning_rate, and `alone`, what classes alone
            would give, dotted; or nothing.
        reported: by space, what a paper reports at these rates, as stars.
        axes: one a space; made if left out.

    """
    if found is None:
        axes = in_a_row(axes, 1, 2)
        axes[0].set_title(NOTHING)
        return axes
    spaces = found.space.values
    if axes is None:
        rows = -(-len(spaces) // 3)
        size = (WIDTH, 0.7 + 2.1 * rows)
        _, axes = plt.subplots(rows, min(len(spaces), 3), figsize=size, sharex=True, sharey=True, squeeze=False)
    axes = np.ravel(axes)
    for ax in axes[len(spaces) :]:
        ax.set_visible(False)
    known = [
        *np.ravel(found.value),
        *np.ravel(found.alone),
        *(x for space in spaces for x in (reported or {}).get(space, ())),
    ]
    limits = np.nanmin(known) / 1.8, np.nanmax(known) * 1.8  # intervals of two or three seeds go further
    for k, (ax, space) in enumerate(zip(axes, spaces, strict=False)):
        colours, sides = shades("viridis", found.sizes["at"]), _sides(found.sizes["at"])
        for colour, side, place in zip(colours, sides, found["at"].values, strict=True):
            own = found.sel(at=place, space=space)
            _lengths(ax, "learning_rate", own, colour, str(place), side)
            ax.plot(own.learning_rate * side, own.alone, "x:", color=colour, linewidth=1, markersize=4)
        ax.plot([], [], "x:", color="black", linewidth=1, markersize=4, label="by classes alone")
        if reported and space in reported:
            look = {"color": ORANGE, "markersize": 7, "zorder": 4, "label": "first version"}
            ax.plot(found.learning_rate, reported[space], "*", **look)
        _rates(ax, found.learning_rate.values)
        if k + min(len(spaces), 3) >= len(spaces):  # nothing below it
            ax.tick_params(labelbottom=True)
        else:
            ax.set_xlabel("")
        ax.set(yscale="log", ylim=limits, title=space)
        ax.set_ylabel("" if k % 3 else "distance of the zero")
    legend_above(axes[0], 4)
    return axes


def _lengths(ax: Any, along: str, own: xr.Dataset, colour: Any, label: str, side: float) -> None:
    """Lengths as points with their intervals; those that are bounds as triangles that point to where they may be."""
    x = own[along] * side
    ax.plot(x, own.value.where(own.censored == ""), "-", color=colour, linewidth=1.2, label=label)
    for kind, marker, face in (("", "o", colour), ("above", "^", "none"), ("below", "v", "none")):
        here = (own.censored == kind).values
        ax.scatter(x[here], own.value[here], 18, marker=marker, facecolors=[face], edgecolors=[colour], zorder=3)
    whole = np.isfinite(own.low.values) & np.isfinite(own.high.values)
    ax.vlines(x[whole], own.low[whole], own.high[whole], color=colour, linewidth=1.2)


def _by_rate(values: xr.DataArray | xr.Dataset) -> zip:
    return zip(shades("plasma", values.sizes["learning_rate"]), values.learning_rate.values, strict=True)
