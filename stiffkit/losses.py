r"""Losses, one value a sample, and the arithmetic in which their gradients are computed.

For softmax cross-entropy the gradient of the outputs is $p - e_y = (1 - p_y)(q - e_y)$, with $q$ the softmax over the
other classes. Confidence is a positive factor, so it touches neither the sign nor the cosine of two gradients. But
$p_y - 1$ computed as it stands loses all its digits on a fitted point: beyond a logit gap $\log(p_y / (1 - p_y))$ of 16
in float32, of 36 in float64. `cross_entropy` is exact up to a gap of 700; the two others reproduce on purpose what
widespread software computes, so that its effect can be measured.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils._pytree import tree_leaves, tree_map


def _own_arithmetic(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Let `ExactLosses` see `loss` as one function, so that it leaves what happens inside alone."""

    def wrapped(outputs: Tensor, targets: Tensor) -> Tensor:
        if has_torch_function_unary(outputs):
            return handle_torch_function(wrapped, (outputs,), outputs, targets)
        return loss(outputs, targets)

    wrapped.__name__, wrapped.__qualname__, wrapped.__doc__ = loss.__name__, loss.__qualname__, loss.__doc__
    wrapped.__module__ = loss.__module__
    wrapped.own_arithmetic = True
    return wrapped


@_own_arithmetic
def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy $-\log p_y$ whose gradient keeps its digits on fitted points.

    Args:
        outputs: logits, shape (n, classes), any floating dtype; computed in float64.
        targets: class numbers, shape (n,), int64.

    Returns:
        Losses, shape (n,), float64, in $[0, \infty)$. The gradient's target entry is minus the sum of the others, so
        that all entries are right to rounding for logit gaps up to 700.

    >>> z = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True, dtype=torch.float64)
    >>> cross_entropy(z, torch.tensor([0])).sum().backward()
    >>> [f"{entry:.3e}" for entry in z.grad[0].tolist()]
    ['-7.440e-44', '3.720e-44', '3.720e-44']

    """
    return _cross_entropy(outputs.double(), targets, reduction="none")


@_own_arithmetic
def cross_entropy_float32(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy as fused float32 kernels compute it: the gradient is $p - e_y$, subtracted in float32.

    PyTorch's, JAX's and TensorFlow's fused losses agree with it to four digits. Beyond a logit gap of about 16 the
    target's entry is rounding noise or zero while the other entries are still right.

    Args:
        outputs: logits, shape (n, classes), any floating dtype; cast to float32.
        targets: class numbers, shape (n,), int64.

    Returns:
        Losses, shape (n,), float32.

    """
    return F.cross_entropy(outputs.float(), targets, reduction="none")


