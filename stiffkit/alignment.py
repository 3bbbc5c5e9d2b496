"""Stiffness, and what is averaged over classes."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from stiffkit.gradients import GradientGram, unit_squares
from stiffkit.measuring import Parameters, free_memory, measured, progress
from stiffkit.mixing import refuse_mixing
from stiffkit.output_gradients import Loss, call, floating, weighted_sum
from stiffkit.points import Points, PointSet, batches, check_points

Labels = Tensor | np.ndarray | list[int]


def stiffness(gram: GradientGram, measure: str = "sign") -> Tensor:
    r"""Stiffness of every pair of points: how a small step on one changes the loss of the other.

    $S_{\rm sign} = \operatorname{sign}(g_1 \cdot g_2)$ (Fort et al. 2019, v1 eq. 5) or
    $S_{\cos} = \cos(g_1, g_2)$ (v3). Above zero the step lowers the other loss, below zero it raises it.

    Args:
        gram: as `gradient_gram` returns it, shape (n, m).
        measure: "sign", which the paper prefers between classes, or "cos", which it prefers within a class.

    Returns:
        float64, shape (n, m), in [-1, 1]; 0 where one of the gradients is exactly zero (`gram.zero`); NaN for the
        pairs of a point with itself, whose stiffness is 1 by construction and which no average may count.

    """
    if measure not in ("sign", "cos"):
        raise ValueError(f'measure must be "sign" or "cos", got {measure!r}')
    values = gram.cos.sign() if measure == "sign" else gram.cos
    return values.masked_fill(gram.self_pairs, torch.nan)


def class_stiffness(S: Tensor, y: Labels, y2: Labels | None = None) -> xr.DataArray:
    r"""The class stiffness matrix $C(a, b) = \mathbb E_{x_1 \in a,\, x_2 \in b,\, x_1 \ne x_2}[S]$ (Fort et al., v3).

    Args:
        S: stiffness of pairs, shape (n, m), NaN where a pair is left out.
        y: class of each row, shape (n,).
        y2: class of each column, shape (m,); may be left out if S is a set with itself.

    Returns:
        A DataArray with dimensions class_a (of the point that the step is taken on) and class_b, float64, NaN where a
        cell has no pair. Its coordinate `pairs` counts the pairs behind each cell.

    >>> S = torch.tensor([[torch.nan, 0.5], [0.5, torch.nan]], dtype=torch.float64)
    >>> class_stiffness(S, [7, 7]).item()
    0.5

    """
    S, y = torch.as_tensor(S, dtype=torch.float64), _labels(y)
    if y2 is None and (S.shape[0] != S.shape[1] or not S.diagonal().isnan().all()):
        raise ValueError("S is not a set with itself (its diagonal is not NaN): give y2, the classes of its columns")
    y2 = y if y2 is None else _labels(y2)
    if S.shape != (len(y), len(y2)):
        raise ValueError(f"S has shape {tuple(S.shape)}, but there are {len(y)} and {len(y2)} labels")
    (classes, rows), (classes2, columns) = (class_indicators(labels) for labels in (y, y2))
    return _labelled(*weighted_cells(S, rows, columns), classes, classes2)


def within_between(C: xr.DataArray) -> xr.Dataset:
    r"""Summaries of class matrices: the mean diagonal cell and the mean off-diagonal cell.

    $S_{\rm within} = \frac1{N_c} \sum_c C(c, c)$ and
    $S_{\rm between} = \frac{1}{N_c (N_c - 1)} \sum_{a \ne b} C(a, b)$ (Fort et al., v3 eq. 7): every cell counts alike,
    however many pairs are behind it. Cells that are NaN are left out.

    Args:
        C: with dimensions class_a and class_b; further dimensions (seed, checkpoint) are kept.

    Returns:
        A Dataset with `within` and `between`, in [-1, 1].

    """
    same = C.class_a == C.class_b
    cells = ["class_a", "class_b"]
    return xr.Dataset({"within": C.where(same).mean(cells), "between": C.where(~same).mean(cells)})


def group_stiffness(C: xr.DataArray, groups: Sequence[Hashable]) -> xr.Dataset:
    r"""Summaries of class matrices by groups of classes, as superclasses are (Fort et al., v3, Figs 6 to 8).

    Every cell counts alike. Cells that are NaN are left out; a mean of no cells is NaN.

    Args:
        C: with dimensions class_a and class_b, K classes each; further dimensions (seed, checkpoint) are kept.
        groups: the group of each class, K of them, in the order of `C.class_a`.

    Returns:
        A Dataset, in [-1, 1], with `within`, the mean diagonal cell; `related`, the mean cell of two classes of one
        group; and `unrelated`, of two classes of different groups.

    >>> C = xr.DataArray([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]], dims=("class_a", "class_b"))
    >>> group_stiffness(C, ["fish", "fish", "tree"]).to_array().round(3).values.tolist()
    [1.0, 0.5, 0.1]

    """
    same, own = same_group(C, groups), np.eye(len(groups), dtype=bool)
    kinds = {"within": own, "related": same & ~own, "unrelated": ~same}
    cells = ["class_a", "class_b"]
    return xr.Dataset({name: C.where(xr.DataArray(chosen, dims=cells)).mean(cells) for name, chosen in kinds.items()})


def same_group(C: xr.DataArray, groups: Sequence[Hashable]) -> np.ndarray:
    """Whether two classes are of one group, (K, K)."""
    shape = C.sizes["class_a"], C.sizes["class_b"]
    if shape != (len(groups), len(groups)):
        raise ValueError(
            f"C has {shape[0]} x {shape[1]} classes, and there are {len(groups)} groups: one for each class"
        )
    numbers = np.unique([str(group) for group in groups], return_inverse=True)[1]
    return numbers[:, None] == numbers


def class_cosine(
    model: nn.Module,
    loss: Loss,
    points: Points,
    y: Labels,
    *,
    parameters: Parameters | None = None,
    max_memory: int | None = None,
) -> xr.DataArray:
    r"""The class matrix of cosine stiffness from class sums of normalised gradients, without a Gram matrix.

    With $\hat g_i = g_i / \|g_i\|$, $s_a = \sum_{i \in a} \hat g_i$, $n_a$ points in class a and $m_a$ of them with a
    gradient that is not zero: $C(a, b) = s_a \cdot s_b / (n_a n_b)$ and
    $C(a, a) = (\|s_a\|^2 - m_a) / (n_a (n_a - 1))$. It takes each point's gradient norm and one more backward pass a
    class, and memory for one gradient a class.

    Args:
        model: as for `gradient_gram`.
        loss: as for `gradient_gram`.
        points: as for `gradient_gram`.
        y: class of each point, shape (n,).
        parameters: as for `gradient_gram`.
        max_memory: as for `gradient_gram`, beside one gradient a class in float64.

    Returns:
        As `class_stiffness` of `stiffness(gram, "cos")`, to rounding.

    """
    labels = _labels(y)
    classes, members = class_indicators(labels)
    with measured(model, parameters) as model:
        device = next(model.parameters()).device
        checked = check_points(points, "points", device)
        if len(labels) != len(checked):
            raise ValueError(f"there are {len(checked)} points, but {len(labels)} labels")
        if not len(labels):
            return _labelled(members.T @ members, members.T @ members, classes, classes)
        refuse_mixing(model, loss, checked)
        memory = max_memory or free_memory(device) // 2
        squares, outputs, size = unit_squares(model, loss, checked, memory)
        weights = squares.rsqrt().nan_to_num(posinf=0.0)
        of_class = ((labels == c).nonzero()[:, 0].tolist() for c in classes)
        with progress(len(checked), "class sums") as bar:
            sums = [_class_sum(model, checked, outputs.unit, weights, chosen, size, bar) for chosen in of_class]
        dot = torch.tensor([[float(s @ t) for t in sums] for s in sums], dtype=torch.float64)
    counts, alive = members.sum(0), members.T @ (weights.cpu() > 0).double()
    pairs = counts[:, None] * counts - counts.diag()
    means = ((dot - alive.diag()) / pairs).where(pairs > 0, torch.nan)
    return _labelled(means, pairs, classes, classes)


def _class_sum(
    model: nn.Module,
    points: PointSet,
    unit: list[Tensor | None],
    weights: Tensor,
    members: list[int],
    size: int,
    bar: tqdm,
) -> Tensor:
    """The sum of the members' normalised gradients, by backward passes of their weighted output gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=weights.device)
    for part in batches(len(members), size):
        chosen = members[part.start : part.stop]
        outputs = floating(call(model, points.take(chosen).inputs))
        total += weighted_sum(outputs, [None if u is None else u[chosen] for u in unit], weights[chosen], parameters)
        bar.update(len(chosen))
    return total


def weighted_cells(S: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Means of S over class pairs, and the pairs behind them, from the weight of each point in each class (n, K)."""
    pairs = rows.T @ (~S.isnan()).double() @ columns
    return rows.T @ S.nan_to_num(0.0) @ columns / pairs, pairs


def _labels(y: Labels) -> Tensor:
    y = torch.as_tensor(y).cpu()
    if y.ndim != 1:
        raise ValueError(f"class labels must have shape (n,), got {tuple(y.shape)}")
    return y


def class_indicators(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes in order, and float64 indicators (n, classes)."""
    classes, index = labels.unique(return_inverse=True)
    return classes, (index[:, None] == torch.arange(len(classes))).double()


def _labelled(values: Tensor, pairs: Tensor, classes: Tensor, classes2: Tensor) -> xr.DataArray:
    coordinates = {"class_a": classes.numpy(), "class_b": classes2.numpy()}
    pairs_array = (("class_a", "class_b"), pairs.round().long().numpy())
    return xr.DataArray(values.numpy(), coordinates | {"pairs": pairs_array}, ("class_a", "class_b"), "stiffness")
