"""The three regimes: pairs of training points, of a training and a validation point, and of validation points."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from torch import Tensor

from stiffkit.alignment import class_indicators, stiffness, weighted_cells
from stiffkit.gradients import GradientGram

REGIMES = ("train-train", "train-val", "val-val")
MEASURES = ("sign", "cos")


def sides(parts: dict[str, slice]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each regime in a Gram matrix over all points; `parts` are the slices of "train" and "val"."""
    return ((parts[rows], parts[columns]) for rows, columns in (regime.split("-") for regime in REGIMES))


def blocks(gram: GradientGram, y: Tensor, parts: dict[str, slice]) -> Iterator[tuple[GradientGram, Tensor, Tensor]]:
    """The Gram matrix of each regime, with the class indicators (n, classes) of its rows and of its columns."""
    members = class_indicators(y)[1]
    for rows, columns in sides(parts):
        yield gram.block(rows, columns), members[rows], members[columns]


def class_matrices(gram: GradientGram, y: Tensor, parts: dict[str, slice]) -> list[list[np.ndarray]]:
    """The class matrices of each regime and, in it, of each measure."""
    return [[cells(block, measure, *ys) for measure in MEASURES] for block, *ys in blocks(gram, y, parts)]


def cells(block: GradientGram, measure: str, rows: Tensor, columns: Tensor) -> np.ndarray:
    """The class matrix of a block, as `class_stiffness` has it, without its labels."""
    return weighted_cells(stiffness(block, measure), rows, columns)[0].numpy()


def labelled(values: Sequence, axes: Mapping[str, Sequence], y: Tensor) -> xr.DataArray:
    """Class matrices with their axes, and with the classes that occur in y along class_a and class_b."""
    classes = y.unique().numpy()
    return xr.DataArray(np.array(values), {**axes, "class_a": classes, "class_b": classes})
