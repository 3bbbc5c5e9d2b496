"""One function a figure: data first, axes last and returned, nothing shown."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from textwrap import fill
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from stiffkit.endpoints import onset
from stiffkit.measurement import SPOKEN
from stiffkit.statistics import t_interval
from stiffkit.style import BLUE, GREEN, GREY, ORANGE, in_a_row, legend_above, styled
from stiffkit.superclasses import KINDS

TICKS = [-1, -0.5, -0.25, -0.05, 0, 0.05, 0.25, 0.5, 1]
DIVERGING = "RdBu"  # blue above zero (a step helps), red below (it hurts)


@styled
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
    axes = in_a_row(axes, len(stages), 3.2, sharey=True)
    norm = mpl.colors.SymLogNorm(linthresh=0.01, linscale=0.3, vmin=-1, vmax=1, base=10)
    for ax, stage in zip(axes, stages, strict=True):
        panel = change.sel(toy_stage=stage)
        relative = -panel / abs(panel).max()
        image = ax.pcolormesh(panel.toy_x, panel.toy_y, relative, norm=norm, cmap=DIVERGING, rasterized=True)
        ax.contour(labels.toy_x, labels.toy_y, labels, levels=[0.5, 1.5], colors="black", linewidths=0.7)
        ax.plot(*point, "o", markersize=11, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
        ax.set(title=str(stage), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(
        image, ax=list(axes), orientation="horizontal", shrink=0.8, aspect=35, ticks=[-1, -0.1, 0, 0.1, 1]
    )
    bar.ax.set_xticklabels(["raised most", "a tenth", "left alone", "a tenth", "lowered most"])
    bar.set_label("loss after one step on the circled point")
    return axes


@styled
def step_checks(results: xr.Dataset, learning_rate: float, axes: Any = None) -> np.ndarray:
    """Real steps against inner products: the relative error, and how often the sign is right.

    Args:
        results: with `relative_error` (stage, epsilon, quantile), `agreement` (stage, epsilon) and `agreement_adam`
            (stage).
        learning_rate: of the Adam step.
        axes: two; made if left out.

    """
    axes = in_a_row(axes, 2, 3.0)
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


@styled
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
    for (i, j), ax in np.ndenumerate(axes):
        panel = C.isel({rows: i, columns: j}).transpose("class_a", "class_b")
        image = ax.imshow(panel, cmap=DIVERGING, norm=_root())
        ax.set_xticks(range(len(panel)), names, fontsize=8)
        ax.set_yticks(range(len(panel)), names, fontsize=8)
        ax.tick_params(length=0)
        ax.set_title(str(panel[columns].values) if i == 0 else "")
        if j == 0:
            ax.set_ylabel((f"{panel[rows].values}\n" if rows in panel.coords else "") + "step on class")
        if i == n - 1:
            ax.set_xlabel("loss of class")
        ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, label="stiffness", ticks=TICKS, format="%g")
    return axes


@styled
def grouped_matrices(C: xr.DataArray, axes: Any = None) -> np.ndarray:
    """Class matrices of many classes, ordered by superclass, whose names are at the edge and between which lines run.

    Colours are those of `class_matrices`.

    Args:
        C: (stage, class_a, class_b), with the coordinate `superclass` along class_a, equal names beside each other.
        axes: one a stage; made if left out.

    """
    n = C.sizes["stage"]
    if axes is None:
        rows = -(-n // 2)
        _, axes = plt.subplots(
            rows, min(n, 2), figsize=(5.6, 1.4 + 2.3 * rows), squeeze=False, sharex=True, sharey=True
        )
    axes = np.atleast_2d(axes)
    groups = C.superclass.values
    names, begins, sizes = np.unique(groups, return_index=True, return_counts=True)
    for ax, stage in zip(axes.flat, C.stage.values, strict=False):
        image = ax.imshow(C.sel(stage=stage), cmap=DIVERGING, norm=_root(), interpolation="nearest")
        ax.set_title(str(stage))
        for begin in begins[begins > 0] - 0.5:
            ax.axhline(begin, color="black", linewidth=0.5)
            ax.axvline(begin, color="black", linewidth=0.5)
        spoken = [_spoken(name) for name in names]
        ax.set_xticks(begins + (sizes - 1) / 2, spoken, fontsize=5, rotation=90)
        ax.set_yticks(begins + (sizes - 1) / 2, spoken, fontsize=5)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("step on class", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("loss of class", fontsize=8)
    axes[0, 0].figure.colorbar(
        image, ax=axes, location="top", shrink=0.6, aspect=35, label="stiffness", ticks=TICKS, format="%g"
    ).ax.tick_params(labelsize=7)
    return axes


@styled
def superclass_blocks(C: xr.DataArray, axes: Any = None) -> np.ndarray:
    """The cells between the classes of each superclass, a small matrix each, classes named on the left.

    Args:
        C: (class_a, class_b), with the coordinate `superclass` along class_a, equal names beside each other.
        axes: one a superclass at least; made if left out.

    """
    groups = list(dict.fromkeys(C.superclass.values))
    if axes is None:
        rows = -(-len(groups) // 3)
        _, axes = plt.subplots(rows, 3, figsize=(5.6, 0.8 + 1.35 * rows), squeeze=False)
    axes = np.ravel(axes)
    for ax, group in zip(axes, groups, strict=False):
        inside = C.superclass.values == group
        block = C.isel(class_a=inside, class_b=inside)
        image = ax.imshow(block, cmap=DIVERGING, norm=_root())
        ax.set_title(fill(_spoken(group), 22), fontsize=7)
        ax.set_yticks(range(int(inside.sum())), [_spoken(name) for name in block.class_a.values], fontsize=6)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    axes[0].figure.colorbar(
        image, ax=axes, location="top", shrink=0.6, aspect=35, label="stiffness", ticks=TICKS, format="%g"
    ).ax.tick_params(labelsize=7)
    return axes[: len(groups)]


@styled
def grouping_histograms(tests: Mapping[str, xr.Dataset], axes: Any = None) -> np.ndarray:
    """The difference that true superclasses make, against that of random groups of the same sizes, a panel a stage.

    Args:
        tests: {stage: what `grouping_test` gives}.
        axes: one a stage; made if left out.

    """
    if axes is None:
        rows = -(-len(tests) // 2)
        _, axes = plt.subplots(rows, 2, figsize=(5.6, 0.4 + 1.9 * rows), squeeze=False)
    axes = np.ravel(axes)
    for ax, (stage, test) in zip(axes, tests.items(), strict=False):
        ax.hist(test.null, bins=40, color=GREY, label="random groups")
        ax.axvline(test.observed, color=ORANGE, linewidth=2, label="superclasses")
        side = "above" if test.effect > 0 else "below"
        ax.set_title(f"{stage}\n{float(abs(test.effect)):.1f} sd {side}, p = {float(test.p_two_sided):.2g}", fontsize=9)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("one superclass less different ones", fontsize=8)
    for ax in axes[len(tests) :]:
        ax.set_visible(False)
    legend_above(axes[0])
    return axes


def _root() -> mpl.colors.Normalize:
    """Colours that go with the square root of a value."""
    return mpl.colors.FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: x * np.abs(x)), -1, 1)


def _spoken(name: str) -> str:
    return str(name).replace("_", " ")


@styled
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
    legend_above(axes[0, 0])
    return axes


LOOKS = {  # regimes and arithmetics: colour and line
    "train-train": (BLUE, "-"),
    "train-val": (ORANGE, "--"),
    "val-val": (GREEN, ":"),
    "exact": ("black", "-"),
    "float32": (ORANGE, "--"),
    "keras2019": (BLUE, ":"),
}
DOTS = {"exact": ("black", "o"), "float32": (ORANGE, "s"), "keras2019": (BLUE, "^"), "own": (GREEN, "D")}


@styled
def evolution(runs: xr.Dataset, arithmetic: str = "exact", axes: Any = None) -> np.ndarray:
    """Loss and accuracy, and stiffness within and between classes in the three regimes, against images seen.

    Args:
        runs: side by side along `seed`; bands are 95 % t intervals over seeds, and missing for a single one.
        arithmetic: of the gradients.
        axes: (3, 2) of them; made if left out.

    Returns:
        The axes. Vertical lines: onset of overfitting by validation loss (solid) and by accuracy (dotted), medians.

    """
    if axes is None:
        _, axes = plt.subplots(3, 2, figsize=(5.6, 6.2), sharex=True)
    for split, look in zip(("train", "validation"), list(LOOKS.values())[:2], strict=True):
        _band(axes[0, 0], runs.loss.sel(split=split), *look, split, (float(runs.loss.min()) / 2, np.inf))
        _band(axes[0, 1], 100 * runs.accuracy.sel(split=split), *look, split, (0, 100))
    here = runs.sel(arithmetic=arithmetic)
    for row, name in zip(axes[1:], ("within", "between"), strict=True):
        for ax, measure in zip(row, ("sign", "cos"), strict=True):
            for regime in runs.regime.values:
                _band(ax, here[name].sel(measure=measure, regime=regime), *LOOKS[regime], regime)
            ax.axhline(0, color=GREY, linewidth=0.7)
            ax.set_title(f"{name} classes, {'cosine' if measure == 'cos' else 'sign'}")
    decade = runs.loss.max() > 10 * runs.loss.min()
    axes[0, 0].set(title="loss", yscale="log" if decade else "linear")
    axes[0, 1].set(title="accuracy (%)")
    for ax in axes[1]:
        ax.set_ylim(min(-0.05, 1.1 * float(here.within.mean("seed").min())), 1.05)
    _onsets(axes.flat, runs)
    for ax in axes[-1]:
        _images(ax, runs)
    axes[0, 0].legend(fontsize=8)
    axes[2, 1].legend(fontsize=8)
    return axes


@styled
def arithmetics(runs: xr.Dataset, regime: str = "train-train", axes: Any = None) -> np.ndarray:
    """The same checkpoints in several arithmetics: within and between by sign, what is past the gap, what is wrong.

    Args:
        runs: side by side along `seed`.
        regime: of the pairs.
        axes: (2, 2) of them; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(2, 2, figsize=(5.6, 4.4), sharex=True)
    here = runs.sel(regime=regime)
    for arithmetic in runs.arithmetic.values:
        look = (*LOOKS[arithmetic], SPOKEN[arithmetic])
        for ax, name in zip(axes[0], ("within", "between"), strict=True):
            _band(ax, here[name].sel(measure="sign", arithmetic=arithmetic), *look)
        _band(axes[1, 1], 100 * here.wrong_sign.sel(arithmetic=arithmetic), *look, (0, 100))
    for part, look in zip(runs.part.values, list(LOOKS.values()), strict=False):
        name = "training" if part == "train" else "validation"
        _band(axes[1, 0], 100 * runs.past_gap.sel(part=part), *look, name, (0, 100))
    titles = ("within classes, sign", "between classes, sign", "points past the gap (%)", "pairs with another sign (%)")
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_title(title)
    _onsets(axes.flat, runs)
    axes[0, 0].set_ylim(-0.05, 1.05)
    for ax in axes[-1]:
        _images(ax, runs)
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    return axes


