"""What a run measures at a checkpoint: class matrices in three regimes, their companions, loss and accuracy."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from stiffkit.alignment import group_stiffness, same_group, stiffness, within_between
from stiffkit.attribution import attribution_of, in_sections, whole
from stiffkit.data import Dataset, Points, balanced_subset
from stiffkit.gradients import GradientGram, gradient_gram
from stiffkit.losses import cross_entropy, cross_entropy_float32, cross_entropy_keras2019
from stiffkit.output_gradients import Loss
from stiffkit.regimes import MEASURES, REGIMES, blocks, cells, class_matrices, labelled, sides
from stiffkit.spaces import Spaces
from stiffkit.statistics import bootstrap_error

MEASUREMENT_VERSION = (
    1  # raised when the same weights would give other numbers; results of another version are not used
)
ARITHMETICS = {
    "exact": cross_entropy,
    "float32": cross_entropy_float32,
    "keras2019": cross_entropy_keras2019,
}
OWN = "own"  # stands beside them for the loss that the network is trained with
SPOKEN = {  # what figures and tables call them
    "exact": "exact",
    "float32": "fused float32",
    "keras2019": "clipped",
    OWN: "own loss",
}
GAP = 16.0  # the logit gap beyond which float32 loses 1 - p, and clipping makes the gradient zero
AGREEMENT = ("same", "other")  # of the labels of a pair
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
COMPANIONS = (  # of stiffness, and the dimensions that they alone have: chapter 2 shows them, others leave them out
    "centred_within",
    "centred_between",
    "centring",
    "weighted_within",
    "weighted_between",
    "weighting",
    "within_share",
    "points_for_90",
    "disparity",
    "gradient_norm",
    "mean_norm",
    "wrong_sign",
)
BATCHES = 10  # of the training points, for gradient disparity


def measured_points(dataset: Dataset, size: int, seed: int) -> tuple[Points, Points]:
    """The `size` training and `size` validation points, balanced over classes, that a seed stands for."""
    index, index2 = measured_indices(dataset, size, seed)
    (x, y), (x2, y2) = dataset.train, dataset.validation
    return (x[index], y[index]), (x2[index2], y2[index2])


def measured_indices(dataset: Dataset, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of the training and of the validation points `measured_points` are; shorter sequences first."""
    drawn = [(x, balanced_subset(y, size, seed)) for x, y in (dataset.train, dataset.validation)]
    return tuple(index if x.is_floating_point() else index.sort().values for x, index in drawn)


