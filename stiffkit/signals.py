"""What a network's layers see of each sample, input and output gradient, and what is kept of it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from math import inf
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from stiffkit import layers as of_layers
from stiffkit.layers import Buffer, Signal
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

PROBE = 4  # points that show which layers are certain
PROBE_BYTES = 2**26  # that their gradients take at a time


class UncertainError(Exception):
    """Layers whose gradients cannot be told from their input and output gradient for certain."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        super().__init__(", ".join(sorted(self.names)))


@dataclass
class Layers:
    """Layers whose gradients are certain, and how they are kept.

    Attributes:
        modules: by name.
        columns: of the layers whose per-sample gradients are smaller than their signals: the place of each in a matrix
            of gradients. Of the others the signals are kept.
        kept: bytes that are kept of a point.
        passing: bytes that a forward pass saves of a point for its backward pass.
        images: the memory format of inputs of four dimensions.

    """

    modules: dict[str, nn.Module]
    columns: dict[str, slice]
    kept: float
    passing: float
    images: torch.memory_format = torch.preserve_format

    @property
    def width(self) -> int:
        """Of the matrix of gradients."""
        return max((place.stop for place in self.columns.values()), default=0)

    def without(self, names: set[str]) -> "Layers":
        """The other layers."""
        modules = {name: module for name, module in self.modules.items() if name not in names}
        return replace(
            self, modules=modules, columns=_side_by_side({n: modules[n] for n in self.columns if n in modules})
        )


def _side_by_side(modules: dict[str, nn.Module]) -> dict[str, slice]:
    """The place of each layer's gradient in a row of all."""
    ends = list(accumulate(map(of_layers.width, modules.values()), initial=0))
    return dict(zip(modules, map(slice, ends, ends[1:]), strict=True))


@dataclass
class Signals:
    """What is kept of n points: the matrix of gradients (n, width), the signals of other layers, output gradients.

    Signals come in pieces, since a model may cut each batch of sequences to the longest of them.
    """

    gradients: Tensor
    signals: dict[str, list[Signal]]
    outputs: OutputGradients

    def __len__(self) -> int:
        return len(self.outputs.scale)


def certain_layers(model: nn.Module, loss: Loss, points: PointSet) -> Layers:
    """The layers whose gradients some of the points show to be certain.

    Certain is a layer that is known, is used once, by a plain call, has its parameters for itself, and whose recorded
    gradients sum up, with random weights on the points, to what autograd gives.
    """
    some = sorted({round(k * (len(points) - 1) / (PROBE - 1)) for k in range(PROBE)})
    if points.device.type == "cpu" and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        # Convolutions and poolings of a processor are quicker so; a model that takes images apart may not know it.
        with suppress(Exception):
            found = _certain(model, loss, points.take(some, torch.channels_last))
            return replace(found, images=torch.channels_last)
    return _certain(model, loss, points.take(some))


def _certain(model: nn.Module, loss: Loss, points: PointSet) -> Layers:
    modules = _candidates(model)
    while True:
        try:
            return _probe(model, modules, loss, points)
        except UncertainError as error:
            modules = {name: module for name, module in modules.items() if name not in error.names}
        except Exception:  # an embedding that was looked up once for all samples may be wanted just once
            embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
            if not embeddings:
                raise
            modules = {name: module for name, module in modules.items() if name not in embeddings}


def _probe(model: nn.Module, modules: dict[str, nn.Module], loss: Loss, points: PointSet) -> Layers:
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    n = len(points)
    with saved_tensors_hooks(pack, lambda x: x), _Calls(modules, n) as calls:
        outputs = call(model, points.inputs)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    passing = sum(size for place, size in saved.items() if place not in own) / n
    if not modules:
        return Layers({}, {}, 0.0, passing)
    z, unit = floating(outputs), output_gradients(outputs, loss, points).unit
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(points.device)
    parameters = [trainable(module) for module in modules.values()]
    total = weighted_sum(z, unit, weights, [p for owned in parameters for p in owned], retain_graph=True)
    totals = total.split([sum(p.numel() for p in owned) for owned in parameters])
    wrong, formed, others, kept = set(), {}, [], 0
    for (name, module), total, (a, b) in zip(
        modules.items(), totals, calls.differentiate(z, unit).values(), strict=True
    ):
        a, b = of_layers.without_idle_positions(module, a, b)
        if not _agrees(total, module, a, b * weights.view(-1, *[1] * (b.ndim - 1)).to(b.dtype)):
            wrong.add(name)
        size = of_layers.width(module)
        if not isinstance(module, nn.Embedding) and size * n <= a.numel() + b.numel():
            formed[name], kept = module, kept + size * n * b.element_size()
        else:
            others.append((a, b))
    _Calls.refuse(wrong)
    return Layers(modules, _side_by_side(formed), (kept + _size(others)) / n, passing)


def _agrees(total: Tensor, module: nn.Module, a: Tensor, b: Tensor) -> bool:
    r"""Hold the sum of a layer's gradients to the one that plain autograd has taken, by its norm.

    A kink of a ReLU decided otherwise may move it a little; a layer whose rows are not the samples, by far.
    """
    each, together = of_layers.squares_and_sum(module, a, b, Buffer(PROBE_BYTES))
    return bool((together - total.double().square().sum()).abs() <= 1e-3 * each.sum())


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name whose gradient is known and whose trainable parameters are no other module's."""
    named = list(model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for _, module in named for p in trainable(module))
    return {
        name: module
        for name, module in named
        if (own := trainable(module)) and of_layers.is_plain(module) and all(owners[id(p)] == 1 for p in own)
    }