@styled
def overview(sets: Mapping[str, xr.Dataset], measure: str = "sign", regime: str = "train-val", axes: Any = None) -> Any:
    """Within and between against images seen, a panel a set of runs: exact solid, clipped dotted, onset marked.

    Args:
        sets: runs side by side along `seed`, by title.
        measure: "sign" or "cos".
        regime: of the pairs.
        axes: one a set; made if left out.

    """
    looks = {
        (kind, arithmetic): (colour, line, f"{kind} classes, {SPOKEN[arithmetic]}")
        for kind, colour in (("within", BLUE), ("between", ORANGE))
        for arithmetic, line in (("exact", "-"), ("keras2019", ":"))
    }
    return _small_multiples(sets, measure, regime, looks, axes)


@styled
def related(sets: Mapping[str, xr.Dataset], measure: str = "sign", regime: str = "val-val", axes: Any = None) -> Any:
    """Means within a class, within a superclass and between superclasses against images seen, a panel a set of runs.

    Args:
        sets: runs side by side along `seed`, by title; exact arithmetic.
        measure: "sign" or "cos".
        regime: of the pairs.
        axes: one a set; made if left out.

    """
    looks = {
        (kind, "exact"): (*look, name)
        for look, (kind, name) in zip(list(LOOKS.values())[:3], KINDS.items(), strict=True)
    }
    return _small_multiples(sets, measure, regime, looks, axes)


