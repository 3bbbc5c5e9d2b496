"""The conditions of a measurement: a model that can be measured, left as it was found, in full precision."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import psutil
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm


def measurable(model: nn.Module) -> nn.Module:
    """Return the model (on Apple's MPS, which has no float64, a copy on the CPU), or say why it cannot be measured."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient: call model.requires_grad_(True)")
    for name, module in model.named_modules():
        _refuse_batch_dependence(name or "the model", module)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.max_norm is not None or module.sparse):
            raise ValueError(f"layer {name!r}: an embedding with max_norm or sparse gradients cannot be measured")
    hooked = [name for name, p in model.named_parameters() if p.requires_grad and p._backward_hooks]
    if hooked:
        raise ValueError(f"parameter {hooked[0]!r} has a hook that may change its gradient: remove it first")
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


Parameters = Callable[[str, nn.Parameter], bool] | Iterable[str]  # which ones count


@contextmanager
def measured(model: nn.Module, parameters: Parameters | None = None) -> Iterator[nn.Module]:
    """A model as it is measured: undisturbed, and with all but the chosen parameters frozen; restored afterwards."""
    model = measurable(model)
    chosen = None if parameters is None else _chosen(model, parameters)
    frozen = [
        p for name, p in model.named_parameters() if chosen is not None and name not in chosen and p.requires_grad
    ]
    try:
        for p in frozen:
            p.requires_grad_(False)
        with undisturbed(model):
            yield model
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _chosen(model: nn.Module, parameters: Parameters) -> set[str]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if callable(parameters):
        chosen = {name for name, p in named.items() if parameters(name, p)}
    else:
        chosen = {parameters} if isinstance(parameters, str) else set(parameters)
        if unknown := chosen - set(named):
            near = get_close_matches(min(unknown), named, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no trainable parameter is called {', '.join(map(repr, sorted(unknown)))}{hint}")
    if not chosen:
        raise ValueError(f"no parameter was chosen; there are {', '.join(list(named)[:10])}")
    return chosen


def progress(total: int, what: str) -> tqdm:
    """A bar on a terminal, shown once something takes longer than some seconds."""
    return tqdm(total=total, desc=what, delay=5.0, leave=False, disable=None)


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Switch gradients on; autocast, TF32 and fused inference off. Afterwards restore model, generator and settings."""
    modules = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    values = [(b, b.clone()) for b in model.buffers()]
    fastpath, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    autocast = torch.autocast("cuda" if devices else "cpu", enabled=False)
    try:
        # nn.TransformerEncoder computes something else at padded positions where it may take its fused path.
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # which cuDNN differentiates in train mode alone
            torch.backends.cudnn.enabled = False
        with (
            full_precision(),
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            autocast,
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.cudnn.enabled = cudnn
        for module, attributes, parameters, buffers in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 numbers as such, not rounded to TF32 or less; afterwards restore the settings."""
    before = [(backend, backend.fp32_precision) for backend in _backends()]
    try:
        for backend, _ in before:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision


def _backends() -> list:
    """Where PyTorch keeps the precision of float32 products."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