def trainable(module: nn.Module) -> list[Tensor]:
    """A module's own parameters that require a gradient."""
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


def signals(
    model: nn.Module,
    layers: Layers,
    loss: Loss,
    points: PointSet,
    numbers: range,
    batch_size: int,
    room: tuple[float, float] = (inf, inf),
) -> Signals:
    """Run the model on points with these numbers and keep what the layers see, as far as there is room.

    Args:
        model: the model.
        layers: that are certain.
        loss: one a point.
        points: all of them.
        numbers: of those that are wanted.
        batch_size: points in a pass.
        room: bytes that signals may take if they are those of all points; and if not: then those of the first batches
            are kept, of one at least.

    Raises:
        UncertainError: naming layers that some points use in another way than those did that showed them certain.

    """
    whole, part = room
    found, pieces = [], {name: [] for name in layers.modules if name not in layers.columns}
    versions, gradients, sizes, buffer = [], torch.empty(len(numbers), 0), [0.0], Buffer()
    for batch in batches(len(numbers), batch_size):
        some = slice(numbers.start + batch.start, numbers.start + batch.stop)
        outputs, seen = _of_batch(model, layers, loss, points.take(some, layers.images))
        found.append(outputs)
        for name in list(seen):
            a, b = of_layers.without_idle_positions(layers.modules[name], *seen.pop(name))
            if name in pieces:
                pieces[name].append((a, b))
                versions.append((name, a, a._version))
                continue
            if not gradients.shape[1]:
                most = batch_size + whole // (layers.width * b.element_size())
                gradients = b.new_empty(int(min(len(numbers), most)), layers.width)
            slices = of_layers.gradients(layers.modules[name], [(a, b)], sys.maxsize, buffer)
            _fill(gradients[batch.start : batch.stop, layers.columns[name]], slices)
        formed = len(batch) * layers.width * gradients.element_size()
        sizes.append(sizes[-1] + formed + _size([parts[-1] for parts in pieces.values()]))
        if sizes[-1] > whole:
            found = found[: max(1, sum(size <= part for size in sizes[1:]))]
            break
    # A model may write the next batch into the memory of the last one.
    _Calls.refuse(name for name, a, version in versions if a._version != version)
    versions.clear()  # and with it what would keep the batches in memory while they are joined
    for parts in pieces.values():
        del parts[len(found) :]
    outputs = OutputGradients.joined(found)
    return Signals(gradients[: len(outputs.scale)], _joined(pieces), outputs)


def _size(signals_of_layers: Sequence[Signal]) -> int:
    """Bytes; an input that layers share, as queries and keys do, counts once."""
    inputs = {a.data_ptr(): a.nbytes for a, _ in signals_of_layers}
    return sum(inputs.values()) + sum(b.nbytes for _, b in signals_of_layers)


def _of_batch(
    model: nn.Module, layers: Layers, loss: Loss, batch: PointSet
) -> tuple[OutputGradients, dict[str, Signal]]:
    with _Calls(layers.modules, len(batch)) as calls, nullcontext() if layers.modules else torch.no_grad():
        outputs = call(model, batch.inputs)
    found = output_gradients(outputs, loss, batch)
    return found, calls.differentiate(floating(outputs), found.unit) if layers.modules else {}


def _fill(place: Tensor, slices: Iterable[Tensor]) -> None:
    start = 0
    for part in slices:
        place[:, start : start + part.shape[1]] = part
        start += part.shape[1]


def _joined(pieces: dict[str, list[Signal]]) -> dict[str, list[Signal]]:
    """The batches of each layer's signal, those of one length as one piece.

    An input that layers share, as queries and keys do, is kept once.
    """
    shared: dict[tuple, Tensor] = {}
    found = {}
    for name in list(pieces):  # taken out, so that the memory of each is free when it has been joined
        found[name] = []
        for _, alike in groupby(pieces.pop(name), key=lambda batch: batch[1].shape[1:]):
            inputs, outputs = zip(*alike, strict=True)
            key = tuple((x.data_ptr(), x.shape, x.stride()) for x in inputs)
            shared[key] = shared[key] if key in shared else _as_one(inputs)
            found[name].append((shared[key], _as_one(outputs)))
    return found


def _as_one(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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

    def differentiate(self, outputs: list[Tensor], unit: list[Tensor | None]) -> dict[str, Signal]:
        """Each layer's input and output gradient, for samples whose output gradients are `unit`."""
        pairs = [(z, u.to(z.dtype)) for z, u in zip(outputs, unit, strict=True) if u is not None and z.requires_grad]
        uses = parameters_of([z for z, _ in pairs])
        self.refuse(name for name, module in self.layers.items() if not self._is_certain(name, module, uses))
        gradients = torch.autograd.grad(
            [z for z, _ in pairs],
            [self.edges[name] for name in self.layers],
            [u for _, u in pairs],
        )
        found = dict(zip(self.layers, gradients, strict=True))
        self.refuse(name for name, b in found.items() if len(b) != self.n)
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
    def refuse(names: Iterable[str]) -> None:
        """Say that these layers are uncertain, if there are any."""
        if names := set(names):
            raise UncertainError(names)

    @staticmethod
    def _floating(x: Tensor) -> Tensor:
        return x if x.dtype in (torch.float64, torch.int64, torch.int32) else x.float()
