"""The conditions of a measurement: a model that can be measured, left as it was found, in full precision."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


def measurable(model: nn.Module) -> nn.Module:
    """Return the model (on Apple's MPS, which has no float64, a copy on the CPU), or say why it cannot be measured."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient: call model.requires_grad_(True)")
    for name, module in model.named_modules():
        _refuse_batch_dependence(name or "the model", module)
    if trainable[0].device.type == "mps":
        warnings.warn("float64 is missing on MPS: a copy of the model is measured on the CPU", stacklevel=3)
        return copy.deepcopy(model).cpu()
    return model


def _refuse_batch_dependence(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, _BatchNorm) and module.training:
        raise ValueError(
            f"layer {name!r} ({kind}) is in train mode: it normalises each point by its batch, so that no point has a "
            "gradient of its own. Call model.eval() first."
        )
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        raise ValueError(
            f"layer {name!r} ({kind}) keeps no running statistics and normalises each point by its batch, in eval mode "
            "too. Build it with track_running_stats=True, or use another normalisation."
        )
    dropout = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    if module.training and isinstance(dropout, float) and dropout > 0:
        raise ValueError(
            f"layer {name!r} ({kind}) is in train mode with dropout {dropout}: gradients would be random. "
            "Call model.eval() first."
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Switch gradients on, autocast and TF32 off; afterwards restore buffers, random numbers and settings."""
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        autocast = torch.autocast("cuda" if devices else "cpu", enabled=False)
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
