r"""Gram matrices of networks made of linear and convolutional layers, from layer inputs and output gradients alone.

One forward and one backward pass give for every layer and sample the input $a_i$ and the gradient $b_i$ of the layer's
output. A linear layer on vectors has the per-sample gradient $b_i a_i^\top$ (and $b_i$ for the bias), so its part of
the Gram matrix is $(a_i\cdot a_j + 1)\,(b_i\cdot b_j)$: the gradient itself, rows x columns numbers a sample, is never
formed. On sequences and for convolutions the sum over positions is formed, one slice of one layer at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from stiffkit.output_gradients import (
    Loss,
    OutputGradients,
    call,
    floating,
    output_gradients,
    parameters_of,
    weighted_sum,
)
from stiffkit.points import PointSet, batches

COLUMNS = 65_536  # the longest float32 sum; longer ones are added in float64 (a sum over 1e8 columns would err by 3e-2)
SLICE_BYTES = 64 * 2**20  # the most that the per-sample gradients of one slice of a layer take
ROWS = 128  # rows at a time in a product of a set with itself, of which the lower triangle is left out
BATCH = 64  # points in one forward and backward pass


Signal = tuple[Tensor, Tensor]  # a layer's input a and output gradient b, samples first


class UncertainError(Exception):
    """A layer's gradient cannot be told from its input and output gradient for certain."""


@dataclass
class Signals:
    r"""For each layer its inputs a and output gradients b, samples first, and what was taken out of b.

    `totals` are $\sum_i w_i g_i$ over all points, a vector a layer, by plain autograd, with random `weights` w (n,):
    what the layers' inputs and output gradients say of the same sum has to agree.
    """

    by_layer: dict[str, Signal]
    scale: Tensor
    weights: Tensor
    totals: dict[str, Tensor]


def plain_layers(model: nn.Module) -> dict[str, nn.Module] | None:
    """The layers by name if every trainable parameter belongs to one plain nn.Linear or nn.Conv2d, else None."""
    owners = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if _trainable(module)]
    parameters = [p for _, module in owners for p in module.parameters(recurse=False)]
    tied = len({id(p) for p in parameters}) < len(parameters)
    return None if tied or not all(_is_plain(module) for _, module in owners) else dict(owners)


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooked or "forward" in vars(module):
        return False
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def signals(model: nn.Module, layers: dict[str, nn.Module], loss: Loss, points: PointSet) -> Signals:
    """Run the model on all points and return every layer's inputs and output gradients.

    Raises:
        UncertainError: if a layer or one of its parameters is used in another way than by one plain call.

    """
    found: dict[str, list[Signal]] = {name: [] for name in layers}
    weights = torch.randn(len(points), generator=torch.Generator().manual_seed(0)).to(points.device)
    parameters = [_trainable(module) for module in layers.values()]
    totals = [0.0] * len(layers)
    gradients = []
    for numbers in batches(len(points), BATCH):
        part = slice(numbers.start, numbers.stop)
        batch = points.take(part)
        with _Calls(layers) as calls:
            outputs = call(model, batch.inputs)
        gradients.append(output_gradients(outputs, loss, batch))
        for name, signal in calls.differentiate(floating(outputs), gradients[-1].unit, len(batch)).items():
            found[name].append(signal)
        summed = weighted_sum(
            floating(outputs), gradients[-1].unit, weights[part], [p for owned in parameters for p in owned]
        )
        pieces = summed.split([sum(p.numel() for p in owned) for owned in parameters])
        totals = [total + piece for total, piece in zip(totals, pieces, strict=True)]
    scale = OutputGradients.joined(gradients).scale
    joined = {name: tuple(torch.cat(parts) for parts in zip(*found[name], strict=True)) for name in layers}
    return Signals(joined, scale, weights, dict(zip(layers, totals, strict=True)))