@_own_arithmetic
def cross_entropy_keras2019(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy of multi-backend Keras behind a softmax output layer, in float32.

    $p$ is normalised once more, clipped to $[10^{-7}, 1 - 10^{-7}]$, and $-\log p_y$ taken. Clipping has no gradient,
    so a point whose logit gap lies beyond about $\pm 16$ has a gradient of exactly zero.

    Args:
        outputs: logits, shape (n, classes), any floating dtype; cast to float32.
        targets: class numbers, shape (n,), int64.

    Returns:
        Losses, shape (n,), float32, in $[10^{-7}, 16.2]$.

    """
    p = torch.softmax(outputs.float(), dim=1)
    p = (p / p.sum(dim=1, keepdim=True)).clamp(1e-7, 1 - 1e-7)
    return -p.gather(1, targets[:, None])[:, 0].log()


@_own_arithmetic
def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Mean squared error $\frac1K \sum_k (z_k - t_k)^2$ of each sample.

    Args:
        outputs: shape (n, ...), any floating dtype.
        targets: the same shape; or class numbers, shape (n,), int64, which stand for one-hot vectors.

    Returns:
        Losses, shape (n,), in the dtype of `outputs`.

    """
    if not targets.is_floating_point():
        targets = F.one_hot(targets, outputs.shape[1])
    return (outputs - targets.to(outputs.dtype)).square().flatten(1).mean(dim=1)


def smoothed_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy with targets smoothed by 0.1: $-\sum_k t_k \log p_k$, $t = 0.9\, e_y + 0.1 / K$.

    Its least value is at finite logits, so that fitted points do not saturate.

    Args:
        outputs: logits, shape (n, classes), any floating dtype.
        targets: class numbers, shape (n,), int64.

    Returns:
        Losses, shape (n,), in the dtype of `outputs`; in a measurement float64, without cancellation.

    """
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


class ExactLosses(TorchFunctionMode):
    """Computes a loss in float64, with a cross-entropy and a log-softmax whose backward pass does not cancel.

    While it is active, PyTorch's `cross_entropy` and `log_softmax` are replaced wherever the loss calls them, and
    float32 tensors that the loss mixes with float64 ones (class weights, say) are cast. The losses of this module are
    left as they are; `own_arithmetic` tells afterwards whether one was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.own_arithmetic = False

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if getattr(func, "own_arithmetic", False):
            self.own_arithmetic = True
            return func(*args, **kwargs)
        if kwargs.get("dtype") is None:
            func = _EXACT.get(func, func)
        if not _in_place(func):
            args, kwargs = _widen((args, kwargs))
        return func(*args, **kwargs)


def _in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _widen(arguments: tuple) -> tuple:
    """Cast floating tensors to float64 where at least one of them is float64 already."""
    dtypes = {leaf.dtype for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    if torch.float64 not in dtypes or len(dtypes) == 1:
        return arguments
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)


class _LogSoftmax(torch.autograd.Function):
    """Log-softmax over the last dimension; the backward pass is $v_j (1 - p_j) - p_j \\sum_{k \\ne j} v_k$.

    Only the largest entry of p can exceed 1/2, so only there do 1 - p and the other sum have to be added up afresh.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        log_p = torch.log_softmax(z, dim=-1)
        ctx.save_for_backward(log_p)
        return log_p

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, v: Tensor) -> Tensor:
        p = ctx.saved_tensors[0].exp()
        top = p.argmax(dim=-1, keepdim=True)
        p_others = p.scatter(-1, top, 0.0).sum(dim=-1, keepdim=True)
        v_others = v.scatter(-1, top, 0.0).sum(dim=-1, keepdim=True)
        one_minus_p = (1 - p).scatter(-1, top, p_others)
        rest = (v.sum(dim=-1, keepdim=True) - v).scatter(-1, top, v_others)
        return v * one_minus_p - p * rest


def _log_softmax(input: Tensor, dim: int | None = None, *_: object, **__: object) -> Tensor:
    if dim is None:
        dim = 0 if input.ndim in (0, 1, 3) else 1  # what torch.nn.functional does, with a warning, when dim is left out
    return _LogSoftmax.apply(input.double().movedim(dim, -1)).movedim(-1, dim)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy with all its options, on top of the exact log-softmax."""
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce)
    dim = 0 if input.ndim == 1 else 1
    classes = input.shape[dim]
    log_p = _log_softmax(input, dim).movedim(dim, -1)
    if weight is None:
        weight = log_p.new_ones(classes)
    weight = weight.to(log_p)
    if target.is_floating_point():
        soft = target.double().movedim(dim, -1) * (1 - label_smoothing) + label_smoothing / classes
        losses = -(log_p * soft * weight).sum(-1)
        share = torch.ones_like(losses)
    else:
        kept = target != ignore_index
        y = target.where(kept, 0)
        share = weight[y].where(kept, 0)
        losses = -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1) * weight[y] * (1 - label_smoothing)
        if label_smoothing:
            losses = losses - (log_p * weight).sum(-1) * label_smoothing / classes
        losses = losses.where(kept, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / share.sum()


_EXACT = {
    F.cross_entropy: _cross_entropy,
    F.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
}
