"""What chapter 2 shows: class matrices at four stages, their evolution, and when to stop training."""

from collections.abc import Mapping

import pandas as pd
import xarray as xr

from stiffkit import claims
from stiffkit.chapters import ClassMatrices
from stiffkit.endpoints import stopping_excess, turning_point
from stiffkit.experiment import run_all, stages

SIGNALS = {  # from training images alone: what is followed, and which turn of it says stop
    "between classes, sign": {"signal": "between", "turn": "max", "measure": "sign", "regime": "train-train"},
    "between classes, cosine": {"signal": "between", "turn": "max", "measure": "cos", "regime": "train-train"},
    "within classes, cosine": {"signal": "within", "turn": "max", "measure": "cos", "regime": "train-train"},
    "norm of the mean gradient": {"signal": "gradient_norm", "turn": "min"},
    "gradient disparity": {"signal": "disparity", "turn": "min"},
}


def results(p: ClassMatrices) -> xr.Dataset:
    """The runs of chapter 2, side by side along `seed`: recorded, cached, or computed now.

    Raises:
        TooLongError: before anything is computed, if that would take longer than `p.max_minutes`.

    """
    p.allow()
    return run_all(p.experiments)


def description(p: ClassMatrices, runs: xr.Dataset) -> str:
    """What is shown, and where it comes from, in a sentence."""
    experiment, seeds = p.experiments[0], runs.sizes["seed"]
    training, points = experiment.training, experiment.measurement.points
    return (
        f"Shown here: `{training.dataset}`, network `{training.model}`, {training.epochs:g} epochs, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}, {points} + {points} images ({runs.source})."
    )


def gaps(runs: xr.Dataset) -> str:
    """How confident the networks are at the end, in a sentence."""
    last = runs.isel(images=-1)
    said = []
    for part, name in (("train", "training"), ("val", "validation")):
        median = claims.over_seeds(last.gap.sel(quantile=0.5, part=part), 1)
        past = claims.over_seeds(100 * last.past_gap.sel(part=part), 0)
        said.append(f"{median} for {name} images, {past} % of which are past 16")
    return f"At the end the median logit gap is {' and '.join(said)}."


def fits(sets: Mapping[str, xr.Dataset]) -> str:
    """How well each set of runs fits its training images at the end."""
    last = {name: 100 * runs.accuracy.sel(split="train").isel(images=-1) for name, runs in sets.items()}
    return ", ".join(f"{name} {claims.over_seeds(accuracy, 1)} %" for name, accuracy in last.items())


def at_stages(runs: xr.Dataset, regime: str, arithmetic: str = "exact", variable: str = "stiffness") -> xr.DataArray:
    """Class matrices at the four stages of v1's Fig 6, mean over seeds: (stage, measure, class_a, class_b)."""
    images = stages(runs.images.values)
    chosen = runs[variable].sel(images=images, regime=regime, arithmetic=arithmetic).mean("seed")
    names = ["before\ntraining" if k == 0 else f"{k:,}\n{runs.attrs.get('seen', 'images')}" for k in images]
    return chosen.assign_coords(stage=("images", names)).swap_dims(images="stage")


def stopping(runs: xr.Dataset) -> pd.DataFrame:
    """Stopping where a signal from training images turns: when that is, and what it costs in validation loss."""
    rows = {}
    for name, arguments in SIGNALS.items():
        values = runs[arguments["signal"]]
        if "regime" in arguments:
            values = values.sel(measure=arguments["measure"], regime=arguments["regime"], arithmetic="exact")
        stop = turning_point(values, arguments["turn"])
        excess = stopping_excess(runs, **arguments)
        rows[name] = (stop, excess.sel(arithmetic="exact") if "arithmetic" in excess.dims else excess)
    per_epoch = float((runs.images[-1] / runs.epochs.isel(images=-1)).mean())
    return pd.DataFrame(
        {
            "stops at epoch": [claims.over_seeds(stop / per_epoch, 1) for stop, _ in rows.values()],
            "validation loss above its least (%)": [claims.over_seeds(100 * excess, 0) for _, excess in rows.values()],
        },
        index=pd.Index(rows, name="followed"),
    )


def recorded_sets(ledger: claims.Ledger) -> dict[str, xr.Dataset]:
    """Every set of runs of this chapter that is recorded, by its short title."""
    return claims.recorded_sets(ledger, ledger.of_chapter(ClassMatrices.number))
