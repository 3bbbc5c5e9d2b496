"""One function a figure: data first, axes last and returned, nothing shown."""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import product
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#737373"  # told apart with every kind of colour vision
DIVERGING = "RdBu"  # blue above zero (a step helps), red below (it hurts)
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
    "axes.titlesize": 10,
}


def _styled(plot: Callable) -> Callable:
    @wraps(plot)
    def styled(*args: Any, **kwargs: Any) -> Any:
        before = {
            name: mpl.rcParams[name] for name in STYLE
        }  # rc_context would also undo a notebook's interactive mode
        mpl.rcParams.update(STYLE)
        try:
            return plot(*args, **kwargs)
        finally:
            mpl.rcParams.update(before)

    return styled


@_styled
def step_map(change: xr.DataArray, labels: xr.DataArray, point: tuple[float, float], axes: Any = None) -> np.ndarray:
    """Where in the plane one step on one point lowered the loss, raised it, or left it alone.

    Args:
        change: of the loss, with dimensions toy_stage, toy_y, toy_x; one panel a stage.
        labels: the class of each place, with dimensions toy_y, toy_x; its borders are drawn.
        point: where the step was taken, circled.
        axes: one a stage; made if left out.

    Returns:
        The axes. Colours are relative to the largest change in each panel, on a symmetric scale that is linear below
        1 % of it and logarithmic above.

    """
    stages = change.toy_stage.values
    if axes is None:
        _, axes = plt.subplots(1, len(stages), figsize=(5.6, 3.2), sharey=True, squeeze=False)
    axes = np.ravel(axes)
    norm = mpl.colors.SymLogNorm(linthresh=0.01, linscale=0.3, vmin=-1, vmax=1, base=10)
    for ax, stage in zip(axes, stages, strict=True):
        panel = change.sel(toy_stage=stage)
        relative = -panel / abs(panel).max()
        image = ax.pcolormesh(panel.toy_x, panel.toy_y, relative, norm=norm, cmap=DIVERGING, rasterized=True)
        ax.contour(labels.toy_x, labels.toy_y, labels, levels=[0.5, 1.5], colors="black", linewidths=0.7)
        ax.plot(*point, "o", markersize=11, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
        ax.set(title=str(stage), aspect="equal", xticks=[], yticks=[])
        sns.despine(ax=ax, left=True, bottom=True)
    bar = ax.figure.colorbar(
        image, ax=list(axes), orientation="horizontal", shrink=0.8, aspect=35, ticks=[-1, -0.1, 0, 0.1, 1]
    )
    bar.ax.set_xticklabels(["raised most", "a tenth", "left alone", "a tenth", "lowered most"])
    bar.set_label("loss after one step on the circled point")
    return axes


@_styled
def step_checks(results: xr.Dataset, learning_rate: float, axes: Any = None) -> np.ndarray:
    """Real steps against inner products: the relative error, and how often the sign is right.

    Args:
        results: with `relative_error` (stage, epsilon, quantile), `agreement` (stage, epsilon) and `agreement_adam`
            (stage).
        learning_rate: of the Adam step.
        axes: two; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(5.6, 3.0))
    left, right = axes
    for colour, marker, stage in zip((BLUE, ORANGE), "os", results.stage.values, strict=True):
        here = results.sel(stage=stage)
        low, middle, high = here.relative_error.transpose("quantile", "epsilon").values
        left.loglog(here.epsilon, middle, color=colour, marker=marker, markersize=4, label=stage)
        left.fill_between(here.epsilon, low, high, color=colour, alpha=0.2, linewidth=0)
        right.semilogx(here.epsilon, 100 * here.agreement, color=colour, marker=marker, markersize=4)
        right.plot(
            learning_rate,
            100 * here.agreement_adam,
            marker="*",
            markersize=13,
            color=colour,
            markeredgecolor="white",
            linestyle="none",
        )
    left.plot(results.epsilon, results.epsilon, color=GREY, linestyle=":", label="proportional to the step")
    left.set(xlabel=r"step size $\varepsilon$", ylabel="relative error of the first order")
    left.legend(fontsize=8)
    right.plot([], [], "*", markersize=11, color=GREY, label="Adam")
    right.plot([], [], marker="o", markersize=4, color=GREY, label="gradient descent")
    lowest = 100 * min(float(results.agreement.min()), float(results.agreement_adam.min()))
    right.set(xlabel="step size or learning rate", ylabel="sign is right (% of pairs)", ylim=(min(50, lowest - 5), 102))
    right.legend(fontsize=8, loc="lower left")
    return np.asarray(axes)


@_styled
def class_matrices(
    C: xr.DataArray, columns: str, rows: str | None = None, classes: Sequence[str] | None = None, axes: Any = None
) -> np.ndarray:
    """Class matrices side by side, from -1 (red, a step hurts) to 1 (blue, it helps).

    The strength of the colour goes with the square root of the value, so that a cosine of 0.05 can be seen.

    Args:
        C: with dimensions class_a, class_b, `columns` and, if given, `rows`.
        columns: the dimension that runs from panel to panel.
        rows: the dimension that runs from one line of panels to the next.
        classes: names for the ticks; class numbers if left out or longer than two letters.
        axes: (rows, columns) of them; made if left out.

    """
    C = C if rows else C.expand_dims("row")
    rows = rows or "row"
    n, m = C.sizes[rows], C.sizes[columns]
    if axes is None:
        _, axes = plt.subplots(n, m, figsize=(5.6, 0.8 + 3.8 * n / m), squeeze=False, sharex=True, sharey=True)
    names = classes if classes is not None and max(map(len, classes)) <= 2 else C.class_a.values
    norm = mpl.colors.FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: x * np.abs(x)), -1, 1)
    for (i, j), ax in np.ndenumerate(axes):
        panel = C.isel({rows: i, columns: j}).transpose("class_a", "class_b")
        image = ax.imshow(panel, cmap=DIVERGING, norm=norm)
        ax.set_xticks(range(len(panel)), names, fontsize=8)
        ax.set_yticks(range(len(panel)), names, fontsize=8)
        ax.tick_params(length=0)
        ax.set_title(str(panel[columns].values) if i == 0 else "")
        if j == 0:
            ax.set_ylabel((f"{panel[rows].values}\n" if rows in panel.coords else "") + "step on class")
        if i == n - 1:
            ax.set_xlabel("loss of class")
        sns.despine(ax=ax, left=True, bottom=True)
    ticks = [-1, -0.5, -0.25, -0.05, 0, 0.05, 0.25, 0.5, 1]
    ax.figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, label="stiffness", ticks=ticks, format="%g")
    return axes


@_styled
def by_layer(within: xr.DataArray, between: xr.DataArray, axes: Any = None) -> np.ndarray:
    """Within- and between-class stiffness of each layer, one panel a setting; cosine filled, sign hollow.

    Args:
        within: with dimensions setting, layer and measure.
        between: likewise.
        axes: one a setting; made if left out.

    """
    if axes is None:
        columns = min(2, within.sizes["setting"])
        rows = -(-within.sizes["setting"] // columns)
        size = (5.6, 0.6 + 1.9 * rows)
        _, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    axes = np.atleast_2d(axes)
    for ax in axes.flat[within.sizes["setting"] :]:
        ax.set_visible(False)
    positions = np.arange(within.sizes["layer"])
    series = ((within, BLUE, "o", "within classes"), (between, ORANGE, "s", "between classes"))
    for ax, setting in zip(axes.flat, within.setting.values, strict=False):
        for (values, colour, marker, label), measure in product(series, ("cos", "sign")):
            look = {} if measure == "cos" else {"markerfacecolor": "none", "markersize": 9}
            chosen = values.sel(setting=setting, measure=measure)
            ax.plot(positions, chosen, marker, color=colour, label=f"{label}, {measure}", **look)
        ax.axhline(0, color=GREY, linewidth=0.7)
        ax.axvline(positions[-1] - 0.5, color=GREY, linewidth=0.7, linestyle=":")
        ax.set(ylim=(-1.15, 1.15), xlim=(-0.5, positions[-1] + 0.5))
        ax.set_title(str(setting))
        ax.set_xticks(positions, [str(name).removeprefix("layer ") for name in within.layer.values])
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    for ax in axes[:, 0]:
        ax.set_ylabel("stiffness")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    return axes
