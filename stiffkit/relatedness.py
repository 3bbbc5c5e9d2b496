"""What chapter 4 shows: whether classes of one superclass are stiff towards each other, and what that comes from."""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from stiffkit import claims
from stiffkit.chapters import ParameterError, Superclasses, rounded
from stiffkit.experiment import stages
from stiffkit.regimes import MEASURES, REGIMES
from stiffkit.statistics import grouping_test, partial_mantel
from stiffkit.superclasses import REALMS, realm_of, superclass_of

KINDS = {  # what figures call the means
    "within": "within a class",
    "related": "two classes of one superclass",
    "unrelated": "two of different ones",
}
SPOKEN = {"sign": "sign", "cos": "cosine"}


def results(p: Superclasses) -> xr.Dataset:
    """The runs of chapter 4, side by side along `seed`: recorded, cached, or computed now.

    Raises:
        TooLongError: before anything is computed, if that would take longer than `p.max_minutes`.
        ParameterError: if the runs are planned by the ledger and none is there.

    """
    p.allow()
    runs = p.found(p.experiments)
    if runs is None:
        raise ParameterError(
            f"no run of {p.dataset} with these parameters is recorded or in the cache. The sweeps book/sweeps/04_*.yml "
            "compute the planned ones: .venv/bin/stiffkit sweep FILE"
        )
    return runs


def classes(runs: xr.Dataset) -> list[str]:
    """The names of the classes, in the order of their numbers."""
    return json.loads(runs.attrs["classes"])


def description(p: Superclasses, runs: xr.Dataset) -> str:
    """What is shown, and where it comes from, in sentences."""
    experiment, seeds = p.experiments[0], runs.sizes["seed"]
    training, points = experiment.training, experiment.measurement.points
    norm = " with batch norm" if training.batch_norm else ""
    last = 100 * runs.accuracy.isel(images=-1)
    known = {split: claims.over_seeds(last.sel(split=split), 0) for split in ("train", "validation")}
    scale = claims.over_seeds(runs.logit_scale.sel(part="val").isel(images=0))
    return (
        f"Shown here: `{training.dataset}`, network `{training.model}`{norm}, {training.epochs:g} epochs, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}, {points} + {points} images ({runs.source}). At the end it knows "
        f"{known['train']} % of the training images and {known['validation']} % of the validation images. Before "
        f"training the standard deviation of an image's logits is {scale}."
    )


def matrices(runs: xr.Dataset, regime: str, measure: str) -> xr.DataArray:
    """Class matrices at the four stages, mean over seeds, (stage, class_a, class_b), ordered by superclass.

    Classes are named, and have their superclass as a coordinate.
    """
    images = stages(runs.images.values)
    chosen = runs.stiffness.sel(images=images, regime=regime, measure=measure, arithmetic="exact").mean("seed")
    names = ["before training" if k == 0 else f"{k:,} images" for k in images]
    chosen = chosen.assign_coords(stage=("images", names)).swap_dims(images="stage")
    return in_order(chosen, classes(runs))


def in_order(C: xr.DataArray, names: list[str]) -> xr.DataArray:
    """A class matrix with its classes named and ordered by realm, superclass and name."""
    order = sorted(range(len(names)), key=lambda k: (realm_of([names[k]]), superclass_of([names[k]]), names[k]))
    chosen = C.isel(class_a=order, class_b=order)
    named = [names[k] for k in order]
    return chosen.assign_coords(class_a=named, class_b=named, superclass=("class_a", list(superclass_of(named))))


def through_training(runs: xr.Dataset, regime: str) -> dict[str, dict[str, xr.DataArray]]:
    """The means within a class, between classes of one superclass, and of different ones, by sign and by cosine."""
    here = runs.sel(regime=regime, arithmetic="exact")
    return {
        SPOKEN[measure]: {name: here[kind].sel(measure=measure) for kind, name in KINDS.items()} for measure in MEASURES
    }


def groupings(p: Superclasses, runs: xr.Dataset, regime: str, measure: str) -> dict[str, xr.Dataset]:
    """The true superclasses against random groups of classes, at the four stages; C averaged over seeds first."""
    C = matrices(runs, regime, measure)
    return {
        str(stage): grouping_test(C.sel(stage=stage), C.superclass.values, permutations=p.permutations)
        for stage in C.stage.values
    }


