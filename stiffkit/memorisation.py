"""What chapter 3 shows: networks that are taught random labels, beside the same ones with true labels."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from stiffkit import claims
from stiffkit.chapters import RandomLabels, rounded
from stiffkit.endpoints import coherence_rise, window
from stiffkit.evolution import at_stages
from stiffkit.measurement import AGREEMENT

GIVEN = {"stiffness": "given classes", "true_stiffness": "true classes"}
PAIRS = {  # what figures call pairs, by whether their given labels and their true ones agree
    "same given, same true": ("same", "same"),
    "same given, other true": ("same", "other"),
    "other given, same true": ("other", "same"),
    "other given, other true": ("other", "other"),
}


def taught(p: RandomLabels) -> dict[str, xr.Dataset]:
    """The runs with random labels, of all images and of few, and with true labels: recorded, cached, or computed now.

    Each side by side along `seed`. Of runs that the ledger plans those that are recorded or cached.

    Raises:
        TooLongError: before anything is computed, if that would take longer than `p.max_minutes`.
        ParameterError: if a series is planned and no run of it is there.

    """
    p.allow()
    found = {name: p.found(experiments) for name, experiments in p.experiments.items()}
    for name in ("random labels", "true labels"):
        if found[name] is None:
            raise p.missing(f"run of {p.dataset} with {name}")
    return {name: with_truth(runs) for name, runs in found.items() if runs is not None}


def with_truth(runs: xr.Dataset) -> xr.Dataset:
    """With what is told by true class: where no label is permuted, that is what is told by given class."""
    if "true_within" in runs and runs.true_within.notnull().any():  # recorded beside others it is there, and empty
        return runs
    same = {f"true_{name}": runs[name] for name in ("stiffness", "within", "between") if name in runs}
    whole = runs[["within", "between"]].sel(arithmetic="exact", drop=True)
    kinds = [[whole.within, whole.within * np.nan], [whole.between * np.nan, whole.between]]
    crossed = xr.concat([xr.concat(row, "true") for row in kinds], "given")
    same["crossed"] = crossed.assign_coords(given=list(AGREEMENT), true=list(AGREEMENT))
    return runs.assign(same)


def description(p: RandomLabels, sets: Mapping[str, xr.Dataset]) -> str:
    """What is shown, and where it comes from, in a sentence."""
    said = []
    for name, runs in sets.items():
        epochs, seeds = float(runs.epochs.max()), runs.sizes["seed"]
        said.append(f"{name}, {epochs:g} epochs, {seeds} {'seed' if seeds == 1 else 'seeds'} ({runs.source})")
    training, points = p.experiments["random labels"][0].training, p.experiments["random labels"][0].measurement.points
    return (
        f"Shown here: `{training.dataset}`, network `{training.model}`, {100 * p.label_noise:g} % of the labels "
        f"permuted, {points} + {points} images; {'; '.join(said)}."
    )


def learnt(sets: Mapping[str, xr.Dataset]) -> str:
    """How many of their training images' labels networks know at the end, and of other images' ones, in a sentence."""
    said = []
    for name, runs in sets.items():
        last = 100 * runs.accuracy.isel(images=-1)
        train, test = (claims.over_seeds(last.sel(split=split), 0) for split in ("train", "test"))
        said.append(f"{name}, {train} % of the labels given to training images and {test} % of the true ones of others")
    return f"What networks know at the end: {'; '.join(said)}."


def matrices(runs: xr.Dataset, regime: str, arithmetic: str, measure: str) -> xr.DataArray:
    """Class matrices at four stages by given and by true class: (labels, stage, class_a, class_b)."""
    found = [at_stages(runs, regime, arithmetic, name).sel(measure=measure, drop=True) for name in GIVEN]
    return xr.concat(found, "labels").assign_coords(labels=list(GIVEN.values()))


def onset_by_layer(runs: xr.Dataset, regime: str) -> dict[str, dict[str, xr.DataArray]]:
    """What is known of the given labels, and the sign within and between them, layer by layer."""
    alone = runs.sel(regime=regime, measure="sign").dropna("layer", how="all", subset=["layer_within"])
    known = {f"{split} images": runs.accuracy.sel(split=split) for split in ("train", "validation")}
    by_layer = {
        f"{kind} classes": {f"layer {n}": alone[f"layer_{kind}"].sel(layer=n) for n in alone.layer.values}
        for kind in ("within", "between")
    }
    return {"labels known": known, **by_layer}


def agreement(runs: xr.Dataset, measure: str) -> dict[str, dict[str, xr.DataArray]]:
    """Stiffness by whether two images have the same given label and the same true one, for two regimes."""
    here = runs.crossed.sel(measure=measure)
    kinds = {name: here.sel(given=given, true=true) for name, (given, true) in PAIRS.items()}
    return {
        title: {name: values.sel(regime=regime) for name, values in kinds.items() if values.notnull().any()}
        for title, regime in (("training images", "train-train"), ("validation images", "val-val"))
    }


def coherences(sets: Mapping[str, xr.Dataset]) -> dict[str, dict[str, xr.DataArray]]:
    """The m-coherence of training, and of validation, images."""
    parts = {"training images": "train", "validation images": "val"}
    return {
        title: {name: runs.coherence.sel(part=part) for name, runs in sets.items()} for title, part in parts.items()
    }


def by_share(p: RandomLabels, sets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """From true labels to random ones: what is known at the end, late signs, and how far coherence rises."""
    series = {0.0: sets["true labels"], p.label_noise: sets["random labels"]}
    series |= {share: runs for share in p.shares if (runs := p.found(p.with_noise(share))) is not None}
    rows = {}
    for share, runs in sorted(series.items()):
        late = window(runs[["within", "between", "epochs"]], "late").mean("images")
        sign, cosine = (late.sel(arithmetic="exact", measure=m, regime="train-train") for m in ("sign", "cos"))
        last = 100 * runs.accuracy.isel(images=-1)
        rows[f"{100 * share:g} %"] = {
            "epochs": f"{float(runs.epochs.max()):g}",
            "given labels known (%)": claims.over_seeds(last.sel(split="train"), 0),
            "true labels of others known (%)": claims.over_seeds(last.sel(split="test"), 0),
            "sign within given classes": claims.over_seeds(sign.within),
            "between": claims.over_seeds(sign.between),
            "cosine within": claims.over_seeds(cosine.within, 3),
            "coherence rises to": f"{rounded(coherence_rise(runs, 'train').mean(), 1)} times",
            "seeds": str(runs.sizes["seed"]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("random labels")
