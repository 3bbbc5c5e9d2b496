r"""The Gram matrix of per-sample loss gradients, from which every measure of this library is computed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stiffkit.layers import Buffer, Products, layer_products, layer_squares, products, squared_norms
from stiffkit.measuring import Parameters, free_memory, measured, progress
from stiffkit.mixing import refuse_mixing
from stiffkit.output_gradients import Loss, OutputGradients
from stiffkit.per_sample import VMAP, Pullback, blocks, pullback
from stiffkit.points import Points, PointSet, batches, check_points
from stiffkit.signals import Layers, Signals, UncertainError, certain_layers, signals, trainable

SLICE_BYTES = 64 * 2**20  # the most that the per-sample gradients of one slice of a layer take
PASS_BYTES = 16 * 2**20  # that the points of one forward pass save for its backward pass, which then stay in the cache,
LEAST, MOST = 24, 256  # but as many points at least, where memory allows, and at most; the most on a GPU

Index = slice | Iterable[int] | Tensor
Parts = dict[str, Products]  # by layer
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
    model: nn.Module,
    loss: Loss,
    points: Points,
    points2: Points | None = None,
    *,
    parameters: Parameters | None = None,
    by: str | None = None,
    max_memory: int | None = None,
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
        parameters: those of the parameters that count, by name, or as a function of name and parameter; left out, all.
            Frozen ones never count.
        by: "layer" for one Gram matrix a module that owns parameters; their `dot` add up to the whole.
        max_memory: bytes that are taken beside model, points and result; left out, half of what is free.

    Returns:
        A `GradientGram` of shape (n, m); with `by="layer"` a dict of them by module name.

    Raises:
        ValueError: a loss that is averaged, of a wrong shape, NaN or infinite; a model in train mode with batch norm or
            dropout, or whose points influence each other; a parameter that does not exist, or none at all.

    The backward pass runs in the dtype of the model, sums over more than 65,536 terms in float64; TF32 is switched
    off. The model is left exactly as it was found. Linear layers, convolutions, embeddings and normalisations that are
    called once go layer by layer; all other parameters go through `torch.func`, and where that refuses point by point,
    with a warning.

    >>> model = nn.Linear(2, 2, bias=False).double()
    >>> x, y = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64), torch.tensor([0, 0])
    >>> gradient_gram(model, nn.CrossEntropyLoss(reduction="none"), (x, y)).cos
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)

    """
    if by not in (None, "layer"):
        raise ValueError(f'by must be None or "layer", got {by!r}')
    if max_memory is not None and max_memory <= 0:
        raise ValueError(f"max_memory must be a number of bytes above 0, got {max_memory!r}")
    with measured(model, parameters) as model:
        device = next(model.parameters()).device
        rows = check_points(points, "points", device)
        columns = rows if points2 is None else check_points(points2, "points2", device)
        filled = [s for s in (rows, columns) if len(s)]
        for s in filled[: 1 if rows is columns else 2]:
            refuse_mixing(model, loss, s)
        memory = max_memory or free_memory(device) // 2
        if len(filled) == 2:
            grams = _measure(model, loss, rows, columns, by, memory)
        else:  # the norms of the one set that has points are still wanted
            grams = _measure(model, loss, filled[0], filled[0], by, memory) if filled else _nothing(model, by)
            grams = {name: g.block(range(len(rows)), range(len(columns))) for name, g in grams.items()}
    return grams if by == "layer" else grams[""]


def gradient_norms(
    model: nn.Module,
    loss: Loss,
    points: Points,
    *,
    parameters: Parameters | None = None,
    max_memory: int | None = None,
) -> Tensor:
    r"""The norms $\|g_i\|$ of per-sample loss gradients, without their Gram matrix.

    Arguments and errors are those of `gradient_gram`.

    Returns:
        Shape (n,), float64, on the CPU.

    >>> model = nn.Linear(2, 2, bias=False).double()
    >>> x, y = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64), torch.tensor([0, 0])
    >>> gradient_norms(model, lambda z, y: z.sum(1), (x, y))
    tensor([7.0711, 0.0000], dtype=torch.float64)

    """
    with measured(model, parameters) as model:
        device = next(model.parameters()).device
        checked = check_points(points, "points", device)
        if not len(checked):
            return torch.zeros(0, dtype=torch.float64)
        refuse_mixing(model, loss, checked)
        squares, outputs, _ = unit_squares(model, loss, checked, max_memory or free_memory(device) // 2)
    return (squares.sqrt() * outputs.scale).cpu()


def unit_squares(model: nn.Module, loss: Loss, points: PointSet, memory: int) -> tuple[Tensor, OutputGradients, int]:
    """The squared norms of gradients with output gradients of unit size, these, and the points of one pass."""
    layers = certain_layers(model, loss, points)
    while True:
        try:
            size = _points_in_a_pass(layers.passing + layers.kept, memory, points.device)
            buffer = Buffer(SLICE_BYTES)
            with progress(len(points), "norms") as bar:
                parts = [_squares_of(model, layers, loss, points, k, buffer, bar) for k in batches(len(points), size)]
            break
        except UncertainError as error:
            layers = layers.without(error.names)
    squares, outputs = torch.cat([part for part, _ in parts]), OutputGradients.joined([found for _, found in parts])
    if rest := _rest(model, layers):
        pull = Pullback(model, points, outputs.unit, outputs.scale, rest)
        squares += torch.cat([sum(map(squared_norms, pull.rows(part))) for part in batches(len(points), VMAP)])
    return squares, outputs, size


def _squares_of(
    model: nn.Module, layers: Layers, loss: Loss, points: PointSet, numbers: range, buffer: Buffer, bar: tqdm
) -> tuple[Tensor, OutputGradients]:
    seen = signals(model, layers, loss, points, numbers, len(numbers))
    seen.outputs.check(numbers.start)
    squares = squared_norms(seen.gradients) if layers.width else torch.zeros_like(seen.outputs.scale)
    for name, pieces in seen.signals.items():
        squares = squares + torch.cat([layer_squares(layers.modules[name], a, b, buffer) for a, b in pieces])
    bar.update(len(numbers))
    return squares, seen.outputs


def _rest(model: nn.Module, layers: Layers) -> list[str]:
    """The names of the trainable parameters that are no certain layer's."""
    certain = {id(p) for module in layers.modules.values() for p in trainable(module)}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in certain]


