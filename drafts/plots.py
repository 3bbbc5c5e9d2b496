"""Figures of chapters 5 and 6, to be moved to stiffkit/plots.py with their tests."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from stiffkit.distances import crossing
from stiffkit.plots import BLUE, GREEN, GREY, ORANGE, _styled
from stiffkit.statistics import t_interval


@_styled
def against_rate(panels: Mapping[str, Mapping[str, xr.DataArray]], axes: Any = None) -> np.ndarray:
    """Values against the learning rate with 95 % t intervals over seeds, a curve a window.

    Args:
        panels: {name: {protocol: values (at, learning_rate, seed)}}; a row a name, a column a protocol.
        axes: (rows, columns) of them; made if left out.

    Returns:
        The axes. A rate of which a seed has no such window is left out of that curve.

    """
    columns = list(next(iter(panels.values())))
    if axes is None:
        _, axes = plt.subplots(
            len(panels), len(columns), figsize=(5.6, 0.8 + 2.3 * len(panels)), sharex=True, sharey="row", squeeze=False
        )
    for row, (name, protocols) in zip(axes, panels.items(), strict=True):
        for ax, (protocol, values) in zip(row, protocols.items(), strict=True):
            shades = plt.colormaps["viridis"](np.linspace(0, 0.85, values.sizes["at"]))
            for k, (colour, place) in enumerate(zip(shades, values["at"].values, strict=True)):
                whole = values.sel(at=place).dropna("learning_rate", how="any")
                interval = t_interval(whole)
                ax.plot(whole.learning_rate, interval["mean"], "osD^v<"[k % 6], linestyle="-", color=colour,
                        markersize=4, linewidth=1.2, label=str(place))  # fmt: skip
                ax.vlines(whole.learning_rate, interval.low, interval.high, color=colour, linewidth=1.2)
            ax.axhline(0, color=GREY, linewidth=0.7)
            ax.set_xscale("log")
            if name == next(iter(panels)):
                ax.set_title(protocol)
        row[0].set_ylabel(fill(name, 24))
    for ax in axes[-1]:
        ax.set_xlabel("learning rate")
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2)
    return np.asarray(axes)


@_styled
def against_loss(panels: Mapping[str, xr.DataArray], losses: Sequence[float] = (), axes: Any = None) -> np.ndarray:
    """Stiffness against the training loss, which falls to the right, a curve a learning rate, mean and band over seeds.

    Args:
        panels: {measure: values (loss, learning_rate, seed)}.
        losses: stopping losses, which are marked.
        axes: one a panel; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(1, len(panels), figsize=(5.6, 3.2), squeeze=False)
    axes = np.ravel(axes)
    for ax, (measure, values) in zip(axes, panels.items(), strict=True):
        shades = plt.colormaps["plasma"](np.linspace(0, 0.85, values.sizes["learning_rate"]))
        for colour, rate in zip(shades, values.learning_rate.values, strict=True):
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
    axes[0].set_ylabel("stiffness between classes")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, title="learning rate")
    return axes


@_styled
def forest(estimates: xr.Dataset, xlabel: str, axes: Any = None) -> Any:
    """Means with intervals, a line a row: cosines filled, signs beside them hollow.

    Args:
        estimates: `mean`, `low`, `high` along row and measure ("cos", "sign").
        xlabel: what they are.
        axes: one; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(figsize=(5.6, 0.9 + 0.5 * estimates.sizes["row"]))
    places = np.arange(estimates.sizes["row"])[::-1]
    for measure, shift, colour, face in (("cos", 0.12, BLUE, BLUE), ("sign", -0.12, ORANGE, "none")):
        own = estimates.sel(measure=measure)
        axes.hlines(places + shift, own.low, own.high, color=colour, linewidth=1.6)
        axes.scatter(own["mean"], places + shift, 28, marker="o", facecolors=face, edgecolors=colour, zorder=3,
                     label={"cos": "cosine", "sign": "sign"}[measure])  # fmt: skip
    axes.axvline(0, color=GREY, linewidth=0.7)
    axes.set_yticks(places, estimates.row.values)
    axes.set(xlabel=xlabel, ylim=(-0.6, len(places) - 0.4))
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2 - 0.6 / max(len(places), 1)), ncols=2)
    return axes


@_styled
def quantiles_at_loss(gaps: xr.DataArray, axes: Any = None) -> np.ndarray:
    """Quantiles of the logit gap against the learning rate, a panel a stopping loss: median, quartiles, 5 and 95 %.

    Args:
        gaps: (at, learning_rate, seed, quantile).
        axes: one a window; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(1, gaps.sizes["at"], figsize=(5.6, 2.6), sharey=True, squeeze=False)
    axes = np.ravel(axes)
    for ax, place in zip(axes, gaps["at"].values, strict=True):
        own = gaps.sel(at=place).dropna("learning_rate", how="any").mean("seed")
        for low, high, alpha in ((0.05, 0.95, 0.2), (0.25, 0.75, 0.35)):
            ax.fill_between(own.learning_rate, *(own.sel(quantile=q) for q in (low, high)), color=BLUE, alpha=alpha,
                            linewidth=0, label=f"{100 * low:.0f} to {100 * high:.0f} %")  # fmt: skip
        ax.plot(own.learning_rate, own.sel(quantile=0.5), "o-", color=BLUE, markersize=3, label="median")
        ax.axhline(16, color=ORANGE, linestyle=":", linewidth=1, label="16: clipped")
        ax.axhline(0, color=GREY, linewidth=0.7)
        rates = gaps.learning_rate.values
        ax.set(xscale="log", title=str(place), xlabel="learning rate", xlim=(rates.min() / 1.5, rates.max() * 1.5))
        if not own.sizes["learning_rate"]:
            ax.text(0.5, 0.5, "not reached", transform=ax.transAxes, ha="center", fontsize=8)
    axes[0].set_ylabel("logit gap")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    return axes


