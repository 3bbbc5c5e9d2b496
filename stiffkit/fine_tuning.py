"""What chapter 7 shows: stiffness of a transformer that is tuned on pairs of sentences."""

import json

import pandas as pd
import xarray as xr

from stiffkit import claims, sentence_models
from stiffkit import results as recorded_results
from stiffkit.chapters import BertMnli, ParameterError, rounded
from stiffkit.distances import FEWEST, pooled
from stiffkit.experiment import Experiment
from stiffkit.lengths import lengths

SPLITS = ("train", "validation", "test")
VISION = ("mnist", "cifar10")  # the sets of chapter 2 that stand beside


def results(p: BertMnli) -> xr.Dataset:
    """The runs of chapter 7, side by side along `seed`: recorded, cached, or computed now.

    Raises:
        ParameterError: the model or the pairs are not here and cannot be fetched; a pair is longer than the model
            reads; the tokenizer has no padding; the runs are planned by the ledger, and none is there.
        TooLongError: before anything is computed, if that would take longer than `p.max_minutes`.

    """
    if any(not recorded_results.source(e) for e in p.to_run):
        try:
            sentence_models.load(p.dataset, p.model)  # what is wrong with them is said before anything is computed
        except (FileNotFoundError, ImportError, ValueError) as error:
            raise ParameterError(str(error)) from None
    p.allow()
    runs = p.found(p.experiments)
    if runs is None:
        raise p.missing(f"run of {p.model} on {p.dataset} with these parameters")
    return runs.assign_attrs(seen="pairs")


def description(p: BertMnli, runs: xr.Dataset) -> str:
    """What is shown, and where it comes from, in sentences."""
    experiment: Experiment = p.experiments[0]
    training, points, seeds = experiment.training, experiment.measurement.points, runs.sizes["seed"]
    pairs = round(float((runs.images[-1] / runs.epochs.isel(images=-1)).mean()))
    begin = {"pretrained": "pretrained weights", "random": "random weights"}[training.initialisation]
    last = 100 * runs.accuracy.isel(images=-1)
    known = {split: claims.over_seeds(last.sel(split=split), 1) for split in ("train", "validation")}
    best = claims.over_seeds(100 * runs.accuracy.sel(split="validation").max("images"), 1)
    return (
        f"Shown here: `{training.dataset}`, model `{training.model}` from {begin}, {pairs:,} training pairs, "
        f"{training.epochs:g} epochs of AdamW at {training.learning_rate:g}, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}, {points} + {points} measured pairs ({runs.source}). At the end it knows "
        f"{known['train']} % of the training pairs and {known['validation']} % of the validation pairs; at its best "
        f"checkpoint it knew {best} % of these."
    )


def through_training(runs: xr.Dataset) -> pd.DataFrame:
    """Epoch by epoch: losses, accuracies in per cent, and stiffness of validation pairs by sign."""
    rows = {}
    here = runs.sel(arithmetic="exact", measure="sign", regime="val-val")
    for images in runs.images.values:
        now, stiff = runs.sel(images=images), here.sel(images=images)
        cells = {f"loss, {split}": claims.over_seeds(now.loss.sel(split=split)) for split in SPLITS}
        cells |= {f"accuracy, {s}": claims.over_seeds(100 * now.accuracy.sel(split=s), 1) for s in SPLITS}
        cells |= {f"{kind} classes": claims.over_seeds(stiff[kind]) for kind in ("within", "between")}
        rows[f"{float(now.epochs.mean()):.3g}"] = cells
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("epoch")


def by_section(runs: xr.Dataset, measure: str, regime: str = "val-val") -> xr.Dataset:
    """Stiffness of each section of the model at each checkpoint, exact, mean over seeds: (section, epochs).

    Returns:
        A Dataset with `within` and `between`; the last section is the whole gradient.

    """
    here = runs.sel(measure=measure, regime=regime)
    kinds = {}
    for kind in ("within", "between"):
        own = here[f"layer_{kind}"].rename(layer="section").assign_coords(section=json.loads(runs.attrs["sections"]))
        whole = here[kind].sel(arithmetic="exact", drop=True).expand_dims(section=["whole"])
        kinds[kind] = xr.concat([own, whole], "section").mean("seed")
    epochs = [float(f"{float(e):.2g}") for e in runs.epochs.mean("seed")]
    return xr.Dataset(kinds).assign_coords(images=epochs).rename(images="epochs").drop_vars("layer", errors="ignore")


def curves(runs: xr.Dataset, measure: str, arithmetic: str = "exact") -> xr.Dataset:
    """Stiffness against distance of the embedding and of [CLS], at the end, mean over seeds: as `distances.pooled`."""
    here = runs.isel(images=-1).sel(measure=measure, arithmetic=arithmetic)
    return pooled(here[["curve", "count"]].rename(curve="stiffness").mean("seed"), FEWEST)


def critical_lengths(runs: xr.Dataset, measure: str = "cos") -> pd.DataFrame:
    """The third version's critical length in both spaces, checkpoint by checkpoint; bounds where no zero was seen."""
    rows = {}
    found = lengths(runs.sel(measure=measure, arithmetic="exact"), "line")
    for images in runs.images.values:
        here = found.sel(images=images)
        cells = {space: _over_seeds(here.sel(space=space)) for space in runs.space.values}
        rows[f"{float(runs.epochs.sel(images=images).mean()):.3g}"] = cells
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("epoch")


def _over_seeds(found: xr.Dataset) -> str:
    kinds = set(map(str, found.censored.values))
    if kinds == {""}:
        return claims.over_seeds(found.value)
    if len(kinds) == 1 and kinds <= {"above", "below"}:
        return f"{kinds.pop()} {rounded(float(found.value.mean()))}"
    return f"not in {int((found.censored != '').sum())} of {found.sizes['seed']} seeds"


def beside_vision(ledger: claims.Ledger, runs: xr.Dataset) -> dict[str, xr.Dataset]:
    """The recorded runs of chapter 2, and these, by their short titles."""
    return claims.recorded_sets(ledger, VISION) | {"sentences": runs}


def recorded_sets(ledger: claims.Ledger) -> dict[str, xr.Dataset]:
    """Every set of runs of this chapter that is recorded, by its short title."""
    return claims.recorded_sets(ledger, ledger.of_chapter(BertMnli.number))