def _small_multiples(
    sets: Mapping[str, xr.Dataset],
    measure: str,
    regime: str,
    looks: Mapping[tuple[str, str], tuple[str, str, str]],
    axes: Any,
) -> np.ndarray:
    """A panel a set of runs, curves by {(variable, arithmetic): (colour, line, label)}."""
    if axes is None:
        rows = max(-(-len(sets) // 2), 1)
        _, axes = plt.subplots(rows, 2, figsize=(5.6, 0.7 + 2.2 * rows), sharey=True, squeeze=False)
    axes = np.ravel(axes)
    for ax in axes[len(sets) :]:
        ax.set_visible(False)
    for ax, (title, runs) in zip(axes, sets.items(), strict=False):
        here = runs.sel(measure=measure, regime=regime)
        for (kind, arithmetic), look in looks.items():
            _band(ax, here[kind].sel(arithmetic=arithmetic), *look)
        _through_training(ax, runs, fill(title, 32))
    for ax in axes[::2]:
        ax.set_ylabel("stiffness, " + ("cosine" if measure == "cos" else "sign"))
    legend_above(axes[0])
    return axes


@styled
def beside(sets: Mapping[str, xr.Dataset], arithmetic: str = "exact", axes: Any = None) -> np.ndarray:
    """Sign stiffness within classes (above) and between (below) of several sets of runs, a column a regime.

    Args:
        sets: at most three, runs side by side along `seed`, by their names in the legend.
        arithmetic: of the gradients.
        axes: (2, regimes) of them; made if left out.

    Returns:
        The axes. Dotted: what the last layer gives where a network answers all classes alike, one and minus one.

    """
    longest = max(sets.values(), key=lambda runs: runs.images.max())
    regimes = longest.regime.values
    if axes is None:
        _, axes = plt.subplots(2, len(regimes), figsize=(5.6, 4.2), sharex=True, sharey="row")
    for (kind, uniform), row in zip((("within", 1), ("between", -1)), np.reshape(axes, (2, -1)), strict=True):
        for ax, regime in zip(row, regimes, strict=True):
            for look, (name, runs) in zip(list(LOOKS.values())[:3], sets.items(), strict=False):
                _band(ax, runs[kind].sel(measure="sign", regime=regime, arithmetic=arithmetic), *look, name)
            ax.axhline(0, color=GREY, linewidth=0.7)
            ax.axhline(uniform, color="black", linewidth=1, linestyle=":", label="uniform answers")
            ax.set(ylim=(-0.1, 1.1) if uniform > 0 else (-1.1, 0.3), title=regime if kind == "within" else "")
            if kind == "between":
                _images(ax, longest)
        row[0].set_ylabel(f"{kind} classes, sign")
    legend_above(row[0], 3)
    return np.asarray(axes)


@styled
def curves(
    panels: Mapping[str, Mapping[str, xr.DataArray]],
    runs: xr.Dataset,
    axes: Any = None,
    bounds: tuple[float, float] = (-1, 1),
) -> np.ndarray:
    """Curves with bands over seeds, a panel a title, each curve by its name.

    Args:
        panels: {title: {name: values along images and seed}}, at most five curves a panel.
        runs: the runs, for the onset of overfitting.
        axes: one a panel; made if left out.
        bounds: that the bands keep to.

    """
    axes = in_a_row(axes, len(panels), 3.4)
    looks = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), ("black", ":"), (GREY, "-"))
    for ax, (title, chosen) in zip(axes, panels.items(), strict=True):
        for look, (name, values) in zip(looks, chosen.items(), strict=False):
            _band(ax, values, *look, name, bounds)
        _through_training(ax, runs, title)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return axes