def tests(p: Superclasses, runs: xr.Dataset) -> pd.DataFrame:
    """The same as a table, before training and at the end: sign and cosine, three regimes."""
    rows = {}
    for measure in MEASURES:
        for regime in REGIMES:
            found = groupings(p, runs, regime, measure)
            ends = {"before training": next(iter(found.values())), "at the end": list(found.values())[-1]}
            rows[f"{SPOKEN[measure]}, {regime}"] = {
                f"{what}, {when}": said
                for when, test in ends.items()
                for what, said in (
                    ("difference", rounded(test.observed, 3)),
                    ("effect", f"{rounded(test.effect, 1)} sd"),
                    ("p", chance(test)),
                )
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stiffness")


def chance(test: xr.Dataset) -> str:
    """The smaller of both one-sided p-values, and which side it is of."""
    above, below = float(test.p), float(test.p_below)
    return f"{above:.4f}" if above <= below else f"{below:.4f} (below chance)"


def beyond(p: Superclasses, sets: Mapping[str, xr.Dataset], regime: str = "val-val") -> pd.DataFrame:
    """Superclasses at the end, beyond what inputs, and the matrix before training, explain: partial Mantel tests.

    Matrices are averaged over seeds first.
    """
    rows = {}
    for name, runs in sets.items():
        inputs = in_order(runs.input_similarity.sel(regime=regime).mean("seed"), classes(runs))
        for measure in MEASURES:
            C = matrices(runs, regime, measure)
            start, late = C.isel(stage=0, drop=True), C.isel(stage=-1, drop=True)
            cells = {}
            for title, controls in (
                ("alone", []),
                ("beyond the inputs", [inputs]),
                ("and the start", [inputs, start]),
            ):
                test = partial_mantel(late, C.superclass.values, controls, permutations=p.permutations)
                cells[f"correlation {title}"], cells[f"p {title}"] = rounded(test.observed), chance(test)
            rows[f"{name}, {SPOKEN[measure]}"] = cells
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("runs")


def realms(runs: xr.Dataset, regime: str = "val-val") -> pd.DataFrame:
    """Classes of different superclasses, of one realm and of different ones: means over seeds at the four stages."""
    here = runs.sel(regime=regime, arithmetic="exact", images=stages(runs.images.values))
    rows = {}
    for k in here.images.values:
        row = {}
        for measure in MEASURES:
            one = here.sel(images=k, measure=measure)
            excess = one.realm_related - one.realm_unrelated
            row[f"{SPOKEN[measure]}, one realm"] = claims.over_seeds(one.realm_related, 3)
            row[f"{SPOKEN[measure]}, two realms"] = claims.over_seeds(one.realm_unrelated, 3)
            row[f"{SPOKEN[measure]}, difference"] = claims.over_seeds(excess, 3)
        rows["before training" if k == 0 else f"{k:,} images"] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")


def reasons(p: Superclasses) -> pd.DataFrame:
    """The realms, their superclasses, and why these."""
    rows = {
        name: {"superclasses": ", ".join(r.superclasses), "reason": r.reason} for name, r in REALMS[p.dataset].items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("group")


def by_superclass(runs: xr.Dataset, regime: str, measure: str) -> pd.DataFrame:
    """For each superclass, at the end: its classes among each other, and towards all others."""
    C = matrices(runs, regime, measure).isel(stage=-1)
    groups = C.superclass.values
    rows = {}
    for name in dict.fromkeys(groups):
        inside, block = groups == name, C.values[groups == name]
        own = block[:, inside][~np.eye(int(inside.sum()), dtype=bool)]
        rows[name] = {
            "among its classes": rounded(own.mean(), 3),
            "towards others": rounded(block[:, ~inside].mean(), 3),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("superclass")


def shuffled(p: Superclasses) -> dict[str, xr.Dataset]:
    """The runs with permuted labels, as far as they are there, by their name in tables."""
    runs = p.found(p.shuffled)
    return {} if runs is None else {"labels shuffled": runs}


def recorded_sets() -> dict[str, xr.Dataset]:
    """Every set of runs of this chapter that is recorded, by its short title."""
    ledger = claims.read()
    return claims.recorded_sets(ledger, [n for n, runs in ledger.runs.items() if runs.chapter == Superclasses.number])
