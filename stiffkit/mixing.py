"""Whether a point has a gradient of its own: the same alone and in company, and nothing random about it."""

import torch
from torch import Tensor, nn

from stiffkit.output_gradients import Loss, OutputGradients, call, floating, output_gradients
from stiffkit.points import PointSet


def refuse_mixing(model: nn.Module, loss: Loss, points: PointSet) -> None:
    """Compare outputs and losses of the first and the last point, alone and together.

    Raises:
        ValueError: if they differ, if random numbers were drawn, or if the loss uses parameters of the model itself.

    """
    ends = [0, len(points) - 1]
    generators = _generators(points.device)
    with torch.no_grad():
        z, together = _measure(model, loss, points.take(ends))
        if any(not torch.equal(a, b) for a, b in zip(generators, _generators(points.device), strict=True)):
            raise ValueError("the model or the loss draws random numbers (as dropout does): call model.eval()")
        for k, i in enumerate(ends):
            z_alone, alone = _measure(model, loss, points.take([i]))
            used = [(a[0], b[k], _largest(b)) for a, b, u in zip(z_alone, z, alone.unit, strict=True) if u is not None]
            dtype = used[0][0].dtype
            used.append((alone.losses[0].to(dtype), together.losses[k].to(dtype), max(1.0, _largest(together.losses))))
            if not all(_close(*compared) for compared in used):
                raise ValueError(
                    f"point {i} has another output or loss alone than in company: points influence each other (as in "
                    "batch normalisation), so that a point has no gradient of its own. Call model.eval(); let the loss "
                    "treat each point by itself."
                )


def _measure(model: nn.Module, loss: Loss, points: PointSet) -> tuple[list[Tensor], OutputGradients]:
    outputs = call(model, points.inputs)
    with torch.enable_grad():
        return floating(outputs), output_gradients(outputs, loss, points, refused=model.parameters())


def _generators(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _close(alone: Tensor, together: Tensor, size: float) -> bool:
    if alone.shape != together.shape:
        return False
    tolerance = torch.finfo(alone.dtype).eps ** 0.5
    return torch.allclose(alone, together, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def _largest(tensor: Tensor) -> float:
    """The largest finite entry in size."""
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0
