"""From outputs to output gradients: calling the model and the loss, and checking what they return."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from stiffkit.losses import ExactLosses
from stiffkit.points import Inputs, PointSet

Loss = Callable[[Any, Any], Tensor]


@dataclass
class OutputGradients:
    r"""The gradients $\partial\ell_i/\partial z_i$ of a batch's losses by the model's outputs, in float64.

    `unit[k]` belongs to the k-th floating tensor among the outputs (None where no loss depends on it); over all of
    them together each sample has Euclidean norm 1, or 0 where its gradient is exactly zero. `scale` (n,) is the norm
    that was taken out, so that confident points reach the float32 backward pass at full size. `cancelled` (n,) tells
    which gradients have visibly lost their digits.
    """

    unit: list[Tensor | None]
    scale: Tensor
    losses: Tensor
    cancelled: Tensor

    @classmethod
    def joined(cls, batches: "list[OutputGradients]") -> "OutputGradients":
        """Those of all points from those of the batches."""
        pieces = zip(*(batch.unit for batch in batches), strict=True)
        unit = [None if piece[0] is None else torch.cat(piece) for piece in pieces]
        return cls(unit, *(torch.cat([getattr(b, f) for b in batches]) for f in ("scale", "losses", "cancelled")))

    def check(self, start: int = 0) -> None:
        """Refuse losses that are not finite, warn of cancellation; the first of the points has the number `start`."""
        bad = [start + i for i in (~self.losses.isfinite()).nonzero()[:, 0].tolist()]
        if bad:
            names = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            raise ValueError(f"the loss is NaN or infinite at {len(bad)} point(s), index {names}")
        if self.cancelled.any():
            lost = f"{int(self.cancelled.sum())} of {len(self.losses)}"
            warnings.warn(
                f"the gradient cancels at {lost} points, fitted so well that the arithmetic loses it; their signs "
                "and cosines are not to be trusted. Let the model return logits (no softmax or log-softmax) and the "
                "loss be nn.CrossEntropyLoss or F.cross_entropy: these are computed without cancellation.",
                stacklevel=6,
            )


def call(model: Callable, inputs: Inputs) -> Any:
    """model(x) for a tensor, model(*x) for a tuple, model(**x) for a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def floating(outputs: Any) -> list[Tensor]:
    """The floating tensors among a model's outputs, in a fixed order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def apply_loss(loss: Loss, outputs: Any, targets: Any) -> tuple[Tensor, bool]:
    """The losses, computed without cancellation, and whether the loss has an arithmetic of its own."""
    if isinstance(loss, nn.Module) and hasattr(outputs, "logits"):
        outputs = outputs.logits
    with ExactLosses() as exact:
        losses = loss(outputs, targets)
    return losses, exact.own_arithmetic


def output_gradients(outputs: Any, loss: Loss, points: PointSet, refused: Iterable[Tensor] = ()) -> OutputGradients:
    """Differentiate the losses of points by the outputs; the loss may not depend directly on what is `refused`."""
    n = len(points)
    if not floating(outputs):
        raise TypeError(
            f"no floating tensor found in the model's output, a {type(outputs).__name__}: let it return a tensor, a "
            "tuple or dict of tensors, or a Hugging Face output"
        )
    wide, losses, own_arithmetic = _losses(outputs, loss, points.targets)
    check_shape(losses, n)
    if not losses.requires_grad:
        raise ValueError("the loss does not depend on the model's outputs in a way that can be differentiated")
    if not {id(p) for p in refused}.isdisjoint(id(leaf) for leaf in parameters_of([losses])):
        raise ValueError(
            "the loss uses parameters of the model directly, not through the outputs (as a penalty on weights does): "
            "measure the loss of the data alone"
        )
    gradients = torch.autograd.grad(losses.sum(), wide, allow_unused=True)
    used = [g for g in gradients if g is not None]
    if any(g.ndim == 0 or len(g) != n for g in used):
        raise ValueError(f"the model's outputs must have the samples first: {n} samples, shapes {_shapes(used)}")
    flat = torch.cat([g.reshape(n, -1) for g in used], dim=1)
    # Squaring 1e-200 would underflow: the largest entry comes out first.
    largest = flat.abs().amax(dim=1)
    rest = torch.linalg.vector_norm(flat / largest.where(largest > 0, 1.0)[:, None], dim=1)
    divisor = (largest * rest).where(largest > 0, 1.0)
    unit = [None if g is None else g / divisor.view(-1, *[1] * (g.ndim - 1)) for g in gradients]
    cancelled = torch.zeros_like(largest, dtype=torch.bool)
    if not own_arithmetic:
        cancelled = _cancelled(outputs, loss, points.targets, losses.detach(), flat)
    return OutputGradients(unit, largest * rest, losses.detach(), cancelled)


def weighted_sum(
    outputs: list[Tensor],
    unit: list[Tensor | None],
    weights: Tensor,
    parameters: list[Tensor],
    retain_graph: bool = False,
) -> Tensor:
    r"""$\sum_i w_i J_i^\top u_i$ by one backward pass: all parameters in one vector."""
    used = [(z, u) for z, u in zip(outputs, unit, strict=True) if u is not None and z.requires_grad]
    pulled = torch.autograd.grad(
        [z for z, _ in used],
        parameters,
        [(u * weights.view(-1, *[1] * (u.ndim - 1))).to(z.dtype) for z, u in used],
        materialize_grads=True,
        retain_graph=retain_graph,
    )
    return torch.cat([g.flatten() for g in pulled])


def _losses(outputs: Any, loss: Loss, targets: Any, shift: float = 0.0) -> tuple[list[Tensor], Tensor, bool]:
    leaves, structure = tree_flatten(outputs)
    wide = [
        (leaf.detach().double() + shift).requires_grad_()
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in leaves
    ]
    losses, own_arithmetic = apply_loss(loss, tree_unflatten(wide, structure), targets)
    return floating(wide), losses, own_arithmetic


def check_shape(losses: Any, n: int) -> None:
    """Refuse what is not one loss a point, with advice."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"the loss must return a tensor with one loss a point, got {type(losses).__name__}")
    if losses.ndim == 0:
        raise ValueError(
            f"the loss returned one number for {n} points; stiffness needs one loss a point, shape (points,): "
            'take the loss with reduction="none", for example nn.CrossEntropyLoss(reduction="none")'
        )
    if losses.shape != (n,):
        raise ValueError(
            f"the loss must return one value a point, shape (points,); for {n} points it gave {tuple(losses.shape)}: "
            "sum or average over the other dimensions, for example loss.flatten(1).sum(1)"
        )


