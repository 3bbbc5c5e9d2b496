r"""The Gram matrix of per-sample loss gradients, from which every measure of this library is computed."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stiffkit.layers import Signals, UncertainError, inner, layer_gram, plain_layers, signals, squared_norms
from stiffkit.measuring import measurable, undisturbed
from stiffkit.mixing import refuse_mixing
from stiffkit.output_gradients import Loss
from stiffkit.per_sample import blocks, pullback
from stiffkit.points import Points, PointSet, check_points

Index = slice | Iterable[int] | Tensor
Parts = dict[str, tuple[Tensor, Tensor, Tensor]]  # by layer: inner products (n, m), squared norms (n,) and (m,)
Scales = tuple[Tensor, Tensor]  # the norms of the output gradients, (n,) and (m,), that Parts leave out


@dataclass(frozen=True)
class GradientGram:
    r"""Cosines and norms of the per-sample loss gradients $g_i$ of n points (rows) and m points (columns).

    Attributes:
        cos: $\cos(g_i, g_j)$, shape (n, m), in [-1, 1]; 0 where one of the gradients is exactly zero.
        norms: $\|g_i\|$ of the rows, shape (n,). Kept apart from the cosines: on a fitted point it may be 1e-200.
        norms2: $\|g_j\|$ of the columns, shape (m,).
        self_pairs: shape (n, m), bool, True where row and column are the same point. All False for two sets.

    All tensors are float64 (or bool) on the CPU.

    """

    cos: Tensor
    norms: Tensor
    norms2: Tensor
    self_pairs: Tensor

    @property
    def dot(self) -> Tensor:
        r"""The inner products $g_i \cdot g_j$, shape (n, m); underflows to 0 where the product of norms does."""
        return self.cos * self.norms[:, None] * self.norms2

    @property
    def zero(self) -> Tensor:
        """Where the gradient of a row is exactly zero, shape (n,), bool."""
        return self.norms == 0

    @property
    def zero2(self) -> Tensor:
        """Where the gradient of a column is exactly zero, shape (m,), bool."""
        return self.norms2 == 0

    def block(self, rows: Index, columns: Index) -> "GradientGram":
        """The Gram matrix of some of the rows and columns, given as slices or indices.

        Measured once over training and validation points together, the three regimes train-train, train-validation and
        validation-validation are blocks of one matrix. An index given twice makes two copies of one point, whose pair
        counts as a pair of a point with itself.
        """
        i, j = (_index(k, n) for n, k in zip(self.cos.shape, (rows, columns), strict=True))
        return GradientGram(self.cos[i][:, j], self.norms[i], self.norms2[j], self.self_pairs[i][:, j])

    def __repr__(self) -> str:
        n, m = self.cos.shape
        pairs, zero = int(self.self_pairs.sum()), int(self.zero.sum())
        return f"GradientGram({n} x {m} points; {pairs} self pairs; zero gradients: {zero} rows)"


def _index(index: Index, n: int) -> Tensor:
    if not isinstance(index, slice):
        index = torch.as_tensor(index if hasattr(index, "__array__") else list(index))
        index = index if index.numel() else index.long()
    return torch.arange(n)[index]


def gradient_gram(
    model: nn.Module, loss: Loss, points: Points, points2: Points | None = None, *, by: str | None = None
) -> GradientGram | dict[str, GradientGram]:
    r"""The Gram matrix $K_{ij} = g_i \cdot g_j$ of per-sample loss gradients $g_i = \nabla_W \ell(f_W(x_i), y_i)$.

    To first order a gradient step of size $\varepsilon$ on point i changes the loss of point j by
    $-\varepsilon K_{ij}$ (Fort et al. 2019, section 2).

    Args:
        model: any module in which points do not influence each other. Every parameter that requires a gradient counts.
        loss: `loss(outputs, targets)` gives one loss a point, shape (n,), for any n, as
            `nn.CrossEntropyLoss(reduction="none")` does. The outputs reach it in float64; where it calls cross-entropy,
            gradients of fitted points keep their digits up to a logit gap of 700. A loss that is an `nn.Module` gets
            the `.logits` of an output object that has them.
        points: `(inputs, targets)`, samples first. A tensor is passed as `model(x)`, a tuple as `model(*x)`, a dict as
            `model(**x)`.
        points2: the columns; left out, the first set with itself.
        by: "layer" for one Gram matrix a module that owns parameters; their `dot` add up to the whole.

    Returns:
        A `GradientGram` of shape (n, m); with `by="layer"` a dict of them by module name.

    Raises:
        ValueError: a loss that is averaged, of a wrong shape, NaN or infinite; a model in train mode with batch norm or
            dropout, or whose points influence each other.

    The backward pass runs in the dtype of the model, sums over more than 65,536 terms in float64; TF32 is switched
    off. The model is left exactly as it was found. Networks made of `nn.Linear` and `nn.Conv2d` alone go layer by
    layer without per-sample gradients of the linear layers; others go whole through `torch.func`, and point by point,
    with a warning, where that refuses.

    >>> model = nn.Linear(2, 2, bias=False).double()
    >>> x, y = torch.tensor([[3.0, 4.0], [4.0, -3.0]], dtype=torch.float64), torch.tensor([0, 0])
    >>> gradient_gram(model, nn.CrossEntropyLoss(reduction="none"), (x, y)).cos
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)

    """
    if by not in (None, "layer"):
        raise ValueError(f'by must be None or "layer", got {by!r}')
    model = measurable(model)
    device = next(model.parameters()).device
    with undisturbed(model):
        rows = check_points(points, "points", device)
        columns = rows if points2 is None else check_points(points2, "points2", device)
        filled = [s for s in (rows, columns) if len(s)]
        for s in filled[: 1 if rows is columns else 2]:
            refuse_mixing(model, loss, s)
        if len(filled) == 2:
            grams = _measure(model, loss, rows, columns, by)
        else:  # the norms of the one set that has points are still wanted
            grams = _measure(model, loss, filled[0], filled[0], by) if filled else _nothing(model, by)
            grams = {name: g.block(range(len(rows)), range(len(columns))) for name, g in grams.items()}
    return grams if by == "layer" else grams[""]


def _measure(
    model: nn.Module, loss: Loss, rows: PointSet, columns: PointSet, by: str | None
) -> dict[str, GradientGram]:
    layers = plain_layers(model)
    if layers:
        with suppress(UncertainError):
            parts, scales = _layer_by_layer(model, layers, loss, rows, columns, by)
            return {name: _assemble(part, scales, rows is columns) for name, part in parts.items()}
    parts, scales = _whole(model, loss, rows, columns, by)
    return {name: _assemble(part, scales, rows is columns) for name, part in parts.items()}


def _layer_by_layer(
    model: nn.Module, layers: dict[str, nn.Module], loss: Loss, rows: PointSet, columns: PointSet, by: str | None
) -> tuple[Parts, Scales]:
    first = signals(model, layers, loss, rows)
    second = first if rows is columns else signals(model, layers, loss, columns)
    parts: Parts = {}
    for name, module in layers.items():
        g, h = first.by_layer[name], second.by_layer[name]
        products = layer_gram(module, g, g if first is second else h)
        if not _agrees(name, first, second, products):
            raise UncertainError(f"layer {name!r} sums to something else than autograd's gradient")
        total = parts.get(key := name if by == "layer" else "")
        parts[key] = products if total is None else tuple(t + p for t, p in zip(total, products, strict=True))
    return parts, (first.scale, second.scale)


def _whole(model: nn.Module, loss: Loss, rows: PointSet, columns: PointSet, by: str | None) -> tuple[Parts, Scales]:
    same = rows is columns
    first = pullback(model, loss, rows)
    second = first if same else pullback(model, loss, columns)
    owners = [name.rpartition(".")[0] if by == "layer" else "" for name in first.names]
    parts: Parts = {owner: _zeros(rows, columns) for owner in owners}
    for i, j, g, h in blocks(first, second):
        for owner, g_p, h_p in zip(owners, g, h, strict=True):
            dot, square, square2 = parts[owner]
            products = inner(g_p, h_p)
            dot[i.start : i.stop, j.start : j.stop] += products
            if same and i != j:
                dot[j.start : j.stop, i.start : i.stop] += products.T
            if j.start == (i.start if same else 0):
                square[i.start : i.stop] += squared_norms(g_p)
            if i.start == 0:
                square2[j.start : j.stop] += squared_norms(h_p)
    return parts, (first.scale, second.scale)


def _zeros(rows: PointSet, columns: PointSet) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (rows.n, columns.n), (rows.n,), (columns.n,)
    return tuple(torch.zeros(shape, dtype=torch.float64, device=rows.device) for shape in shapes)


def _assemble(part: tuple[Tensor, Tensor, Tensor], scales: Scales, same: bool) -> GradientGram:
    dot, *squares = (x.cpu() for x in part)
    bad = (~squares[0].isfinite()).nonzero()[:, 0].tolist() + (~squares[1].isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"the gradient is not finite at {len(bad)} point(s), index {', '.join(map(str, bad[:10]))}")
    lengths = [square.sqrt() for square in squares]
    cos = dot
    for length, shape in zip(lengths, ((-1, 1), (1, -1)), strict=True):
        cos = cos * torch.where(length > 0, 1 / length, 0.0).view(shape)
    norms, norms2 = (length * scale.cpu() for length, scale in zip(lengths, scales, strict=True))
    cos = cos.clamp(-1, 1) * (norms != 0)[:, None] * (norms2 != 0)
    self_pairs = torch.eye(len(norms), dtype=torch.bool) if same else torch.zeros(cos.shape, dtype=torch.bool)
    if same:
        cos = cos.where(~self_pairs, (norms != 0).double())
    return GradientGram(cos, norms, norms2, self_pairs)


def _nothing(model: nn.Module, by: str | None) -> dict[str, GradientGram]:
    """The Gram matrices of no points at all."""
    owners = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    none = torch.zeros(0, dtype=torch.float64)
    empty = GradientGram(none.view(0, 0), none, none, none.view(0, 0).bool())
    return dict.fromkeys(owners if by == "layer" else [""], empty)


def _agrees(name: str, first: Signals, second: Signals, products: tuple[Tensor, Tensor, Tensor]) -> bool:
    r"""Hold $w^\top K w'$ of a layer to the inner product of two sums of gradients that plain autograd has taken.

    A kink of a ReLU decided otherwise may move it a little; a layer whose rows are not the samples, by far.
    """
    dot, square, square2 = products
    w, w2 = first.weights.double(), second.weights.double()
    expected = first.totals[name].double() @ second.totals[name].double()
    size = ((w.square() @ square) * (w2.square() @ square2)).sqrt()
    return bool((w @ dot @ w2 - expected).abs() <= 1e-3 * size)
