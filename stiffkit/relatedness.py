"""What chapter 4 shows: whether classes of one superclass are stiff towards each other, and what that comes from."""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from stiffkit import claims
from stiffkit.alignment import group_stiffness
from stiffkit.chapters import Superclasses, rounded
from stiffkit.endpoints import has_learnt
from stiffkit.evolution import at_stages
from stiffkit.regimes import MEASURES, REGIMES
from stiffkit.statistics import all_alike, grouping_test, partial_mantel
from stiffkit.superclasses import KINDS, REALMS, realm_of, realm_of_superclass, superclass_of

MEASURE_NAMES = {"sign": "sign", "cos": "cosine"}


def results(p: Superclasses) -> xr.Dataset:
    """The runs of chapter 4, side by side along `seed`: recorded, cached, or computed now.

    Seeds that have not learnt are left out, unless none has; attribute `left_out` has their numbers.

    Raises:
        TooLongError: before anything is computed, if that would take longer than `p.max_minutes`.
        ParameterError: if the runs are planned by the ledger and none is there.

    """
    p.allow()
    runs = p.found(p.experiments)
    if runs is None:
        raise p.missing(f"run of {p.dataset} with these parameters")
    learnt = has_learnt(runs)
    if not learnt.any():
        return runs.assign_attrs(left_out=[])
    return runs.sel(seed=learnt).assign_attrs(left_out=runs.seed.values[~learnt].tolist())


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
    scale = claims.over_seeds(runs.logit_scale.sel(part="val").isel(images=0), 3)
    left_out = runs.attrs["left_out"]
    return (
        f"Shown here: `{training.dataset}`, network `{training.model}`{norm}, {training.epochs:g} epochs, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}, {points} + {points} images ({runs.source}). At the end it knows "
        f"{known['train']} % of the training images and {known['validation']} % of the validation images. Before "
        f"training the standard deviation of an image's logits is {scale}."
        + (
            f" Left out: {claims.seeds_by_number(left_out)}, whose loss stays at that of uniform answers throughout."
            if left_out
            else ""
        )
    )


def matrices(runs: xr.Dataset, regime: str, measure: str) -> xr.DataArray:
    """Class matrices at the four stages, mean over seeds, (stage, class_a, class_b), ordered by superclass.

    Classes are named, and have their superclass as a coordinate.
    """
    chosen = at_stages(runs, regime).sel(measure=measure)
    names = [str(name).replace("\n", " ") for name in chosen.stage.values]
    return in_order(chosen.assign_coords(stage=names), classes(runs))


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
        MEASURE_NAMES[measure]: {name: here[kind].sel(measure=measure) for kind, name in KINDS.items()}
        for measure in MEASURES
    }


def groupings(p: Superclasses, C: xr.DataArray) -> dict[str, xr.Dataset]:
    """The true superclasses against random groups of classes, at each stage of `matrices`."""
    return {
        str(stage): grouping_test(C.sel(stage=stage), C.superclass.values, permutations=p.permutations)
        for stage in C.stage.values
    }


def tests(p: Superclasses, runs: xr.Dataset) -> pd.DataFrame:
    """The same as a table, before training and at the end: sign and cosine, three regimes."""
    rows = {}
    for measure in MEASURES:
        for regime in REGIMES:
            found = groupings(p, matrices(runs, regime, measure).isel(stage=[0, -1]))
            row = zip(("before training", "at the end"), found.values(), strict=True)
            rows[f"{MEASURE_NAMES[measure]}, {regime}"] = {
                f"{what}, {when}": said
                for when, test in row
                for what, said in (
                    ("difference", rounded(test.observed, 3)),
                    ("effect", f"{rounded(test.effect, 1)} sd"),
                    ("p", chance(test)),
                )
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stiffness")


def chance(test: xr.Dataset) -> str:
    """The two-sided p-value, with two digits."""
    return f"{float(test.p_two_sided):.2g}"


def beyond(p: Superclasses, sets: Mapping[str, xr.Dataset], regime: str = "val-val") -> pd.DataFrame:
    """Superclasses at the end, beyond what inputs, and the matrix before training, explain: partial Mantel tests.

    Matrices are averaged over seeds first; how many is in each row. Where all classes are alike to each other nothing
    is left to explain.
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
                said = "all cells alike", ""
                if not all_alike(late):
                    test = partial_mantel(late, C.superclass.values, controls, permutations=p.permutations)
                    said = rounded(test.observed), chance(test)
                cells[f"correlation {title}"], cells[f"p {title}"] = said
            seeds = {"seeds": str(runs.sizes["seed"])}
            rows[f"{name}, {MEASURE_NAMES[measure]}"] = cells | seeds
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("runs")


def realms(p: Superclasses, runs: xr.Dataset, regime: str = "val-val") -> pd.DataFrame:
    """Superclasses of one realm and of two, at the four stages, and the difference against random realms.

    Superclasses are dealt out to realms of the same sizes, not classes; matrices are averaged over seeds first.
    """
    rows = {}
    for measure in MEASURES:
        C = between_superclasses(matrices(runs, regime, measure))
        groups = [realm_of_superclass(name) for name in C.class_a.values]
        for stage in C.stage.values:
            test = grouping_test(C.sel(stage=stage), groups, permutations=p.permutations)
            means = group_stiffness(C.sel(stage=stage), groups)
            rows[f"{MEASURE_NAMES[measure]}, {stage}"] = {
                "one realm": rounded(means.related, 3),
                "two realms": rounded(means.unrelated, 3),
                "effect": f"{rounded(test.effect, 1)} sd",
                "p": chance(test),
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stiffness")


def between_superclasses(C: xr.DataArray) -> xr.DataArray:
    """Mean cells between superclasses, (stage, class_a, class_b); the diagonal has own cells as well."""
    named = C.assign_coords(class_a=C.superclass.values, class_b=C.superclass.values).drop_vars("superclass")
    return named.groupby("class_a").mean().groupby("class_b").mean()


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
