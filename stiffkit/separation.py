"""What chapter 8 shows: which part of the late picture is the network's, and which is the arithmetic's."""

from collections.abc import Mapping

import pandas as pd
import torch
import xarray as xr

from stiffkit import claims
from stiffkit.chapters import NetworkOrArithmetic, rounded
from stiffkit.endpoints import clipped_prediction, onset, smoothed, window
from stiffkit.experiment import Experiment
from stiffkit.measurement import ARITHMETICS, SPOKEN
from stiffkit.regimes import MEASURES

TRAINED = {  # what figures and tables call the losses that networks are trained with
    "exact": "exact",
    "float32": "fused float32",
    "keras2019": "clipped",
    "mse": "squared error",
    "label_smoothing": "smoothed labels",
}
DETAILS = ("mnist_parts", "mnist_float64", "cifar10_small", "mnist_no_sphere", "mnist_torch", "mnist_torch_no_sphere")
DATASETS = ("mnist", "fashion_mnist", "cifar10")
JUDGING = tuple(f"{d}_{loss}" for d in DATASETS for loss in ("parts", "exact", "keras2019", "mse", "label_smoothing"))
GAPS = (2, 8, 11, 18, 25, 40)  # of the one point; from 12 to 17 float32 keeps so few digits that processors differ


def trained(p: NetworkOrArithmetic) -> dict[str, xr.Dataset]:
    """The chapter's runs by training loss, side by side along `seed`: recorded, cached, or computed now.

    Of runs that the ledger plans those that are recorded or cached; a loss without a run is left out.

    Raises:
        TooLongError: before anything is computed, if that would take longer than `p.max_minutes`.
        ParameterError: if the chapter's first runs are planned and not there.

    """
    p.allow()
    found = _present(p, p.experiments)
    if "float32" not in found:
        raise p.missing(f"run of {p.dataset}, trained with the fused loss,")
    return found


def controls(p: NetworkOrArithmetic) -> dict[str, xr.Dataset]:
    """Networks in which stiffness within classes may fall: on digits one an activation, else the recorded ones."""
    if p.dataset != "digits":
        return recorded_sets("cifar10_parts", "cifar10_relu", "cifar10_tanh", "cifar10_linear")
    return {f"{p.dataset}, {activation}": runs for activation, runs in _present(p, p.controls).items()}


def _present(p: NetworkOrArithmetic, series: Mapping[str, list[Experiment]]) -> dict[str, xr.Dataset]:
    found = {name: p.found(experiments) for name, experiments in series.items()}
    return {name: runs for name, runs in found.items() if runs is not None}


def recorded_sets(*names: str) -> dict[str, xr.Dataset]:
    """Sets of runs of the ledger, as far as they are recorded, by their short titles."""
    return claims.recorded_sets(claims.read(), names)


def best_sets() -> dict[str, xr.Dataset]:
    """For each data set its recorded runs: the ones taken apart, or those of chapter 2 where these are fewer."""
    ledger = claims.read()
    found = claims.recorded_runs(ledger, [n for d in DATASETS for n in (d, f"{d}_parts")])
    sets = {}
    for dataset in DATASETS:
        both = [found[name] for name in (f"{dataset}_parts", dataset) if name in found]
        if both:
            sets[ledger.runs[dataset].short] = max(both, key=lambda runs: runs.sizes["seed"])
    return sets


def description(p: NetworkOrArithmetic, sets: Mapping[str, xr.Dataset]) -> str:
    """What is shown, in a sentence."""
    experiment = next(iter(p.experiments.values()))[0]
    training, points = experiment.training, experiment.measurement.points
    counts = ", ".join(f"{TRAINED[loss]} {runs.sizes['seed']}" for loss, runs in sets.items())
    return (
        f"Shown here: `{training.dataset}`, network `{training.model}`, {training.activation}, {training.epochs:g} "
        f"epochs, {points} + {points} images. Seeds by training loss: {counts or 'none yet'}."
    )


