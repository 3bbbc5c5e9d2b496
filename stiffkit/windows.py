"""Averages over neighbouring checkpoints: before training, around a training loss, around an epoch, at the end.

What is measured at a single checkpoint moves from one to the next by as much as learning rates differ. So values are
averaged over `WINDOW` checkpoints, never weights, and the loss that a window stands for is averaged over the same ones.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

WINDOW = 11  # checkpoints


def places(losses: Sequence[float], epochs: float) -> list[str]:
    """The windows of a run, by name: "start", "loss 0.3", ..., "epoch 1", "epoch 2", "epoch 4", ..., "end".

    >>> places([0.3, 0.1], 5)
    ['start', 'loss 0.3', 'loss 0.1', 'epoch 1', 'epoch 2', 'epoch 4', 'end']

    """
    doubled = [2**k for k in range(64) if 1.25 * 2**k <= epochs]  # whose windows end before the run
    return ["start", *(f"loss {loss:g}" for loss in losses), *(f"epoch {k}" for k in doubled), "end"]


def at(values: xr.DataArray | xr.Dataset, runs: xr.Dataset, place: str) -> xr.DataArray | xr.Dataset:
    """Values averaged over the window of that name, without `images`.

    * start: the checkpoint before training alone.
    * loss 0.1: where the loss of the training subset first falls to 0.1, on a straight line in its logarithm between
      two windows; NaN for a run that is above it at its end, or below it from its first window on.
    * epoch 4: the window whose middle is nearest, by ratio; NaN where the run has none within a tenth of it.
    * end: the last window.

    Args:
        values: along `images`. What is NaN, such as an arithmetic that was not measured, is left out of a mean.
        runs: with `loss` and `epochs` at the same checkpoints.
        place: as `places` has it.

    """
    kind, _, number = place.partition(" ")
    if kind == "start":
        return values.isel(images=0, drop=True).where(runs.epochs.isel(images=0, drop=True) == 0)
    if kind == "loss":
        before, after, share = _fall(runs, float(number))
        return (1 - share) * _mean(values, runs, before) + share * _mean(values, runs, after)
    middles = _loss(runs).notnull()
    if kind == "end":
        last = middles.sizes["images"] - 1 - middles.isel(images=slice(None, None, -1)).argmax("images")
        return _mean(values, runs, last.where(middles.any("images")))
    away = abs(np.log(runs.epochs.where(middles & (runs.epochs > 0)) / float(number)))
    nearest = away.fillna(np.inf).argmin("images")
    return _mean(values, runs, nearest.where(away.min("images") < np.log(1.1)))


def together(values: xr.DataArray | xr.Dataset, runs: xr.Dataset, names: Sequence[str]) -> xr.DataArray | xr.Dataset:
    """The averages over several windows, along `at`."""
    return xr.concat([at(values, runs, name) for name in names], "at").assign_coords(at=list(names))


def images_at(runs: xr.Dataset, place: str) -> xr.DataArray:
    """The images seen at the middle of a window, geometric mean; NaN where the run has no such window."""
    return np.exp(at(np.log(runs.images.where(runs.images > 0).astype(float)), runs, place))


def _loss(runs: xr.Dataset) -> xr.DataArray:
    """Of the training subset, in windows; NaN where one would reach over an end of the run."""
    return runs.loss.sel(split="train", drop=True).where(runs.epochs > 0).rolling(images=WINDOW, center=True).mean()


def _fall(runs: xr.Dataset, level: float) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Between which windows, by their middles, the loss first falls to a level, and how far on its way."""
    loss = np.log(_loss(runs))
    there = loss <= np.log(level)
    after = there.argmax("images")
    fallen = there.any("images") & (loss.shift(images=1).isel(images=after, drop=True).notnull())
    high, low = (loss.isel(images=k, drop=True) for k in ((after - 1).clip(min=0), after))
    share = (high - np.log(level)) / (high - low)
    return (after - 1).where(fallen), after.where(fallen), share.where(fallen)


def _mean(values: xr.DataArray | xr.Dataset, runs: xr.Dataset, middle: xr.DataArray) -> xr.DataArray | xr.Dataset:
    """Mean over the window around a checkpoint, by its place; NaN where there is none."""
    first = (middle.fillna(0).astype(int) - WINDOW // 2).clip(min=0)
    window = first + xr.DataArray(np.arange(WINDOW), dims="window")
    last = runs.sizes["images"] - 1
    return (
        values.isel(images=window.clip(max=last))
        .mean("window")
        .where(middle.notnull())
        .drop_vars("images", errors="ignore")
    )
