"""Whether a point is the same alone and in company."""

import torch
from torch import Tensor, nn

from stiffkit.output_gradients import Loss, OutputGradients, PointSet, call, floating, output_gradients


def refuse_mixing(model: nn.Module, loss: Loss, points: PointSet) -> None:
    """Compare outputs and losses of the first and the last point, alone and together.

    Raises:
        ValueError: if they differ: then a point has no gradient of its own.

    """
    ends = [0, len(points) - 1]
    with torch.no_grad():
        z, together = _measure(model, loss, points.take(ends))
        for k, i in enumerate(ends):
            z_alone, alone = _measure(model, loss, points.take([i]))
            used = [(a[0], b[k]) for a, b, u in zip(z_alone, z, alone.unit, strict=True) if u is not None]
            dtype = used[0][0].dtype
            used.append((alone.losses[0].to(dtype), together.losses[k].to(dtype)))
            if not all(_close(a, b) for a, b in used):
                raise ValueError(
                    f"point {i} has another output or loss alone than in company: points influence each other (as in "
                    "batch normalisation) or something is random (as dropout), so that a point has no gradient of its "
                    "own. Call model.eval(); let the loss treat each point by itself."
                )


def _measure(model: nn.Module, loss: Loss, points: PointSet) -> tuple[list[Tensor], OutputGradients]:
    outputs = call(model, points.inputs)
    with torch.enable_grad():
        return floating(outputs), output_gradients(outputs, loss, points)


def _close(alone: Tensor, together: Tensor) -> bool:
    if alone.shape != together.shape:
        return False
    tolerance = torch.finfo(alone.dtype).eps ** 0.5
    return torch.allclose(alone, together, rtol=tolerance, atol=tolerance * _largest(alone), equal_nan=True)


def _largest(tensor: Tensor) -> float:
    """The largest finite entry in size, at least 1."""
    finite = tensor[tensor.isfinite()].abs()
    return max(1.0, float(finite.max())) if finite.numel() else 1.0
