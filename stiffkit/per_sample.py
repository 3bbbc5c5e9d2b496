"""Per-sample gradients of any network, whole, through torch.func or point by point."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from stiffkit.output_gradients import Loss, OutputGradients, call, floating, output_gradients
from stiffkit.points import Inputs, PointSet, batches

BATCH = 256  # points in one forward pass without gradients
VMAP = 32  # points whose gradients torch.func computes at a time: more do not fit into the processor's cache


@dataclass
class Pullback:
    r"""Everything needed to pull output gradients of n points back to the parameters.

    `rows` gives the gradients $J_i^\top u_i$, with $u_i$ the output gradient at unit size; `scale` (n,) is what it was
    divided by.
    """

    model: nn.Module
    points: PointSet
    unit: list[Tensor | None]
    scale: Tensor
    names: list[str]
    vmap: bool = True

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters())
        self.parameters = {name: named[name] for name in self.names}
        self.fixed = {name: p.detach() for name, p in named.items() if name not in self.parameters}
        self.used = [k for k, u in enumerate(self.unit) if u is not None]

    def __len__(self) -> int:
        return len(self.scale)

    def rows(self, numbers: range) -> list[Tensor]:
        """The gradients of some points, one tensor (points, numbers) a parameter, float32 or float64."""
        parts = [self._some(numbers[k.start : k.stop]) for k in batches(len(numbers), VMAP)]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def _some(self, numbers: range) -> list[Tensor]:
        n = len(numbers)
        return [g.reshape(n, -1).to(torch.promote_types(g.dtype, torch.float32)) for g in self._gradients(numbers)]

    def _gradients(self, numbers: range) -> list[Tensor]:
        if self.vmap:
            try:
                return self._vmapped(slice(numbers.start, numbers.stop))
            except Exception as refusal:  # what torch.func cannot do has no exception type of its own
                warnings.warn(
                    f"torch.func cannot take this model's per-sample gradients ({_first_line(refusal)}); "
                    "every point is differentiated on its own, which is slow",
                    stacklevel=8,
                )
                self.vmap = False
        return [torch.cat(parts) for parts in zip(*(self._one(i) for i in numbers), strict=True)]

    def _vmapped(self, part: slice) -> list[Tensor]:
        def one(x: Inputs, units: list[Tensor]) -> tuple[Tensor, ...]:
            def outputs(*parameters: Tensor) -> list[Tensor]:
                named = self.fixed | dict(zip(self.names, parameters, strict=True))
                return self._differentiable(call(_Functional(self.model, named), _batch_of_one(x)))

            z, pull = torch.func.vjp(outputs, *(p.detach() for p in self.parameters.values()))
            return pull([u[None].to(out.dtype) for u, out in zip(units, z, strict=True)])

        units = [self.unit[k][part] for k in self.used]
        inputs = self.points.take(part).inputs
        dimensions = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, inputs)
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels know no vmap
            warnings.filterwarnings("ignore", "There is a performance drop")
            return list(torch.func.vmap(one, in_dims=(dimensions, 0))(inputs, units))

    def _one(self, i: int) -> list[Tensor]:
        outputs = self._differentiable(call(self.model, self.points.take(slice(i, i + 1)).inputs))
        pairs = [
            (z, self.unit[k][i : i + 1].to(z.dtype)) for k, z in zip(self.used, outputs, strict=True) if z.requires_grad
        ]
        gradients = torch.autograd.grad(
            [z for z, _ in pairs], list(self.parameters.values()), [u for _, u in pairs], materialize_grads=True
        )
        return [g[None] for g in gradients]

    def _differentiable(self, outputs: object) -> list[Tensor]:
        leaves = floating(outputs)
        return [leaves[k] for k in self.used]


class _Functional:
    """The model with other parameters, as a callable that `call` can use."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters

    def __call__(self, *args: object, **kwargs: object) -> object:
        own = [(module, dict(module._parameters)) for module in self.model.modules()]
        try:
            return torch.func.functional_call(self.model, self.parameters, args, kwargs)
        finally:  # functional_call puts only one of the names back where a module has two
            for module, parameters in own:
                module._parameters.update(parameters)


def _batch_of_one(x: Inputs) -> Inputs:
    return tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, x)


def pullback(model: nn.Module, loss: Loss, points: PointSet, names: list[str], size: int = BATCH) -> Pullback:
    """Compute the output gradients of all points and prepare to pull them back to the parameters of these names."""
    gradients = []
    for numbers in batches(len(points), size):
        batch = points.take(slice(numbers.start, numbers.stop))
        with torch.no_grad():
            outputs = call(model, batch.inputs)
        gradients.append(output_gradients(outputs, loss, batch))
    whole = OutputGradients.joined(gradients)
    return Pullback(model, points, whole.unit, whole.scale, names)


def blocks(rows: Pullback, columns: Pullback, memory: int) -> Iterator[tuple[range, range, list[Tensor], list[Tensor]]]:
    """The gradients of all pairs of points, in blocks of rows and columns as large as the bytes of memory hold.

    For a set with itself (`rows is columns`) only the blocks on and above the diagonal are visited.
    """
    same = rows is columns
    each = sum(p.numel() * max(4, p.element_size()) for p in rows.parameters.values())
    size = max(1, memory // (4 * max(1, each)))
    for i in batches(len(rows), size):
        g = rows.rows(i)
        for j in batches(len(columns), size):
            if not same or j.start >= i.start:
                yield i, j, g, g if same and i == j else columns.rows(j)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