def one_point(classes: int = 10) -> pd.DataFrame:
    """The output gradient of one point, ever more confident, in three arithmetics; closed form and three losses.

    The other classes keep their proportions, so that the exact gradient keeps its direction and shrinks.
    """
    others = torch.linspace(0, -2, classes - 1, dtype=torch.float64)
    exact = torch.cat([-torch.ones(1), others.softmax(0)]).double()  # q - e_y
    rows = {}
    for gap in GAPS:
        z = torch.cat([torch.full((1,), float(gap), dtype=torch.float64) + others.logsumexp(0), others])
        found = {name: _gradient(loss, z) for name, loss in ARITHMETICS.items()}
        rows[gap] = {"gradient's size": f"{float(found['exact'].norm()):.0e}"} | {
            SPOKEN[name]: _angle(gradient, exact) for name, gradient in found.items()
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("logit gap")


def _gradient(loss: object, z: torch.Tensor) -> torch.Tensor:
    z = z[None].requires_grad_()
    loss(z, torch.tensor([0])).sum().backward()
    return z.grad[0]


def _angle(gradient: torch.Tensor, exact: torch.Tensor) -> str:
    size = gradient.norm()
    if size == 0:
        return "no gradient"
    cos = (gradient / size) @ (exact / exact.norm())
    return f"{rounded(torch.rad2deg(torch.arccos(cos.clamp(-1, 1))), 0)}°"


def dose(runs: xr.Dataset) -> xr.Dataset:
    """Clipped and fused float32 less exact, within and between classes by sign, against images past the gap.

    Returns:
        A Dataset along seed and images, of pairs of training images: `past` in %, `within` and `between` (arithmetic),
        and `predicted`, what the clipped loss must give within classes, by class where that was measured.

    """
    here = runs.sel(regime="train-train", measure="sign")
    others = [a for a in ("float32", "keras2019") if a in here.arithmetic]
    less = here[["within", "between"]].sel(arithmetic=others) - here[["within", "between"]].sel(arithmetic="exact")
    by = "class" if "unclipped" in runs else "all"
    predicted = clipped_prediction(runs, "train-train", by) - here.within.sel(arithmetic="exact", drop=True)
    return less.assign(past=100 * runs.past_gap.sel(part="train", drop=True), predicted=predicted)


def late(sets: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """`within` and `between` by sign, of training images, late in training: means over the window, by seed."""
    return {
        name: window(runs[["within", "between", "epochs"]], "late")[["within", "between"]]
        .sel(regime="train-train", measure="sign", drop=True)
        .mean("images")
        .dropna("arithmetic", how="all")
        for name, runs in sets.items()
    }


def deciles(runs: xr.Dataset, arithmetic: str) -> pd.DataFrame:
    """Late, within classes, by the decile of the first image's logit gap: the gap, exact and another arithmetic."""
    here = window(runs[["decile_gap", "decile_within", "epochs"]], "late").mean("images")
    rows = {}
    for decile in here.decile.values:
        one = here.sel(decile=decile)
        shown = {SPOKEN[a]: claims.over_seeds(one.decile_within.sel(arithmetic=a)) for a in ("exact", arithmetic)}
        rows[int(decile)] = {"logit gap": claims.over_seeds(one.decile_gap, 1)} | shown
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("decile")


def zero_gradients(runs: xr.Dataset) -> pd.DataFrame:
    """Late, of training images: what counts for a gradient of exactly zero, and what an added constant does."""
    names = ["within", "alive_within", "padded_within"]
    here = window(runs[[*names, "epochs"]], "late").sel(regime="train-train").mean("images")
    rows = {}
    for arithmetic in here.arithmetic.values:
        one = here.sel(arithmetic=arithmetic)
        if bool(one.within.isnull().all()):
            continue
        rows[SPOKEN[str(arithmetic)]] = {
            "sign, zero counts as 0": claims.over_seeds(one.within.sel(measure="sign")),
            "sign, pairs with zero left out": claims.over_seeds(one.alive_within.sel(measure="sign")),
            "cosine, zero counts as 0": claims.over_seeds(one.within.sel(measure="cos")),
            "cosine, pairs with zero left out": claims.over_seeds(one.alive_within.sel(measure="cos")),
            "cosine, norms padded by 1e-12": claims.over_seeds(one.padded_within),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arithmetic")


def last_values(sets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Late, of training images, by sign: within and between classes in each arithmetic, a row a set of runs."""
    rows = {}
    for name, values in late(sets).items():
        cells = {}
        for arithmetic in [a for a in SPOKEN if a in values.arithmetic]:
            for kind in ("within", "between"):
                cells[f"{kind}, {SPOKEN[arithmetic]}"] = claims.over_seeds(values[kind].sel(arithmetic=arithmetic))
        runs = sets[name].isel(images=-1)
        fit = claims.over_seeds(100 * runs.accuracy.sel(split="train"), 1)
        rows[name] = cells | {"training accuracy (%)": fit, "seeds": str(runs.sizes["seed"])}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("runs").fillna("")  # empty: not measured


def at_the_start(sets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Before training, of training images, exact: sign and cosine within and between classes, a row a set of runs."""
    rows = {}
    for name, runs in sets.items():
        first = runs.sel(regime="train-train", arithmetic="exact").isel(images=0)
        cells = ((kind, measure) for measure in MEASURES for kind in ("within", "between"))
        rows[name] = {f"{k}, {m}": claims.over_seeds(first[k].sel(measure=m)) for k, m in cells}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("runs")


def layer_shares(sets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Late, of training images, exact: the cosine within classes, and the layers' shares in it, which add up to it."""
    rows = {}
    for name, runs in sets.items():
        here = window(runs[["within", "share_within", "epochs"]], "late").sel(regime="train-train").mean("images")
        shares = here.share_within.dropna("layer", how="all")
        cells = {"cosine": claims.over_seeds(here.within.sel(arithmetic="exact", measure="cos"))}
        rows[name] = cells | {f"layer {n}": claims.over_seeds(shares.sel(layer=n)) for n in shares.layer.values}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("runs")
    return table.fillna("")


def turning(sets: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """When overfitting begins, in epochs, and the exact sign within classes of training images; running means."""
    rows = {}
    for name, runs in sets.items():
        within = smoothed(runs.within.sel(arithmetic="exact", measure="sign", regime="train-train", drop=True))
        lost, begin = within.images.where(within < 0.9).min("images"), onset(runs)
        per_epoch = float((runs.images[-1] / runs.epochs.isel(images=-1)).mean())
        late = window(runs[["within", "epochs"]], "late").within.mean("images")
        rows[name] = {
            "sign below 0.9 at epoch": claims.over_seeds(lost / per_epoch, 1) if lost.notnull().any() else "never",
            "least validation loss at epoch": claims.over_seeds(begin / per_epoch, 1),
            "sign there": claims.over_seeds(within.where(within.images == begin).max("images")),
            "sign late": claims.over_seeds(late.sel(arithmetic="exact", measure="sign", regime="train-train")),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("runs")


def rest_of_change(runs: xr.Dataset) -> dict[str, dict[str, xr.DataArray]]:
    """What a real step changes: the share of it within classes, and both summaries weighted by it, by regime."""
    regimes = {"training images": "train-train", "validation images": "val-val"}
    weighted = {
        f"{kind} classes": runs[f"weighted_{kind}"].sel(regime="train-train", weighting="change")
        for kind in ("within", "between")
    }
    shares = {name: runs.within_share.sel(regime=regime) for name, regime in regimes.items()}
    carried = {name: runs.points_for_90.sel(part=part) for name, part in zip(regimes, ("train", "val"), strict=True)}
    return {
        "within classes": shares,
        "weighted sign": weighted,
        "images that count": carried,
    }