def _cancelled(outputs: Any, loss: Loss, targets: Any, losses: Tensor, gradients: Tensor) -> Tensor:
    """Where a gradient, a row of (n, numbers), has visibly lost its digits or is about to.

    Seen are a loss above zero with a gradient of exactly zero; a gradient that does not tell how the loss changes when
    all outputs are shifted a little (a softmax loss does not change, so the entries must add up to zero); and outputs
    that are probabilities or their logarithms already, on points so well fitted that the model's own backward pass
    cancels.
    """
    largest, total = gradients.abs().amax(dim=1), gradients.sum(dim=1)
    lost = (largest == 0) & (losses > 0)
    suspect = total.abs() > 1e-6 * largest
    if suspect.any():
        shift = 1e-6
        above, below = (_losses(outputs, loss, targets, s)[1].detach() for s in (shift, -shift))
        error = ((above - below) / 2 - shift * total).abs()
        rounding = 4 * torch.finfo(torch.float64).eps * losses.abs()
        lost |= suspect & (error > 0.01 * shift * total.abs() + rounding)
    for z in floating(outputs):
        lost |= _fitted_probabilities(z.detach(), len(losses))
    return lost


def _fitted_probabilities(z: Tensor, n: int) -> Tensor:
    """Where outputs (n, classes) are a softmax, or its logarithm, whose backward pass loses more than three digits."""
    if z.ndim != 2 or len(z) != n or z.shape[1] < 2:
        return torch.zeros(n, dtype=torch.bool, device=z.device)
    p = z.double() if bool((z >= 0).all()) else z.double().exp()
    eps = torch.finfo(z.dtype).eps
    is_softmax = bool(((p.sum(dim=1) - 1).abs() < 100 * eps).all())
    return (1 - p.amax(dim=1) < 1000 * eps) & is_softmax


def parameters_of(tensors: list[Tensor]) -> Counter:
    """How often each leaf that requires a gradient, a parameter as a rule, enters the graph behind tensors."""
    uses: Counter = Counter()
    seen, stack = set(), [t.grad_fn for t in tensors if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for below, _ in node.next_functions:
            if below is not None and hasattr(below, "variable"):
                uses[below.variable] += 1
            elif below is not None:
                stack.append(below)
    return uses


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
