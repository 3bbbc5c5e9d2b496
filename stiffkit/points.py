"""Points that are measured: inputs and targets, samples first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Inputs = Tensor | tuple | dict
Points = tuple[Inputs, Any]


@dataclass
class PointSet:
    """Points that have been checked: inputs and targets on the model's device, and their number."""

    inputs: Inputs
    targets: Any
    n: int
    device: torch.device

    def __len__(self) -> int:
        return self.n

    def take(self, index: slice | list[int], images: torch.memory_format = torch.preserve_format) -> "PointSet":
        """Some of the points; inputs of four dimensions in the memory format of `images`."""
        number = len(range(self.n)[index]) if isinstance(index, slice) else len(index)

        def copied(x: Any) -> Any:  # a slice is a view, and a forward pass may work on its input in place
            if not isinstance(x, Tensor):
                return x
            return x.clone(memory_format=images if x.ndim == 4 else torch.preserve_format)

        return PointSet(tree_map(copied, _take(self.inputs, index)), _take(self.targets, index), number, self.device)


def check_points(points: Points, name: str, device: torch.device) -> PointSet:
    """Return the points on the model's device, or say what is wrong with them."""
    if not isinstance(points, (tuple, list)) or len(points) != 2:
        raise TypeError(f"{name} must be a pair (inputs, targets), got {type(points).__name__}")
    inputs, targets = points
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs  # a tokenizer's BatchEncoding is no dict
    inputs, targets = tree_map(lambda leaf: _usable(leaf, device), (inputs, targets))
    lengths = {len(leaf) for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, Tensor) and leaf.ndim}
    if not lengths or isinstance(targets, list):
        raise TypeError(f"{name} must hold tensors whose first dimension counts the samples")
    if len(lengths) > 1:
        raise ValueError(f"{name}: inputs and targets have different numbers of samples: {sorted(lengths)}")
    return PointSet(inputs, targets, lengths.pop(), device)


def _usable(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, np.ndarray):
        leaf = torch.from_numpy(leaf)
    if not isinstance(leaf, Tensor):
        return leaf
    # What inference mode made cannot be saved for a backward pass: copied.
    return (leaf.clone() if leaf.is_inference() else leaf.detach()).to(device)


def _take(tree: Any, index: slice | list[int]) -> Any:
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) and leaf.ndim else leaf, tree)


def batches(n: int, size: int) -> list[range]:
    """The numbers 0 to n - 1 in runs of at most `size`."""
    return [range(i, min(i + size, n)) for i in range(0, n, size)]