@styled
def by_section(values: xr.Dataset, axes: Any = None) -> np.ndarray:
    """Stiffness of each section of a model through training as colours, within classes (left) and between (right).

    Args:
        values: `within` and `between` along section, from the input on, "whole" the last, and epochs.
        axes: two; made if left out.

    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(5.6, 0.9 + 0.28 * values.sizes["section"]), sharex=True, sharey=True)
    for ax, kind in zip(np.ravel(axes), ("within", "between"), strict=True):
        image = ax.imshow(values[kind].transpose("section", "epochs"), cmap=DIVERGING, norm=_root(), aspect="auto")
        ax.axhline(values.sizes["section"] - 1.5, color="black", linewidth=0.7)
        ax.set_xticks(range(values.sizes["epochs"]), [f"{e:g}" for e in values.epochs.values], rotation=60, fontsize=8)
        ax.set_yticks(range(values.sizes["section"]), values.section.values, fontsize=8)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set(title=f"{kind} classes", xlabel="epoch")
    ax.figure.colorbar(image, ax=np.ravel(axes), shrink=0.9, label="stiffness", ticks=TICKS, format="%g")
    return np.ravel(axes)


@styled
def doses(sets: Mapping[str, xr.Dataset], axes: Any = None) -> np.ndarray:
    """What the arithmetic changes against images past the gap: within classes above, between below, a column a set.

    Args:
        sets: {title: what `separation.dose` gives}; one dot a seed and checkpoint.
        axes: (2, sets) of them; made if left out.

    Returns:
        The axes. The line is what a clipped loss must give within classes, medians over seeds.

    """
    if axes is None:
        width = 5.6 if len(sets) > 1 else 4.2
        _, axes = plt.subplots(2, len(sets), figsize=(width, 4.6), sharex="col", sharey="row", squeeze=False)
    for (title, found), (top, bottom) in zip(sets.items(), np.reshape(axes, (2, -1)).T, strict=True):
        for arithmetic in found.arithmetic.values:
            colour, marker = DOTS[arithmetic]
            for ax, kind in ((top, "within"), (bottom, "between")):
                here = found[kind].sel(arithmetic=arithmetic)
                label = f"{SPOKEN[arithmetic]} less exact"
                ax.plot(np.ravel(found.past), np.ravel(here), marker, color=colour, markersize=3.5, label=label)
        middle = found[["past", "predicted"]].median("seed").sortby("past").dropna("images")
        top.plot(
            middle.past, middle.predicted, color="black", linewidth=1, label="(share not clipped)², no free parameter"
        )
        top.set_title(title)
        bottom.set_xlabel("past the gap (%)")
        for ax in (top, bottom):
            ax.axhline(0, color=GREY, linewidth=0.7)
            ax.dataLim.update_from_data_xy([(0, -0.05), (10, 0.05)], ignore=False)  # where there is no dose at all
            ax.autoscale_view()
    for ax, kind in zip(np.reshape(axes, (2, -1))[:, 0], ("within", "between"), strict=True):
        ax.set_ylabel(f"{kind} classes, sign")
    legend_above(np.ravel(axes)[0], 1)
    return np.asarray(axes)


@styled
def trained_and_measured(sets: Mapping[str, xr.Dataset], axes: Any = None) -> np.ndarray:
    """Means and 95 % t intervals over seeds within and between classes: a row a training loss, a mark a measurement.

    Args:
        sets: {training loss: `within` and `between` along seed and arithmetic}.
        axes: two; made if left out.

    """
    axes = in_a_row(axes, 2, 1.3 + 0.5 * len(sets), sharey=True)
    known = [a for a in DOTS if any(a in values.arithmetic for values in sets.values())]
    for place, arithmetic in enumerate(known):
        colour, marker = DOTS[arithmetic]
        rows = [row for row, values in enumerate(sets.values()) if arithmetic in values.arithmetic]
        chosen = [values.sel(arithmetic=arithmetic) for values in sets.values() if arithmetic in values.arithmetic]
        y = np.array(rows) + 0.16 * (place - (len(known) - 1) / 2)
        for ax, kind in zip(axes, ("within", "between"), strict=True):
            spread = [t_interval(values[kind]) for values in chosen]
            mean, low, high = (np.array([float(s[name]) for s in spread]) for name in ("mean", "low", "high"))
            bars = np.nan_to_num([mean - low, high - mean])
            label = f"measured {SPOKEN[arithmetic]}"
            ax.errorbar(mean, y, xerr=bars, fmt=marker, color=colour, markersize=5, elinewidth=1.2, label=label)
    for ax, kind in zip(axes, ("within", "between"), strict=True):
        ax.axvline(0, color=GREY, linewidth=0.7)
        ax.set(xlabel="sign, late in training", title=f"{kind} classes")
    axes[0].set_xlim(-0.1, 1.1)
    axes[0].set_yticks(range(len(sets)), [f"trained with\n{name}" for name in sets])
    axes[0].set_ylim(len(sets) - 0.5, -0.5)
    legend_above(axes[0])
    return axes


@styled
def taken_apart(sets: Mapping[str, xr.Dataset], regime: str = "train-train", axes: Any = None) -> np.ndarray:
    """Sign stiffness within classes by layer (above) and by right and wrong images (below), a column a set of runs.

    Args:
        sets: runs side by side along `seed`, by title; in exact arithmetic.
        regime: of the pairs.
        axes: (2, sets) of them; made if left out.

    Returns:
        The axes. The black line is the whole gradient, over all pairs; the vertical one the least validation loss.

    """
    if axes is None:
        _, axes = plt.subplots(2, len(sets), figsize=(5.6, 4.4), sharex="col", sharey=True, squeeze=False)
    deepest = max(int(runs.layer.max()) for runs in sets.values())
    shades = dict(enumerate(plt.get_cmap("viridis_r")(np.linspace(0.15, 0.95, deepest)), start=1))
    for (title, runs), column in zip(sets.items(), np.reshape(axes, (2, -1)).T, strict=True):
        here = runs.sel(regime=regime, measure="sign")
        layers = here.layer_within.dropna("layer", how="all")
        for layer in layers.layer.values:
            _band(column[0], layers.sel(layer=layer), shades[int(layer)], "-", f"layer {layer}")
        looks = ((BLUE, "--"), (ORANGE, ":"), (GREEN, "-."))
        for (colour, line), rightness in zip(looks, runs.rightness.values, strict=True):
            _band(column[1], here.pair_within.sel(rightness=rightness), colour, line, str(rightness))
        for ax in column:
            _band(ax, here.within.sel(arithmetic="exact"), "black", "-", "whole gradient, all pairs")
            _through_training(ax, runs, "")
        column[0].set(title=fill(title, 16), xlabel="", ylim=(-0.15, 1.05))
    for ax, kind in zip(np.reshape(axes, (2, -1))[:, 0], ("by layer", "by pairs"), strict=True):
        ax.set_ylabel(f"sign, {kind}")
    named = {}
    for ax in np.ravel(axes):
        handles, labels = ax.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    ax.figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return np.asarray(axes)


def _band(
    ax: Any, values: xr.DataArray, colour: str, line: str, label: str, bounds: tuple[float, float] = (-1, 1)
) -> None:
    """The mean over seeds and its 95 % t interval within bounds; checkpoints where nothing was measured are bridged."""
    here = values.dropna("images", how="all")
    interval = t_interval(here).clip(*bounds)
    ax.plot(here.images, interval["mean"], line, color=colour, label=label, linewidth=1.4)
    ax.fill_between(here.images, interval.low, interval.high, color=colour, alpha=0.2, linewidth=0)


def _through_training(ax: Any, runs: xr.Dataset, title: str) -> None:
    """A panel's title, its zero line, the onset of overfitting by loss, and images seen below it."""
    ax.axhline(0, color=GREY, linewidth=0.7)
    _onsets([ax], runs, ("loss",))
    _images(ax, runs)
    ax.set_title(title)


def _onsets(axes: Iterable[Any], runs: xr.Dataset, kinds: Sequence[str] = ("loss", "accuracy")) -> None:
    axes = list(axes)
    for kind, line in zip(kinds, ("-", ":"), strict=False):
        begin = float(onset(runs, kind).median())
        for ax in axes if np.isfinite(begin) else ():
            ax.axvline(begin, color=GREY, linewidth=1, linestyle=line)


def _images(ax: Any, runs: xr.Dataset) -> None:
    """Images seen: linear up to 1,600, logarithmic above, so that the start is on the axis."""
    ax.set_xscale("symlog", linthresh=1600, linscale=0.5)
    last = float(runs.images.max())
    ticks = [0, *([k for k in (1e4, 1e5, 1e6, 1e7) if k <= last] or [min(1600, last)])]
    ax.set_xticks(ticks, [f"{k:,.0f}" if k < 1e4 else f"$10^{{{np.log10(k):.0f}}}$" for k in ticks])
    ax.set_xticks([], minor=True)
    ax.set(xlabel=f"{runs.attrs.get('seen', 'images')} seen", xlim=(0, last))
