"""How all figures look: colours, sizes of text, legends above the panels."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#737373"  # told apart with every kind of colour vision
WIDTH = 5.6  # inches, of a figure: a phone and a column of text show it whole
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # as it would be found, which takes a third of the time of a drawing
}


def styled(plot: Callable) -> Callable:
    """Draw a figure in the book's style, and leave matplotlib's settings as they were."""

    @wraps(plot)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        before = {
            name: mpl.rcParams[name] for name in STYLE
        }  # rc_context would also undo a notebook's interactive mode
        mpl.rcParams.update(STYLE)
        try:
            return plot(*args, **kwargs)
        finally:
            mpl.rcParams.update(before)

    return drawn


def in_a_row(axes: Any, n: int, height: float, **options: Any) -> np.ndarray:
    """Axes in a row: those given, or n new ones of a figure of that height in inches."""
    if axes is None:
        _, axes = plt.subplots(1, n, figsize=(WIDTH, height), squeeze=False, **options)
    return np.ravel(axes)


def legend_above(ax: Any, ncols: int = 2, **options: Any) -> None:
    """One legend for a figure, above its panels: what is labelled in one of them."""
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(handles, labels, loc="outside upper center", ncols=ncols, fontsize=8, **options)


def shades(colours: str, n: int) -> np.ndarray:
    """Some colours of a map, dark to bright, short of those that are hard to see on white."""
    return plt.colormaps[colours](np.linspace(0, 0.85, n))
