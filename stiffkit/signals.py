"""What a network's layers see of each sample, input and output gradient, and what is kept of it."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from stiffkit import layers as of_layers
from stiffkit.layers import Products, Signal
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

BATCH = 64  # points in one forward and backward pass, where memory allows


class UncertainError(Exception):
    """Layers whose gradients cannot be told from their input and output gradient for certain."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        super().__init__(", ".join(sorted(self.names)))


@dataclass
class Record:
    """What is kept of one layer for all samples: their gradients, or the layer's signal where that is smaller."""

    module: nn.Module
    whole: bool | None = None  # whether gradients are kept; decided by the first batch
    gradients: list[Tensor] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a batch, samples first."""
        a, b = of_layers.without_idle_positions(self.module, a, b)
        if self.whole is None:
            embedding = isinstance(self.module, nn.Embedding)
            self.whole = not embedding and of_layers.width(self.module) * len(b) <= a.numel() + b.numel()
        if self.whole:
            slices = list(of_layers.gradients(self.module, a, b, columns=2**62))
            self.gradients.append(slices[0] if len(slices) == 1 else torch.cat(slices, dim=1))
        else:
            self.signals.append((a.clone() if a._base is not None else a, b))

    def join(self) -> None:
        """Make one batch of all."""
        if len(self.gradients) > 1:
            self.gradients = [torch.cat(self.gradients)]
        if len(self.signals) > 1:
            sequences = isinstance(self.module, (nn.Linear, nn.Embedding))
            longest = max(b.shape[1] for _, b in self.signals) if sequences else 0
            pairs = [tuple(of_layers.padded(x, longest) if sequences else x for x in s) for s in self.signals]
            self.signals = [tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))]

    def products(self, other: "Record", slice_bytes: int) -> Products:
        """Inner products and squared norms with the samples of another record of the layer, or with its own."""
        if self.whole:
            return of_layers.products(self.gradients[0], other.gradients[0])
        return of_layers.layer_products(self.module, self.signals[0], other.signals[0], slice_bytes)

    @property
    def bytes(self) -> int:
        """The memory that is taken."""
        return sum(x.nbytes for x in [*self.gradients, *tree_leaves(self.signals)])


@dataclass
class Signals:
    r"""The records of all layers by name, and the output gradients that they belong to.

    `totals` are $\sum_i w_i g_i$ over all points, a vector a layer, by plain autograd, with random `weights` w (n,):
    what is recorded has to say the same of that sum.
    """

    records: dict[str, Record]
    outputs: OutputGradients
    weights: Tensor
    totals: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """The memory that the records take."""
        return sum(record.bytes for record in self.records.values())


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name whose gradient is known and whose trainable parameters are no other module's."""
    named = list(model.named_modules(remove_duplicate=False))
    owners = [id(p) for _, module in named for p in trainable(module)]
    return {
        name: module
        for name, module in named
        if (own := trainable(module)) and of_layers.is_plain(module) and all(owners.count(id(p)) == 1 for p in own)
    }


def trainable(module: nn.Module) -> list[Tensor]:
    """A module's own parameters that require a gradient."""
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


def signals(
    model: nn.Module,
    layers: dict[str, nn.Module],
    loss: Loss,
    points: PointSet,
    *,
    batch_size: int = BATCH,
    like: Signals | None = None,
) -> Signals:
    """Run the model on all points and record every layer.

    Raises:
        UncertainError: naming the layers that are, or one of whose parameters is, used in another way than by one
            plain call.

    """
    kept = {name: like.records[name].whole if like else None for name in layers}
    records = {name: Record(module, kept[name]) for name, module in layers.items()}
    weights = torch.randn(len(points), generator=torch.Generator().manual_seed(0)).to(points.device)
    parameters = [trainable(module) for module in layers.values()]
    totals: list[Any] = [0.0] * len(layers)
    found = []
    for numbers in batches(len(points), batch_size):
        part = slice(numbers.start, numbers.stop)
        batch = points.take(part)
        with _Calls(layers, len(batch)) as calls, nullcontext() if layers else torch.no_grad():
            outputs = call(model, batch.inputs)
        found.append(output_gradients(outputs, loss, batch))
        if not layers:
            continue
        z, unit = floating(outputs), found[-1].unit
        for name, signal in calls.differentiate(z, unit, len(batch)).items():
            records[name].add(*signal)
        total = weighted_sum(z, unit, weights[part], [p for own in parameters for p in own])
        pieces = total.split([sum(p.numel() for p in own) for own in parameters])
        totals = [t + piece for t, piece in zip(totals, pieces, strict=True)]
    for record in records.values():
        record.join()
    return Signals(records, OutputGradients.joined(found), weights, dict(zip(layers, totals, strict=True)))


def bytes_a_point(model: nn.Module, layers: dict[str, nn.Module], loss: Loss, points: PointSet) -> tuple[float, float]:
    """What a point takes: of what is kept, and of what a forward pass saves for its backward pass."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        kept = signals(model, layers, loss, points).bytes
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return kept / len(points), sum(size for place, size in saved.items() if place not in own) / len(points)


class _Calls:
    """Records, while the model runs, each layer's input and where its output sits in the autograd graph."""

    def __init__(self, layers: dict[str, nn.Module], n: int) -> None:
        self.layers, self.n = layers, n
        self.inputs: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in layers}
        self.edges: dict[str, object] = {}

    def __enter__(self) -> Self:
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if len(args) != 1 or not output.requires_grad:
                return None
            a, shared = args[0], isinstance(module, nn.Embedding) and len(args[0]) == 1 < self.n
            if shared:  # positions, say, looked up once for all samples, to which they are added: a copy for each
                a, output = (x.expand(self.n, *x.shape[1:]) for x in (a, output))
            self.inputs[name].append((a, a._version))
            # The edge is taken now: an in-place ReLU may turn the tensor into something else.
            self.edges[name] = get_gradient_edge(output)
            return output if shared else None

        return hook

    def differentiate(self, outputs: list[Tensor], unit: list[Tensor | None], n: int) -> dict[str, Signal]:
        """Each layer's input and output gradient, for n samples whose output gradients are `unit`."""
        pairs = [(z, u.to(z.dtype)) for z, u in zip(outputs, unit, strict=True) if u is not None and z.requires_grad]
        uses = parameters_of([z for z, _ in pairs])
        self._refuse(name for name, module in self.layers.items() if not self._is_certain(name, module, uses))
        gradients = torch.autograd.grad(
            [z for z, _ in pairs],
            [self.edges[name] for name in self.layers],
            [u for _, u in pairs],
            retain_graph=True,
        )
        found = dict(zip(self.layers, gradients, strict=True))
        self._refuse(name for name, b in found.items() if len(b) != n)
        return {
            name: (self._floating(self.inputs[name][0][0].detach()), self._floating(b)) for name, b in found.items()
        }

    def _is_certain(self, name: str, module: nn.Module, uses: dict[Tensor, int]) -> bool:
        """One call, on samples first, of an input that nobody changed, and no other use of the parameters."""
        if len(self.inputs[name]) != 1 or any(uses[p] != 1 for p in trainable(module)):
            return False
        a, version = self.inputs[name][0]
        return a._version == version and of_layers.has_shape(module, a, self.n)

    @staticmethod
    def _refuse(names: Iterable[str]) -> None:
        if names := set(names):
            raise UncertainError(names)

    @staticmethod
    def _floating(x: Tensor) -> Tensor:
        return x if x.dtype in (torch.float64, torch.int64, torch.int32) else x.float()
