r"""Per-sample gradients of layers, from the input $a_i$ and output gradient $b_i$ of each, and their inner products.

One forward and one backward pass give both for every layer and sample. With t running over positions of a sequence or
an image, the gradient of sample i is

* of a linear layer $\sum_t b_{it} a_{it}^\top$, and $\sum_t b_{it}$ of its bias; with one position the inner products
  are $(a_i\cdot a_j + 1)\,(b_i\cdot b_j)$, so that the gradients, rows x columns numbers a sample, are never formed;
* of a convolution the same, with the patch that each position sees in place of $a_{it}$;
* of an embedding $\sum_{t:\,a_{it} = k} b_{it}$ for every token k; the inner products are sums over the tokens that
  both samples have, and again no gradient is formed whole;
* of a normalisation $\sum_t b_{it} \odot \hat x_{it}$ for the gain, $\hat x$ the normalised input, and
  $\sum_t b_{it}$ for the shift.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLUMNS = 65_536  # the longest float32 sum; longer ones are added in float64 (a sum over 1e8 columns would err by 3e-2)
ROWS = 128  # rows at a time in a product of a set with itself, of which the lower triangle is left out
PATCH_BYTES = 2**21  # of the patches of as many images as are multiplied at a time, to stay in the cache
PATCH_BYTES_OF_GPU = 2**28
SMALL, LARGE = 1e-12, 1e12  # sizes between which float32 products keep their digits
SHORT = 32  # numbers: rows of a kernel that are shorter are multiplied together

Signal = tuple[Tensor, Tensor]  # a layer's input a and output gradient b, samples first
Products = tuple[Tensor, Tensor, Tensor]  # inner products (n, m) and squared norms (n,) and (m,), float64


def is_plain(module: nn.Module) -> bool:
    """Whether this module knows the gradient of the layer: of its very type, without hooks or a forward of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    known = type(module) is nn.Embedding or type(module) in GRADIENTS
    return known and not hooked and "forward" not in vars(module)


def has_shape(module: nn.Module, a: Tensor, n: int) -> bool:
    """Whether a layer's input has n samples first, and the dimensions that the layer's gradient is known for."""
    if isinstance(module, CONVOLUTIONS):
        return a.ndim == 2 + len(module.kernel_size) and len(a) == n
    if isinstance(module, nn.BatchNorm1d):
        return a.ndim in (2, 3) and len(a) == n
    least = 1 if isinstance(module, nn.Embedding) else 2
    return a.ndim >= least and len(a) == n


def without_idle_positions(module: nn.Module, a: Tensor, b: Tensor) -> Signal:
    """Linear layers and embeddings without positions whose output gradient is zero in every sample.

    In the last block of a network that reads off one token all positions but that one are such.
    """
    if type(module) not in (nn.Linear, nn.Embedding):
        return a, b
    b = b.flatten(1, -2) if b.ndim > 2 else b[:, None]
    a = a.reshape(len(a), b.shape[1], -1)
    if b.shape[1] == 1:
        return a, b
    used = b.any(dim=2).any(dim=0)
    if used.all() or not len(b):
        return a, b
    return a[:, used], b[:, used]


def width(module: nn.Module) -> int:
    """The trainable numbers of a layer."""
    return sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)