@_styled
def by_distance(curves: xr.Dataset, measure: str, axes: Any = None) -> np.ndarray:
    """Stiffness against distance, a row a space: pairs and what classes alone would give, then the difference.

    Args:
        curves: `stiffness` along space, pairs and distance, and `null`, as `distances.pooled` gives them.
        measure: "sign" or "cosine", for the labels.
        axes: (spaces, 2) of them; made if left out.

    """
    spaces = curves.space.values
    if axes is None:
        _, axes = plt.subplots(len(spaces), 2, figsize=(5.6, 0.7 + 1.5 * len(spaces)), sharex=True, sharey="col")
    looks = {"same class": (GREEN, "-."), "different classes": (ORANGE, "--"), "all": (BLUE, "-")}
    for row, space in zip(np.reshape(axes, (-1, 2)), spaces, strict=True):
        here = curves.sel(space=space)
        for pairs, (colour, line) in looks.items():
            own = here.stiffness.sel(pairs=pairs).dropna("distance")
            row[0].plot(own.distance, own, line, color=colour, linewidth=1.3, label=f"{pairs}")
        null = here.null.dropna("distance")
        row[0].plot(null.distance, null, ":", color="black", linewidth=1.3, label="all, by classes alone")
        more = (here.stiffness.sel(pairs="all") - here.null).dropna("distance")
        row[1].plot(more.distance, more, "-", color=BLUE, linewidth=1.3)
        for curve, colour in ((here.stiffness.sel(pairs="all"), BLUE), (here.null, "black")):
            found = crossing(curve)
            if not found.censored:
                row[0].plot(found.value, 0, "o" if colour == BLUE else "x", color=colour, markersize=5)
        for ax in row:
            ax.axhline(0, color=GREY, linewidth=0.7)
        row[0].set_ylabel(f"{space}\n{measure}")
    axes[0, 0].set_title("stiffness")
    axes[0, 1].set_title("all less classes alone")
    for ax in axes[-1]:
        ax.set_xlabel("distance, 1 \N{MINUS SIGN} cosine")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    return np.asarray(axes)


@_styled
def lengths_through_training(panels: Mapping[str, xr.Dataset], axes: Any = None) -> np.ndarray:
    """Lengths against the epoch, a panel a definition, a curve a learning rate; bounds as hollow triangles.

    Args:
        panels: {title: `value`, `low`, `high`, `censored` along epochs and learning_rate}.
        axes: one a panel; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(1, len(panels), figsize=(5.6, 3.2), squeeze=False)
    axes = np.ravel(axes)
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        shades = plt.colormaps["plasma"](np.linspace(0, 0.85, found.sizes["learning_rate"]))
        for colour, rate in zip(shades, found.learning_rate.values, strict=True):
            own = found.sel(learning_rate=rate)
            ax.plot(own.epochs, own.value, "-", color=colour, linewidth=1.2, label=f"{rate:g}")
            _bounded(ax, own.epochs, own, colour)
        ax.set(xscale="log", xlabel="epoch", title=fill(title, 20))
        ax.set_xticks(found.epochs.values, [f"{e:g}" for e in found.epochs.values], minor=False)
        ax.set_xticks([], minor=True)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, title="learning rate")
    return axes


@_styled
def lengths_against_rate(
    found: xr.Dataset, reported: Mapping[str, Sequence[float]] | None = None, axes: Any = None
) -> np.ndarray:
    """Lengths against the learning rate, a panel a space, a curve a window; bounds as hollow triangles.

    Args:
        found: `value`, `low`, `high`, `censored` along at, space and learning_rate.
        reported: by space, what a paper reports at these rates, as crosses.
        axes: one a space; made if left out.

    """
    spaces = found.space.values
    if axes is None:
        rows = -(-len(spaces) // 3)
        _, axes = plt.subplots(rows, 3, figsize=(5.6, 0.7 + 2.1 * rows), sharex=True, sharey=True, squeeze=False)
    axes = np.ravel(axes)
    for ax in axes[len(spaces) :]:
        ax.set_visible(False)
    for ax, space in zip(axes, spaces, strict=False):
        shades = plt.colormaps["viridis"](np.linspace(0, 0.85, found.sizes["at"]))
        for colour, place in zip(shades, found["at"].values, strict=True):
            own = found.sel(at=place, space=space)
            ax.plot(own.learning_rate, own.value, "-", color=colour, linewidth=1.2, label=str(place))
            _bounded(ax, own.learning_rate, own, colour)
        if reported and space in reported:
            ax.plot(found.learning_rate, reported[space], "x", color=ORANGE, markersize=5, label="first version")
        ax.set(xscale="log", yscale="log", title=space)
        ax.set_xlabel("learning rate")
    for ax in axes[::3]:
        ax.set_ylabel("distance of the zero")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    return axes


def _bounded(ax: Any, x: xr.DataArray, own: xr.Dataset, colour: Any) -> None:
    """Lengths as points with their intervals; those that are bounds as triangles that point to where they may be."""
    for kind, marker, face in (("", "o", colour), ("above", "^", "none"), ("below", "v", "none")):
        here = (own.censored == kind).values
        ax.scatter(x[here], own.value[here], 18, marker=marker, facecolors=[face], edgecolors=[colour], zorder=3)
    whole = np.isfinite(own.low.values) & np.isfinite(own.high.values)
    ax.vlines(x[whole], own.low[whole], own.high[whole], color=colour, linewidth=1.2)