def measure(
    model: nn.Module,
    training: Points,
    validation: Points,
    arithmetics: Sequence[str] = ("exact",),
    *,
    errors: bool,
    own: Loss | None = None,
    attribution: bool = False,
    truth: Tensor | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    spaces: Spaces | None = None,
) -> xr.Dataset:
    r"""Stiffness of training and validation points at one checkpoint.

    One Gram matrix over all points in each arithmetic; the three regimes are its blocks (Fort et al., v3, Figs 3 to 5).

    Args:
        model: as for `gradient_gram`; its outputs are logits, (n, classes).
        training: `(inputs, targets)`, n points.
        validation: likewise.
        arithmetics: of `ARITHMETICS`, "exact" among them: the others are compared with it. Also "own", the loss that
            the network was trained with.
        errors: also bootstrap errors over points, of train-train and val-val in exact arithmetic.
        own: the loss that "own" stands for.
        attribution: also what `attribution_of` gives, of the network's layers, or of its sections if it has a method
            `section` that gives the section of a layer by its name.
        truth: the true class of each point, (2 n,), where the points' targets are permuted labels: the class matrices
            by true class as well.
        groups: the "superclass" and the "realm" of each class, in the order of their numbers, all of which occur.
        spaces: of the validation points: also what `Spaces.measured` gives.

    Returns:
        A Dataset, float64, with these variables; regime is train-train, train-val or val-val, measure sign or cos.

        * `stiffness` (arithmetic, regime, measure, class_a, class_b): class matrices, pairs of a point with itself left
          out; `within`, `between` (arithmetic, regime, measure): their summaries.
        * `zero` (arithmetic, part): share of points with a gradient of exactly zero; `wrong_sign` (arithmetic, regime):
          share of pairs whose sign is not the exact one.
        * `within_error`, `between_error` (part, measure), with `errors`: their bootstrap errors over points.
        * `centred_within`, `centred_between` (centring, regime): sign stiffness after the mean gradient of each part
          ("gradient"), or the mean of the normalised gradients ("direction"), was taken off.
        * `weighted_within`, `weighted_between` (weighting, regime): over pairs, not cells,
          $\sum g\cdot g' / \sum \|g\|\|g'\|$ ("norm": the cosine weighted by both norms) and
          $\sum g\cdot g' / \sum |g\cdot g'|$ ("change": the sign weighted by the change of loss that a step makes);
          `within_share` (regime): the part of $\sum |g\cdot g'|$ that pairs within classes have.
        * `points_for_90` (part): the smallest share of the points whose gradient norms make up 90 % of their sum.
        * `gradient_norm` $\|\bar g\|$, `mean_norm` $\overline{\|g\|}$ and `disparity`, the mean
          $\|\bar g_A - \bar g_B\|$ over pairs of 10 disjoint batches (Forouzesh and Thiran 2021): of training points.
        * `coherence` (part): m-coherence $\|\sum g\|^2 / \sum \|g\|^2$ (Chatterjee and Zielinski 2020), from 0 to the
          number of points; 1 for gradients that are orthogonal.
        * `true_stiffness`, `true_within`, `true_between`, with `truth`: as `stiffness`, `within`, `between`, by true
          class; NaN for classes of which a part has too few points. `crossed` (regime, measure, given, true): exact
          means over the pairs that have the same given label, or others, and the same true one, or others.
        * `related`, `unrelated` (arithmetic, regime, measure), with `groups`: mean cells of two classes of one
          superclass, and of different ones; `realm_related`, `realm_unrelated`: among those of different superclasses,
          mean cells of one realm and of different ones. `logit_scale` (part): the standard deviation of
          a point's logits, mean over points.
        * `gap` (part, quantile) of the logit gap $\log(p_y / (1 - p_y))$; `past_gap` (part): share of points above 16.

    """
    losses = {**ARITHMETICS, OWN: own}
    if wrong := [name for name in arithmetics if losses.get(name) is None]:
        raise ValueError(f"arithmetic {wrong[0]!r}: allowed are {', '.join(ARITHMETICS)}, and {OWN} where own is given")
    points = tuple(torch.cat(pair) for pair in zip(training, validation, strict=True))
    parts = {"train": slice(0, len(training[1])), "val": slice(len(training[1]), len(points[1]))}
    y = points[1].cpu()
    layers = gradient_gram(model, cross_entropy, points, by="layer") if attribution else {}
    grams = {"exact": whole(layers)} if layers else {}
    layers = in_sections(layers, model.section) if hasattr(model, "section") else layers
    grams |= {name: gradient_gram(model, losses[name], points) for name in arithmetics if name not in grams}
    exact, z = grams["exact"], _outputs(model, points[0]).double().cpu()
    gap = logit_gap(z, y)
    found = [
        _stiffness(grams, y, parts),
        _companions(exact, y, parts),
        _centred(exact, y, parts),
        _norms(exact, parts),
        _gaps(gap, parts),
    ]
    found += [_errors(exact, y, parts)] if errors else []
    found += [] if truth is None else [_by_truth(grams, y, truth.cpu(), parts)]
    found += [_by_group(found[0].stiffness, groups, z, parts)] if groups else []
    if spaces:
        own, of_layers = (
            {name: gram.block(parts["val"], parts["val"]) for name, gram in some.items()} for some in (grams, layers)
        )
        found.append(spaces.measured(model, own, of_layers))
    found += [attribution_of(layers, grams, y, parts, right=z.argmax(dim=1) == y, gap=gap)] if attribution else []
    return xr.merge(found, join="outer")  # true classes may be others than the given ones


def input_similarity(training: Points, validation: Points) -> xr.DataArray:
    """Mean cosines of the inputs of two classes, (regime, class_a, class_b); pairs of a point with itself left out."""
    points = tuple(torch.cat(pair).cpu() for pair in zip(training, validation, strict=True))
    parts = {"train": slice(0, len(training[1])), "val": slice(len(training[1]), len(points[1]))}
    x = points[0].flatten(1).double()
    norms = x.norm(dim=1)
    unit = x / norms.where(norms > 0, 1.0)[:, None]
    gram = GradientGram(unit @ unit.T, norms, norms, torch.eye(len(x), dtype=torch.bool))
    C = [cells(block, "cos", *ys) for block, *ys in blocks(gram, points[1], parts)]
    return labelled(C, {"regime": list(REGIMES)}, points[1])


