"""Training as a generator that stops at checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from stiffkit.losses import cross_entropy_float32
from stiffkit.measuring import full_precision
from stiffkit.output_gradients import Loss
from stiffkit.points import Points

TRAINING_VERSION = (
    1  # raised when the same experiment would give other weights; results of another version are not used
)
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
POOL = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stands: the model and optimiser are the live ones, so measure before asking for the next.

    Attributes:
        images: training images seen so far, counted with repetition.
        epochs: the same in passes over the training set.
        loss: mean training loss since the last checkpoint, over the batches as they came; NaN at the start.
        diverged: True if that loss or a weight is not finite; it is then the last checkpoint.
        model: the network being trained.
        optimizer: its optimiser, with its state.

    """

    images: int
    epochs: float
    loss: float
    diverged: bool
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def state(self) -> dict[str, Any]:
        """What `train` goes on from with `resume`: a dict of tensors and numbers, as `torch.save` takes it."""
        return {"images": self.images, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def train(
    model: nn.Module,
    points: Points,
    *,
    checkpoints: Sequence[float],
    unit: str = "epochs",
    seed: int,
    loss: Loss = cross_entropy_float32,
    optimizer: str = "adam",
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    lengths: Tensor | None = None,
    clip: float = 0.0,
    mixed: bool = False,
    resume: Mapping[str, Any] | None = None,
) -> Iterator[Checkpoint]:
    """Train at a constant learning rate, stopping at every checkpoint; training ends with the last one.

    Args:
        model: trained in place.
        points: `(inputs, targets)`, tensors on the model's device; shuffled anew each epoch.
        checkpoints: when to yield, ascending, 0 being the model as it is given; reached after the first batch that
            brings the images seen to at least that number.
        unit: of the checkpoints, "epochs" (fractions allowed) or "images" seen.
        seed: of the order of the points. On one kind of machine it means the same weights bit for bit, because
            training runs in one thread; between checkpoints the caller's number of threads is restored. Dropout
            draws from it as well, and from the images seen.
        loss: one loss a sample; the mean over the batch is minimised.
        optimizer: "adam" (betas 0.9 and 0.999, epsilon 1e-8, fused), "adamw" (the same with a weight decay of 0.01, as
            transformers are tuned) or "sgd" (no momentum).
        learning_rate: constant.
        batch_size: points in a step, 32 in the paper; the last batch of an epoch may be smaller.
        lengths: of sequences, (n,). Given, batches hold sequences of about one length: each epoch's order is cut into
            pools of 50 batches, each pool sorted by length, and the batches are taken in a new order.
        clip: the norm that the gradient of a batch is cut to; 0: it is not.
        mixed: compute the outputs, and their gradients, in bfloat16 where torch holds that to be safe; weights, losses
            and optimiser stay as they are.
        resume: the `state` of a checkpoint of the same training: it goes on from there, with the numbers that it would
            have had without the stop; only the checkpoints after it are yielded.

    Returns:
        An iterator of one `Checkpoint` for each entry of `checkpoints`. If the loss stops being finite, which is
        noticed at the next checkpoint or end of an epoch, a checkpoint says `diverged` and is the last.

    Raises:
        ValueError: an unknown optimiser or unit; checkpoints that are empty, negative or not ascending; lengths of
            another number of points.

    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is unknown; known are {', '.join(OPTIMIZERS)}")
    if lengths is not None and len(lengths) != len(points[1]):
        raise ValueError(f"there are {len(points[1])} points and {len(lengths)} lengths")
    due = _due(checkpoints, unit, len(points[1]))
    steps = OPTIMIZERS[optimizer](model.parameters(), lr=learning_rate, fused=True)
    begin = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        steps.load_state_dict(resume["optimizer"])
        begin = resume["images"]
        due = [k for k in due if k > begin]
    batches = _batches(len(points[1]), batch_size, seed, begin, points[1].device, lengths)
    return _in_one_thread(_train(model, points, due, seed, loss, steps, batches, clip, mixed, begin))


def _train(
    model: nn.Module,
    points: Points,
    due: list[int],
    seed: int,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    clip: float,
    mixed: bool,
    begin: int,
) -> Iterator[Checkpoint]:
    inputs, targets = points
    n = len(targets)
    images, seen, total = begin, 0, torch.zeros((), device=targets.device)
    if due[:1] == [0]:
        yield Checkpoint(0, 0.0, float("nan"), False, model, optimizer)
    draws = inputs.dtype == torch.int64  # sequences: their models may drop out by a function
    draws = draws or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    for batch in batches:
        if not due or images >= due[-1]:
            return
        with _drawing(seed, images, targets.device) if draws else nullcontext():
            with torch.autocast(targets.device.type, torch.bfloat16, enabled=mixed):
                outputs = model(inputs[batch])
            losses = loss(outputs.float() if mixed else outputs, targets[batch])
        optimizer.zero_grad()
        losses.mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        total += losses.detach().sum()
        images, seen = images + len(batch), seen + len(batch)
        reached = [image for image in due if images - len(batch) < image <= images]
        diverged = (bool(reached) or images % n == 0) and not _is_finite(total, model)
        if reached or diverged:
            here = Checkpoint(images, images / n, float(total) / seen, diverged, model, optimizer)
            yield from [here] if diverged else [here] * len(reached)
            seen, total = 0, torch.zeros_like(total)
        if diverged:
            return


def _is_finite(total: Tensor, model: nn.Module) -> bool:
    return bool(total.isfinite()) and all(bool(p.isfinite().all()) for p in model.parameters())


@contextmanager
def _drawing(seed: int, images: int, device: torch.device) -> Iterator[None]:
    """Draw what dropout draws from the seed and the images seen, so that a run that goes on draws the same."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + images)
        yield


def _batches(
    n: int, size: int, seed: int, begin: int, device: torch.device, lengths: Tensor | None = None
) -> Iterator[Tensor]:
    """Endless batches of indices, shuffled anew each epoch, from the one on that follows the images to begin with.

    The order is drawn on the CPU, the same for every device, and moved at once: a GPU would wait for it at each step.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs, rest = divmod(begin, n)
    for _ in range(epochs):  # brings the generator to where it was
        _order(n, size, generator, lengths)
    while True:
        order, sizes = _order(n, size, generator, lengths)
        behind = [k for k, end in enumerate(accumulate(sizes)) if end <= rest]
        yield from order.to(device).split(sizes)[len(behind) :]
        rest = 0


def _order(n: int, size: int, generator: torch.Generator, lengths: Tensor | None) -> tuple[Tensor, list[int]]:
    """The order of an epoch, and the sizes of its batches."""
    order = torch.randperm(n, generator=generator)
    if lengths is None:
        return order, [len(batch) for batch in order.split(size)]
    known = lengths.cpu()
    pools = [pool[known[pool].argsort(stable=True)] for pool in order.split(POOL * size)]
    batches = [batch for pool in pools for batch in pool.split(size)]
    whole = [batch for batch in batches if len(batch) == size]
    smaller = batches[len(whole) :]  # at most one, which ends the epoch
    chosen = [*(whole[k] for k in torch.randperm(len(whole), generator=generator)), *smaller]
    return torch.cat(chosen), [len(batch) for batch in chosen]


def _due(checkpoints: Sequence[float], unit: str, n: int) -> list[int]:
    if unit not in ("epochs", "images"):
        raise ValueError(f'unit must be "epochs" or "images", got {unit!r}')
    if not checkpoints or min(checkpoints) < 0 or any(a >= b for a, b in pairwise(checkpoints)):
        raise ValueError(f"checkpoints must ascend from 0 or more, got {list(checkpoints)} {unit}")
    if not n:
        raise ValueError("there are no points to train on")
    return [ceil(round(c * n, 6)) if unit == "epochs" else ceil(c) for c in checkpoints]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, which gives the same numbers bit for bit on one kind of machine, and without TF32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_precision():
            yield
    finally:
        torch.set_num_threads(threads)


def _in_one_thread(checkpoints: Iterator[Checkpoint]) -> Iterator[Checkpoint]:
    """Compute each checkpoint in one thread, and give the caller's threads back before handing it over."""
    while True:
        with one_thread():
            checkpoint = next(checkpoints, None)
        if checkpoint is None:
            return
        yield checkpoint