class Buffer:
    """Memory for slices of gradients, `size` bytes each at most, that is used again.

    Fresh memory for every slice would cost as much as the products that fill it; the same goes for patches of images.
    """

    def __init__(self, size: int = sys.maxsize) -> None:
        self.size = size
        self._memory = {"slice": torch.empty(0), "patches": torch.empty(0)}

    def columns(self, *sets: Sequence[Signal]) -> int:
        """Of a slice of the gradients of so many samples."""
        return self.size // max(sum(len(b) for _, b in pieces) * pieces[0][1].element_size() for pieces in sets)

    def empty(self, what: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor for a slice or for patches, in place of the last one."""
        memory = self._memory[what]
        if memory.numel() < prod(shape) or (memory.dtype, memory.device) != (like.dtype, like.device):
            del memory
            self._memory[what] = torch.empty(0)  # free before there is new memory
            self._memory[what] = like.new_empty(prod(shape))
        return self._memory[what][: prod(shape)].view(shape)


def gradients(module: nn.Module, pieces: Sequence[Signal], columns: int, buffer: Buffer) -> Iterator[Tensor]:
    """The per-sample gradients of a layer's trainable parameters, in slices (n, at most about `columns`).

    A slice may lie in the buffer, that is in the memory of those before it. Pieces are samples below each other, whose
    sequences may have different lengths.
    """
    formed = GRADIENTS[type(module)]
    if len(pieces) == 1:
        yield from formed(module, *pieces[0], columns, buffer)
        return
    for parts in zip(*(formed(module, a, b, columns, Buffer()) for a, b in pieces), strict=True):
        rows, numbers = sum(map(len, parts)), parts[0].shape[1]
        yield torch.cat(parts, out=buffer.empty("slice", parts[0], rows, numbers))


def _linear(module: nn.Linear, a: Tensor, b: Tensor, columns: int, buffer: Buffer) -> Iterator[Tensor]:
    if _trains(module, "bias"):
        yield b.sum(dim=1)
    if not _trains(module, "weight"):
        return
    left, right = (b, a) if b.shape[2] >= a.shape[2] else (a, b)  # the wider one is cut: products stay square
    for part in slices(left.shape[2], columns // right.shape[2]):
        piece = left[:, :, part].mT
        yield torch.bmm(piece, right, out=buffer.empty("slice", a, len(a), piece.shape[1], right.shape[2])).flatten(1)


def _convolution(module: nn.Module, a: Tensor, b: Tensor, columns: int, buffer: Buffer) -> Iterator[Tensor]:
    """Numbered by output channel, place in the kernel, input channel: no product of gradients depends on the order."""
    if _trains(module, "bias"):
        yield b.flatten(2).sum(dim=2)
    if not _trains(module, "weight"):
        return
    axes = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
    a, b = _padded(module, a).movedim(1, -1), b.movedim(1, -1)
    if a.shape[-1] // module.groups * prod(module.kernel_size[1:]) < SHORT:
        a, b, axes = a.unsqueeze(1), b.unsqueeze(1), [(1, 1, 1), *axes]
    kernel = prod(size for size, *_ in axes)
    for a_group, b_group in zip(a.chunk(module.groups, -1), b.chunk(module.groups, -1), strict=True):
        for part in slices(a_group.shape[-1], columns // (b_group.shape[-1] * kernel)):
            channels = a_group[..., part]
            rest = kernel // axes[0][0] * channels.shape[-1]
            found = buffer.empty("slice", a, axes[0][0], len(a), b_group.shape[-1], rest)
            each = found[0, 0, 0].numel() * b[0, ..., 0].numel() * a.element_size()
            images = max(1, (PATCH_BYTES if a.device.type == "cpu" else PATCH_BYTES_OF_GPU) // each)
            for g, x, y in zip(found.split(images, 1), channels.split(images), b_group.split(images), strict=True):
                _by_kernel_rows(g, x.contiguous(), y.flatten(1, -2).mT, y.shape[1:-1], axes, buffer)
            yield from found.flatten(2)


def _padded(module: nn.Module, a: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around = module._reversed_padding_repeated_twice
    return F.pad(a, around, mode=mode) if any(around) else a


def _by_kernel_rows(
    found: Tensor, a: Tensor, b: Tensor, positions: torch.Size, axes: list[tuple[int, int, int]], buffer: Buffer
) -> None:
    """Fill in the gradients (kernel rows, n, outputs, rest) of inputs (n, ..., channels), b being (n, outputs, t).

    Patches are unfolded along all axes but the first, along which the rows of the kernel are shifted views.
    """
    image, row, *along, channel = a.stride()
    (size, stride, dilation), *others = axes
    steps = [s * k for s, (_, k, _) in zip(along, others, strict=True)]
    within = [s * d for s, (_, _, d) in zip(along, others, strict=True)]
    shape = (*a.shape[:2], *positions[1:], *(k for k, _, _ in others), a.shape[-1])
    windows = a.as_strided(shape, (image, row, *steps, *within, channel), a.storage_offset())
    windows = buffer.empty("patches", a, *shape).copy_(windows).view(*a.shape[:2], prod(positions[1:]), -1)
    for k in range(size):
        rows = windows[:, k * dilation :: stride][:, : positions[0]]
        torch.bmm(b, rows.flatten(1, 2), out=found[k])


def _normalisation(module: nn.Module, a: Tensor, b: Tensor, columns: int, buffer: Buffer) -> Iterator[Tensor]:
    """The affine part of a normalisation, whose parameters lie along the last dimensions or along the channels."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        summed = range(1, a.ndim - len(module.normalized_shape))
    else:
        summed = range(2, a.ndim)
    for name, values in (("bias", lambda: b), ("weight", lambda: b * _normalised(module, a))):
        if _trains(module, name):
            found = values()
            yield (found.sum(dim=tuple(summed)) if summed else found).flatten(1)


def _normalised(module: nn.Module, a: Tensor) -> Tensor:
    """The input normalised, before gain and shift."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(a, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(a, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(a, module.num_groups, eps=module.eps)
    return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


def _trains(module: nn.Module, name: str) -> bool:
    parameter = getattr(module, name, None)
    return parameter is not None and parameter.requires_grad


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GRADIENTS: dict[type, Callable[[nn.Module, Tensor, Tensor, int, Buffer], Iterator[Tensor]]] = {
    nn.Linear: _linear,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(
        (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _normalisation
    ),
}


def layer_products(
    module: nn.Module, rows: Sequence[Signal], columns: Sequence[Signal], buffers: tuple[Buffer, Buffer]
) -> Products:
    """One layer's inner products and squared norms from its signals; gradients are formed a buffer at a time.

    Signals come in pieces, as `gradients` takes them.
    """
    if isinstance(module, nn.Linear) and all(len(p) == 1 and p[0][1].shape[1] == 1 for p in (rows, columns)):
        return _vectors(module, rows[0], columns[0])
    if isinstance(module, nn.Embedding):
        return _embedding_products(module, rows, columns, buffers[0].size)
    step = buffers[0].columns(rows, columns)
    sets = [rows] if rows is columns else [rows, columns]
    slices_of_sets = (gradients(module, pieces, step, buffer) for pieces, buffer in zip(sets, buffers, strict=False))
    return summed(zip(*slices_of_sets, strict=True))


def layer_squares(module: nn.Module, a: Tensor, b: Tensor, buffer: Buffer) -> Tensor:
    """The squared norms of one layer's gradients, (n,) in float64, by whichever form of them costs less."""
    if isinstance(module, nn.Linear):
        positions, inputs, outputs = a.shape[1], a.shape[2], b.shape[2]
        short = positions * (inputs + outputs) < inputs * outputs
        if short and all(_at_size_one(x.flatten(1))[1] is None for x in (a, b)):
            pairs = torch.bmm(a, a.mT) if _trains(module, "weight") else a.new_zeros(len(a), positions, positions)
            pairs += float(_trains(module, "bias"))
            return (pairs * torch.bmm(b, b.mT)).flatten(1).double().sum(dim=1)
    if isinstance(module, nn.Embedding):
        samples, _, values = _rows_of_tokens(module, [(a, b)])
        squares = torch.zeros(len(a), dtype=torch.float64, device=b.device)
        return squares.index_add_(0, samples, squared_norms(values))
    pieces = [(a, b)]
    return sum(squared_norms(g) for g in gradients(module, pieces, buffer.columns(pieces), buffer))


def squares_and_sum(module: nn.Module, a: Tensor, b: Tensor, buffer: Buffer) -> tuple[Tensor, Tensor]:
    """The squared norms of one layer's gradients, (n,), and that of their sum, a number; in float64."""
    if isinstance(module, (nn.Linear, nn.Embedding)):  # samples may stand for positions of a single one
        whole = (x.flatten(0, 1)[None] for x in (a, b))
        return layer_squares(module, a, b, buffer), layer_squares(module, *whole, buffer)[0]
    parts = gradients(module, [(a, b)], buffer.columns([(a, b)]), buffer)
    found = [(squared_norms(g), squared_norms(g.sum(dim=0, keepdim=True))[0]) for g in parts]
    return tuple(map(sum, zip(*found, strict=True)))


def summed(parts: Iterator[tuple[Tensor, ...]]) -> Products:
    """The products of gradients that come in slices (n, columns), of one set or of two."""
    total: Products | None = None
    for part in parts:
        found = products(part[0], part[-1])
        total = found if total is None else tuple(t + f for t, f in zip(total, found, strict=True))
    return total


def products(g: Tensor, h: Tensor) -> Products:
    """The inner products and the squared norms of rows; a set with itself if both are one tensor."""
    dot = inner(g, h)
    square = dot.diagonal().clone() if g is h else squared_norms(g)
    return dot, square, square if g is h else squared_norms(h)


def _vectors(module: nn.Linear, rows: Signal, columns: Signal) -> Products:
    """(a . a' + 1) (b . b'), or its parts where weight or bias is frozen."""
    sets = [tuple(x[:, 0] for x in signal) for signal in ([rows] if rows is columns else [rows, columns])]
    (a, b), (a2, b2) = sets[0], sets[-1]
    of_bias = float(_trains(module, "bias"))
    weights = products(a, a2) if _trains(module, "weight") else (0.0, 0.0, 0.0)
    return tuple(
        (of_weight + of_bias) * of_output for of_weight, of_output in zip(weights, products(b, b2), strict=True)
    )


def _embedding_products(
    module: nn.Embedding, rows: Sequence[Signal], columns: Sequence[Signal], slice_bytes: int
) -> Products:
    """Those of two sets are a block of those of both together."""
    if rows is columns:
        dot = _embedding_gram(module, rows, slice_bytes)
        return dot, dot.diagonal(), dot.diagonal()
    n = sum(len(b) for _, b in rows)
    dot = _embedding_gram(module, [*rows, *columns], slice_bytes)
    return dot[:n, n:], dot.diagonal()[:n], dot.diagonal()[n:]


def _embedding_gram(module: nn.Embedding, pieces: Sequence[Signal], slice_bytes: int) -> Tensor:
    """Token by token: two samples have only those rows in common whose tokens both of them have."""
    n, b = sum(len(b) for _, b in pieces), pieces[0][1]
    scaled = [_at_size_one(b.flatten(1)) for _, b in pieces]
    shaped = [(a, flat.view(b.shape)) for (a, b), (flat, _) in zip(pieces, scaled, strict=True)]
    samples, tokens, values = _rows_of_tokens(module, shaped)
    _, counts = tokens.unique_consecutive(return_counts=True)
    ends, total = counts.cumsum(0), torch.zeros(n * n, dtype=torch.float64, device=b.device)
    for k in range((n - 1).bit_length() + 1):  # tokens that at most 2^k samples have, and more than half as many
        most = 2**k
        chosen = (counts <= most) & (2 * counts > most)
        for end, count in zip(*(x[chosen].split(_at_once(most, b, slice_bytes)) for x in (ends, counts)), strict=True):
            place = torch.arange(most, device=b.device)
            there = place < count[:, None]
            place = torch.where(there, (end - count)[:, None] + place, 0)
            found = values[place] * there[:, :, None]
            who = samples[place]
            pairs = (n * who[:, :, None] + who[:, None]).flatten()
            total.index_add_(0, pairs, torch.bmm(found, found.mT).double().flatten())
    total = total.view(n, n)
    if all(size is None for _, size in scaled):
        return total
    size = torch.cat([_or_ones(size, flat) for flat, size in scaled])
    return total * size[:, None] * size


def _at_once(most: int, b: Tensor, slice_bytes: int) -> int:
    """How many tokens that so many samples have are multiplied at a time."""
    return max(1, slice_bytes // (most * (most * 24 + b.shape[2] * b.element_size())))


def _rows_of_tokens(module: nn.Embedding, pieces: Sequence[Signal]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of an embedding's gradients that are not zero: whose sample's, for which token, and the row itself.

    One for each token of each sample, but for the padding's, in the order of the tokens.
    """
    n = sum(len(a) for a, _ in pieces)
    keys, values, first = [], [], 0
    for a, b in pieces:
        tokens = a[:, :, 0].long()
        kept = tokens != (-1 if module.padding_idx is None else module.padding_idx)
        keys.append((n * tokens + torch.arange(first, first + len(a), device=a.device)[:, None])[kept])
        values.append(b[kept])
        first += len(a)
    keys, place = torch.cat(keys).unique(return_inverse=True)
    values = torch.cat(values)
    return keys % n, keys // n, values.new_zeros(len(keys), values.shape[1]).index_add_(0, place, values)


def slices(size: int, most: int) -> Iterator[slice]:
    """The numbers to size in runs of about one length, of `most` at most but of one at least."""
    parts = -(-size // max(1, most))
    step = -(-size // max(1, parts))
    return (slice(start, start + step) for start in range(0, size, step))


def inner(g: Tensor, h: Tensor) -> Tensor:
    """The inner products of rows, (n, m) in float64, summed in blocks of `COLUMNS`."""
    if g is h:
        total = _by_blocks(g, g)
        square = total.diagonal()
        unusual = ~((square > SMALL**2) & (square < LARGE**2))
        if not unusual.any() or not g[unusual].any():
            return total
    (g, size), (h, size2) = (_at_size_one(g),) * 2 if g is h else (_at_size_one(g), _at_size_one(h))
    total = _by_blocks(g, h)
    return total if size is size2 is None else total * _or_ones(size, g)[:, None] * _or_ones(size2, h)


def _by_blocks(g: Tensor, h: Tensor) -> Tensor:
    blocks = zip(g.split(COLUMNS, dim=1), h.split(COLUMNS, dim=1), strict=True)
    return sum(_symmetric(a) if g is h else (a @ b.T).double() for a, b in blocks)


def _symmetric(g: Tensor) -> Tensor:
    """Return g gᵀ in float64, at little more than half the cost of a general product."""
    n = len(g)
    product = torch.empty(n, n, dtype=torch.float64, device=g.device)
    for start in range(0, n, ROWS):
        block, below = slice(start, start + ROWS), slice(start + ROWS, n)
        product[block, start:] = g[block] @ g[start:].T
        product[below, block] = product[block, below].T
    return product


def squared_norms(g: Tensor) -> Tensor:
    """The squared norm of each row, (n,) in float64."""
    g, size = _at_size_one(g)
    total = sum(part.square().sum(dim=1).double() for part in g.split(COLUMNS, dim=1))
    return total if size is None else total * size.square()


def _at_size_one(g: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows with their largest entry (n,) in float64 taken out, where float32 products would leave their range."""
    largest = torch.maximum(g.amax(dim=1), -g.amin(dim=1))  # an order of magnitude quicker than g.abs().amax
    usual = ((largest > SMALL) & (largest < LARGE)) | (largest == 0)
    if usual.all():
        return g, None
    size = largest.where(~usual, 1.0)
    return g / size[:, None], size.double()


def _or_ones(size: Tensor | None, g: Tensor) -> Tensor:
    return torch.ones(len(g), dtype=torch.float64, device=g.device) if size is None else size