def _trainable(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


class _Calls:
    """Records, while the model runs, each layer's input and where its output sits in the autograd graph."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.inputs: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in layers}
        self.edges: dict[str, object] = {}

    def __enter__(self) -> Self:
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if len(args) == 1 and output.requires_grad:
                self.inputs[name].append((args[0], args[0]._version))
                # The edge is taken now: an in-place ReLU may turn the tensor into something else.
                self.edges[name] = get_gradient_edge(output)

        return hook

    def differentiate(self, outputs: list[Tensor], unit: list[Tensor | None], n: int) -> dict[str, Signal]:
        """Each layer's input and output gradient, for n samples whose output gradients are `unit`."""
        pairs = [(z, u.to(z.dtype)) for z, u in zip(outputs, unit, strict=True) if u is not None and z.requires_grad]
        uses = parameters_of([z for z, _ in pairs])
        for name, module in self.layers.items():
            if len(self.inputs[name]) != 1 or any(uses[p] != 1 for p in _trainable(module)):
                raise UncertainError(f"layer {name!r} is not used exactly once, by a call")
        gradients = torch.autograd.grad(
            [z for z, _ in pairs],
            [self.edges[name] for name in self.layers],
            [u for _, u in pairs],
            retain_graph=True,
        )
        return {
            name: (self._input(name, n), self._samples_first(name, b, n))
            for name, b in zip(self.layers, gradients, strict=True)
        }

    def _input(self, name: str, n: int) -> Tensor:
        a, version = self.inputs[name][0]
        if a._version != version:
            raise UncertainError(f"the input of layer {name!r} was changed in place after the call")
        return self._samples_first(name, a.detach(), n)

    def _samples_first(self, name: str, tensor: Tensor, n: int) -> Tensor:
        dimensions = (4,) if isinstance(self.layers[name], nn.Conv2d) else range(2, 100)
        if tensor.ndim not in dimensions or len(tensor) != n:
            raise UncertainError(f"layer {name!r} does not keep one row a sample")
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def layer_gram(module: nn.Module, rows: Signal, columns: Signal) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's inner products (n, m), and the squared norms (n,) and (m,), in float64."""
    sets = [rows] if rows is columns else [rows, columns]
    if isinstance(module, nn.Linear) and rows[0].ndim == 2:
        squares = [_vectors(module, signal, signal, lambda g, _: squared_norms(g)) for signal in sets]
        return _vectors(module, rows, columns, inner), squares[0], squares[-1]
    n, m = len(rows[0]), len(columns[0])
    dot, square, square2 = (torch.zeros(s, dtype=torch.float64, device=rows[0].device) for s in ((n, m), n, m))
    for parts in zip(*(_per_sample(module, a, b, max(n, m)) for a, b in sets), strict=True):
        product = inner(parts[0], parts[-1])
        dot += product
        square += product.diagonal() if rows is columns else squared_norms(parts[0])
        square2 += 0.0 if rows is columns else squared_norms(parts[-1])
    return dot, square, square if rows is columns else square2


def _vectors(module: nn.Linear, rows: Signal, columns: Signal, product: Callable) -> Tensor:
    """(a . a' + 1) (b . b'), or its parts where weight or bias is frozen."""
    of_weight = product(rows[0], columns[0]) if module.weight.requires_grad else 0.0
    of_bias = float(module.bias is not None and module.bias.requires_grad)
    return (of_weight + of_bias) * product(rows[1], columns[1])


def _per_sample(module: nn.Module, a: Tensor, b: Tensor, most: int) -> Iterator[Tensor]:
    """The per-sample gradients of one layer, a slice of (n, columns) at a time; `most` samples would fit into it."""
    if isinstance(module, nn.Linear):
        a, b = a.flatten(1, -2), b.flatten(1, -2).mT
    if module.bias is not None and module.bias.requires_grad:
        yield b.flatten(2).sum(dim=2)
    if module.weight.requires_grad:
        yield from (_sequence if isinstance(module, nn.Linear) else _convolution)(module, a, b, most)


def _sequence(module: nn.Linear, a: Tensor, b: Tensor, most: int) -> Iterator[Tensor]:
    for part in _slices(module.in_features, most * module.out_features * a.element_size()):
        yield torch.bmm(b, a[:, :, part]).flatten(1)


def _convolution(module: nn.Conv2d, a: Tensor, b: Tensor, most: int) -> Iterator[Tensor]:
    bytes_a_channel = most * module.out_channels // module.groups * module.weight[0, 0].numel() * a.element_size()
    for a_group, b_group in zip(a.chunk(module.groups, 1), b.chunk(module.groups, 1), strict=True):
        for part in _slices(a_group.shape[1], bytes_a_channel):
            channels = a_group[:, part]
            patch = channels.shape[1] * module.weight[0, 0].numel()
            gradients = a.new_empty(len(a), b_group.shape[1], patch)
            # 32 images at a time keep the patches in the processor's cache.
            for g32, a32, b32 in zip(gradients.split(32), channels.split(32), b_group.split(32), strict=True):
                torch.bmm(b32.flatten(2), _patches(module, a32, b32).mT, out=g32)
            yield gradients.flatten(1)


def _patches(module: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """What each weight sees at each output position, (n, channels x height x width of the kernel, positions)."""
    (top, left), (down, across), (y, x) = module.padding, module.dilation, module.stride
    padded = F.pad(a, (left, left, top, top))
    image, channel, row, column = padded.stride()
    shape = (*a.shape[:2], *module.kernel_size, *b.shape[2:])
    windows = padded.as_strided(shape, (image, channel, row * down, column * across, row * y, column * x))
    return windows.reshape(len(a), -1, b.shape[2] * b.shape[3])


def _slices(size: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, SLICE_BYTES // max(1, bytes_each))
    return (slice(start, start + step) for start in range(0, size, step))


def inner(g: Tensor, h: Tensor) -> Tensor:
    """The inner products of rows, (n, m) in float64, summed in blocks of `COLUMNS`."""
    (g, size), (h, size2) = (_at_size_one(g),) * 2 if g is h else (_at_size_one(g), _at_size_one(h))
    blocks = zip(g.split(COLUMNS, dim=1), h.split(COLUMNS, dim=1), strict=True)
    total = sum(_symmetric(a) if g is h else (a @ b.T).double() for a, b in blocks)
    return total if size is size2 is None else total * _or_ones(size, g)[:, None] * _or_ones(size2, h)


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
    usual = ((largest > 1e-12) & (largest < 1e12)) | (largest == 0)
    if usual.all():
        return g, None
    size = largest.where(~usual, 1.0)
    return g / size[:, None], size.double()


def _or_ones(size: Tensor | None, g: Tensor) -> Tensor:
    return torch.ones(len(g), dtype=torch.float64, device=g.device) if size is None else size