def evaluate(model: nn.Module, points: Points) -> tuple[float, float]:
    """Mean cross-entropy, computed in float64, and accuracy."""
    inputs, targets = points
    outputs = _outputs(model, inputs)
    right = (outputs.argmax(dim=1) == targets).double().mean()
    return float(cross_entropy(outputs, targets).mean()), float(right)


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x in inputs.split(64)])


def _stiffness(grams: dict[str, GradientGram], y: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    signs = {name: gram.cos.sign() for name, gram in grams.items()}
    wrong = {name: GradientGram((sign != signs["exact"]).double(), *_rest(grams[name])) for name, sign in signs.items()}
    return _by_class(grams, y, parts).assign(
        wrong_sign=(("arithmetic", "regime"), [[_mean(b) for b, *_ in blocks(w, y, parts)] for w in wrong.values()]),
        zero=(
            ("arithmetic", "part"),
            [[float(g.zero[p].double().mean()) for p in parts.values()] for g in grams.values()],
        ),
        part=list(parts),
    )


def _by_class(grams: dict[str, GradientGram], y: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    """Class matrices and their summaries."""
    axes = {"arithmetic": list(grams), "regime": list(REGIMES), "measure": list(MEASURES)}
    C = labelled([class_matrices(gram, y, parts) for gram in grams.values()], axes, y)
    return within_between(C).assign(stiffness=C)


def _by_truth(grams: dict[str, GradientGram], y: Tensor, truth: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    """Class matrices by true class, and means over pairs by whether given and true labels agree."""
    found = _by_class(grams, truth, parts)
    kinds = 2 * (y[:, None] != y).int() + (truth[:, None] != truth)
    crossed = []
    for rows, columns in sides(parts):
        block, kind = grams["exact"].block(rows, columns), kinds[rows, columns]
        values = [stiffness(block, measure) for measure in MEASURES]
        crossed.append([[float(v[(kind == k) & ~block.self_pairs].mean()) for k in range(4)] for v in values])
    axes = {"regime": list(REGIMES), "measure": list(MEASURES), "given": list(AGREEMENT), "true": list(AGREEMENT)}
    array = xr.DataArray(np.reshape(crossed, (len(REGIMES), len(MEASURES), 2, 2)), axes)
    return found.rename({name: f"true_{name}" for name in found.data_vars}).assign(crossed=array)


def _by_group(C: xr.DataArray, groups: Mapping[str, Sequence[str]], z: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    """Class matrices by superclass; by realm where superclasses differ; and how large the logits are."""
    superclass, realm = groups["superclass"], groups["realm"]
    other = xr.DataArray(~same_group(C, superclass), dims=("class_a", "class_b"))
    near, far = group_stiffness(C, superclass), group_stiffness(C.where(other), realm)
    scale = z.std(dim=1, correction=0)
    return xr.Dataset(
        {
            "related": near.related,
            "unrelated": near.unrelated,
            "realm_related": far.related,
            "realm_unrelated": far.unrelated,
            "logit_scale": ("part", [float(scale[part].mean()) for part in parts.values()]),
        },
        {"part": list(parts)},
    )


def _rest(gram: GradientGram) -> tuple[Tensor, Tensor, Tensor]:
    return gram.norms, gram.norms2, gram.self_pairs


def _mean(block: GradientGram) -> float:
    return float(block.cos[~block.self_pairs].mean())


def _companions(gram: GradientGram, y: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    """Within and between weighted by what a step does, and the share of it that falls within classes."""
    kinds: dict[str, list] = {"weighted_within": [], "weighted_between": [], "within_share": []}
    for block, rows, columns in blocks(gram, y, parts):
        pairs = ~block.self_pairs
        same = (rows @ columns.T).bool()
        dot, norms = block.dot, block.norms[:, None] * block.norms2
        for kind, chosen in (("weighted_within", same & pairs), ("weighted_between", ~same)):
            kinds[kind].append([_ratio(dot[chosen].sum(), weight[chosen].sum()) for weight in (norms, dot.abs())])
        kinds["within_share"].append(_ratio(dot[same & pairs].abs().sum(), dot[pairs].abs().sum()))
    shares = {"within_share": ("regime", kinds.pop("within_share"))}
    weighted = {name: (("regime", "weighting"), values) for name, values in kinds.items()}
    return xr.Dataset(weighted | shares, {"regime": list(REGIMES), "weighting": ["norm", "change"]})


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if b > 0 else 0.0


def _centred(gram: GradientGram, y: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    """Sign stiffness of gradients less their mean, the mean of each part by itself."""
    C = []
    for K in (gram.dot, gram.cos.clone()):
        for part in parts.values():  # H K H with a projection H that takes the mean of a part off
            K[part] -= K[part].mean(dim=0, keepdim=True)
            K[:, part] -= K[:, part].mean(dim=1, keepdim=True)
        centred = GradientGram(K.sign(), *_rest(gram))
        C.append([cells(block, "sign", *ys) for block, *ys in blocks(centred, y, parts)])
    centred = labelled(C, {"centring": ["gradient", "direction"], "regime": list(REGIMES)}, y)
    return within_between(centred).rename(within="centred_within", between="centred_between")


def _norms(gram: GradientGram, parts: dict[str, slice]) -> xr.Dataset:
    """The rivals of stiffness that need training points alone, and on how few points the gradient rests."""
    norms, dot = gram.norms[parts["train"]], gram.dot[parts["train"], parts["train"]]
    n = len(norms)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    batches = min(BATCHES, n)
    members = torch.zeros(batches, n, dtype=torch.float64)
    for batch, chosen in zip(members, order.tensor_split(batches), strict=True):
        batch[chosen] = 1 / len(chosen)
    M = members @ dot @ members.T
    squares = M.diagonal()[:, None] + M.diagonal() - 2 * M
    i, j = torch.triu_indices(batches, batches, 1)
    return xr.Dataset(
        {
            "gradient_norm": float(dot.mean().clamp(min=0).sqrt()),
            "mean_norm": float(norms.mean()),
            "disparity": float(squares[i, j].clamp(min=0).sqrt().mean()),
            "coherence": ("part", [_coherence(gram, part) for part in parts.values()]),
            "points_for_90": ("part", [_concentration(gram.norms[part]) for part in parts.values()]),
        },
        {"part": list(parts)},
    )


def _coherence(gram: GradientGram, part: slice) -> float:
    """In units of the largest norm, whose square may underflow."""
    norms = gram.norms[part]
    u = norms / norms.max().where(norms.any(), 1.0)
    return _ratio(u @ gram.cos[part, part] @ u, u @ u)


def _concentration(norms: Tensor) -> float:
    shares = norms.sort(descending=True).values.cumsum(0) / norms.sum()
    return float(((shares < 0.9).sum() + 1) / len(norms)) if norms.any() else 0.0


def logit_gap(z: Tensor, y: Tensor) -> Tensor:
    r"""The logit gap $\log(p_y / (1 - p_y))$ of each point, (n,), from its logits z, (n, classes)."""
    others = z.scatter(1, y[:, None], -torch.inf).logsumexp(dim=1)
    return z.gather(1, y[:, None])[:, 0] - others


def _gaps(gap: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    gap = gap.numpy()
    return xr.Dataset(
        {
            "gap": (("part", "quantile"), [np.quantile(gap[part], QUANTILES) for part in parts.values()]),
            "past_gap": ("part", [float((gap[part] > GAP).mean()) for part in parts.values()]),
        },
        {"part": list(parts), "quantile": list(QUANTILES)},
    )


def _errors(gram: GradientGram, y: Tensor, parts: dict[str, slice]) -> xr.Dataset:
    found = []
    for part in parts.values():
        block = gram.block(part, part)
        found.append([bootstrap_error(stiffness(block, m), y[part], resamples=200) for m in MEASURES])
    values = {k: [[float(error[k]) for error in row] for row in found] for k in ("within", "between")}
    return xr.Dataset(
        {f"{k}_error": (("part", "measure"), v) for k, v in values.items()},
        {"part": list(parts), "measure": list(MEASURES)},
    )