def _measure(
    model: nn.Module, loss: Loss, rows: PointSet, columns: PointSet, by: str | None, memory: int
) -> dict[str, GradientGram]:
    layers = certain_layers(model, loss, rows)
    while True:
        try:
            parts, scales = _by_layers(model, layers, loss, rows, columns, by, memory)
            break
        except UncertainError as error:  # other points may use a layer otherwise
            layers = layers.without(error.names)
    if rest := _rest(model, layers):
        _add_rest(parts, model, loss, rows, columns, rest, by, memory)
    return {name: _assemble(part, scales, rows is columns) for name, part in parts.items()}


def _by_layers(
    model: nn.Module, layers: Layers, loss: Loss, rows: PointSet, columns: PointSet, by: str | None, memory: int
) -> tuple[Parts, Scales]:
    """What certain layers have, block by block: of a set with itself those on and above the diagonal."""
    same = rows is columns
    parts: Parts = {name: _zeros(rows, columns) for name in (layers.modules if by else [""])}
    scales = tuple(torch.zeros(len(s), dtype=torch.float64, device=s.device) for s in (rows, columns))
    batch = _points_in_a_pass(layers.passing, memory, rows.device)
    buffers = Buffer(max(1, min(SLICE_BYTES, memory // 8))), Buffer(max(1, min(SLICE_BYTES, memory // 8)))
    room = max(0, memory - layers.passing * batch - sum(buffer.size for buffer in buffers))
    share = room / 4  # of a block: two are there while the next comes, and none before the first

    def blocks_from(start: int, points: PointSet, whole: float = share) -> Iterator[tuple[range, Signals]]:
        while start < len(points):
            found = signals(model, layers, loss, points, range(start, len(points)), batch, (whole, share))
            yield range(start, start + len(found)), found
            start, whole = start + len(found), share

    steps = len(layers.modules) if by else len(layers.modules) - len(layers.columns) + bool(layers.width)
    pairs = len(rows) * (len(rows) + 1) // 2 if same else len(rows) * len(columns)
    with progress(pairs * steps, "Gram matrix") as bar:
        for i, first in blocks_from(0, rows, room if same else room / 2):
            first.outputs.check(i.start)
            scales[0][i.start : i.stop] = first.outputs.scale
            for j, second in chain([(i, first)], blocks_from(i.stop, rows)) if same else blocks_from(0, columns):
                if not same and i.start == 0:
                    second.outputs.check(j.start)
                scales[1][j.start : j.stop] = second.outputs.scale
                for name, found in _products(layers, first, second, by, buffers):
                    _put(parts[name], i, j, found, same)
                    bar.update(len(i) * (len(i) + 1) // 2 if second is first else len(i) * len(j))
    return parts, scales


def _points_in_a_pass(each: float, memory: int, device: torch.device) -> int:
    """As many as fit into the cache, each saving so many bytes, but between bounds; fewer where memory is short."""
    usual = min(MOST, max(LEAST, PASS_BYTES // max(each, 1))) if device.type == "cpu" else MOST
    return int(max(1, min(usual, memory // 4 // max(each, 1))))


def _products(
    layers: Layers, first: Signals, second: Signals, by: str | None, buffers: tuple[Buffer, Buffer]
) -> Iterator[tuple[str, Products]]:
    """The products of two blocks of points, with the name of the part that they add to."""
    pieces = layers.columns.items() if by else [("", slice(None))]
    for name, piece in pieces if layers.width else ():
        g = first.gradients[:, piece]
        yield name, products(g, g if first is second else second.gradients[:, piece])
    for name, pieces in first.signals.items():
        other = pieces if first is second else second.signals[name]
        yield name if by else "", layer_products(layers.modules[name], pieces, other, buffers)


def _put(part: Products, i: range, j: range, products: Products, same: bool) -> None:
    """Add the products of a block of rows and columns to those of all; norms where they come for the first time."""
    dot, square, square2 = part
    dot[i.start : i.stop, j.start : j.stop] += products[0]
    if same and i != j:
        dot[j.start : j.stop, i.start : i.stop] += products[0].T
    if j.start == (i.start if same else 0):
        square[i.start : i.stop] += products[1]
    if i.start == 0:
        square2[j.start : j.stop] += products[2]


def _add_rest(
    parts: Parts,
    model: nn.Module,
    loss: Loss,
    rows: PointSet,
    columns: PointSet,
    names: list[str],
    by: str | None,
    memory: int,
) -> None:
    """Add what the other parameters have, from their per-sample gradients."""
    same = rows is columns
    first = pullback(model, loss, rows, names)
    second = first if same else pullback(model, loss, columns, names)
    owners = [name.rpartition(".")[0] if by else "" for name in names]
    parts |= {owner: _zeros(rows, columns) for owner in owners if owner not in parts}
    for i, j, g, h in blocks(first, second, memory):
        for owner, g_p, h_p in zip(owners, g, h, strict=True):
            _put(parts[owner], i, j, products(g_p, h_p), same)


def _zeros(rows: PointSet, columns: PointSet) -> Products:
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
