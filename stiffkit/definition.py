"""The measurements of chapter 1: a toy to look at, real steps against inner products, class matrices at the start."""

import copy
from itertools import product

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from stiffkit.alignment import class_stiffness, stiffness, within_between
from stiffkit.chapters import Definition
from stiffkit.data import Dataset, Points, balanced_subset, load
from stiffkit.gradients import GradientGram, gradient_gram
from stiffkit.losses import cross_entropy
from stiffkit.measurement import evaluate
from stiffkit.models import INITIALISATIONS, build_model
from stiffkit.results import load_recorded
from stiffkit.statistics import bootstrap_error
from stiffkit.steps import loss_change
from stiffkit.toy import step_on_toy
from stiffkit.training import Checkpoint, train

STAGES = ("before training", "after one epoch")
MEASURES = ("sign", "cos")
EPSILONS = np.logspace(-6, 0, 7)
QUANTILES = (0.25, 0.5, 0.75)
SUBSETS = (50, 100, 200, 500)


def results(p: Definition) -> xr.Dataset:
    """What chapter 1 shows: read from the recorded run where that has these parameters, else measured."""
    recorded = load_recorded(p)
    return measure(p) if recorded is None else recorded


def measure(p: Definition) -> xr.Dataset:
    """Measure everything that chapter 1 shows; about a minute on two cores for MNIST and the fully-connected net.

    Args:
        p: the chapter's parameters.

    Returns:
        A Dataset, described variable by variable in its attributes. Points are validation points.

    Raises:
        TooLongError: before anything is computed, if it would take longer than `p.max_minutes`.

    """
    p.allow()
    dataset = load(p.dataset, sphere=p.sphere)
    points = _subset(dataset, p.number_of_points, p.seed)
    model = build_model(p.model, dataset, p.seed, initialisation=p.initialisation)
    stages = [
        xr.merge(
            [
                _class_matrices(checkpoint.model, points),
                _step_checks(checkpoint, points, p.learning_rate),
                _precision(checkpoint.model, dataset, p.seed),
                _generalization(checkpoint.model, dataset),
            ]
        )
        for checkpoint in train(model, dataset.train, checkpoints=[0, 1], seed=p.seed)
    ]
    staged = xr.concat(stages, xr.DataArray(list(STAGES), dims="stage", name="stage"))
    measured = xr.merge([staged, _settings(p), step_on_toy(p.learning_rate, p.seed)])
    named = measured.assign_coords(class_name=("class_a", list(dataset.classes)))
    return named.assign_attrs(data_checksum=dataset.checksum)


def _subset(dataset: Dataset, size: int, seed: int) -> Points:
    inputs, targets = dataset.validation
    index = balanced_subset(targets, size, seed)
    return inputs[index], targets[index]


def _class_matrices(model: nn.Module, points: Points) -> xr.Dataset:
    """The class matrices, standard errors of their summaries, and what loss and last layer say alone."""
    y = points[1]
    gram = gradient_gram(model, cross_entropy, points)
    S = [stiffness(gram, m) for m in MEASURES]
    errors = _along_measures([bootstrap_error(s, y) for s in S])
    outputs = _output_gram(model, points)
    last = list(gradient_gram(model, cross_entropy, points, by="layer").values())[-1]
    pairs = ~gram.self_pairs
    return xr.Dataset(
        {
            "stiffness": _along_measures([class_stiffness(s, y) for s in S]),
            "within_error": errors.within,
            "between_error": errors.between,
            "output_cosine": class_stiffness(stiffness(outputs, "cos"), y),
            "last_layer_cosine": class_stiffness(stiffness(last, "cos"), y),
            "same_sign_as_outputs": float((gram.cos.sign() == outputs.cos.sign())[pairs].double().mean()),
        }
    )


def _along_measures(arrays: list[xr.DataArray | xr.Dataset]) -> xr.DataArray | xr.Dataset:
    return xr.concat(arrays, xr.DataArray(list(MEASURES), dims="measure", name="measure"))


def _output_gram(model: nn.Module, points: Points) -> GradientGram:
    """The Gram matrix of the output gradients p - e_y alone: what the loss says before any layer has a say."""
    inputs, targets = points
    with torch.no_grad():
        p = model(inputs).double().softmax(dim=1)
    residuals = p - nn.functional.one_hot(targets, p.shape[1])
    norms = residuals.norm(dim=1)
    cos = (residuals / norms[:, None]) @ (residuals / norms[:, None]).T
    return GradientGram(cos, norms, norms, torch.eye(len(norms), dtype=torch.bool))


def _step_checks(checkpoint: Checkpoint, points: Points, learning_rate: float) -> xr.Dataset:
    """Real steps, on 10 of the points, watched at all of them, against the inner products."""
    inputs, targets = points
    rows = torch.linspace(0, len(targets) - 1, 10).long()
    stepped = inputs[rows], targets[rows]
    model, double = checkpoint.model, copy.deepcopy(checkpoint.model).double()
    dot = gradient_gram(double, cross_entropy, (stepped[0].double(), stepped[1]), (inputs.double(), targets)).dot
    others = torch.arange(len(targets)) != rows[:, None]
    errors, agreement = [], []
    for epsilon in EPSILONS:
        change = loss_change(model, cross_entropy, stepped, points, torch.optim.SGD(model.parameters(), lr=epsilon))
        relative = (change / (epsilon * dot) + 1).abs()[others]
        errors.append(np.quantile(relative.numpy(), QUANTILES))
        agreement.append(_agreement(change, dot, others))
    adam = loss_change(model, cross_entropy, stepped, points, _adam(checkpoint, learning_rate))
    return xr.Dataset(
        {
            "relative_error": (("epsilon", "quantile"), np.array(errors)),
            "agreement": ("epsilon", agreement),
            "agreement_adam": _agreement(adam, dot, others),
        },
        {"epsilon": EPSILONS, "quantile": list(QUANTILES)},
    )


def _agreement(change: Tensor, dot: Tensor, others: Tensor) -> float:
    """The share of pairs whose loss went the way that the sign of the inner product says."""
    return float((change.sign() == -dot.sign())[others].double().mean())


def _adam(checkpoint: Checkpoint, learning_rate: float) -> torch.optim.Optimizer:
    """Adam as training left it, with another learning rate."""
    adam = torch.optim.Adam(checkpoint.model.parameters())
    adam.load_state_dict(checkpoint.optimizer.state_dict())
    adam.param_groups[0]["lr"] = learning_rate
    return adam


def _precision(model: nn.Module, dataset: Dataset, seed: int) -> xr.Dataset:
    """The spread of within- and between-class stiffness over 20 subsets of each size, drawn from one pool of points."""
    classes = len(dataset.classes)
    pool = min(2000, classes * int(dataset.validation[1].bincount().min()))
    points = _subset(dataset, pool, seed)
    gram, y = gradient_gram(model, cross_entropy, points), points[1]
    S = [stiffness(gram, m) for m in MEASURES]
    sizes = [size for size in SUBSETS if size <= pool / 2]  # larger ones would share most of their points
    spread = []
    for size in sizes:
        subsets = [balanced_subset(y, size, 1000 * (seed + 1) + draw) for draw in range(20)]
        draws = [_along_measures([class_stiffness(s[i][:, i], y[i]) for s in S]) for i in subsets]
        spread.append(within_between(xr.concat(draws, "draw")).std("draw", ddof=1))
    spread = xr.concat(spread, xr.DataArray(sizes, dims="size", name="size"))
    return spread.rename(within="within_spread", between="between_spread")


def _generalization(model: nn.Module, dataset: Dataset) -> xr.Dataset:
    loss, accuracy = evaluate(model, dataset.test)
    return xr.Dataset({"test_loss": loss, "test_accuracy": accuracy})


def _features(model: nn.Module, points: Points) -> dict[str, float]:
    """What the last layer sees: mean length and mean pairwise cosine of its inputs h, and of h with the bias's 1."""
    with torch.no_grad():
        h = model[:-1](points[0]).double()
    with_one = torch.cat([h, torch.ones(len(h), 1)], dim=1)
    cosines = [nn.functional.normalize(f) @ nn.functional.normalize(f).T for f in (h, with_one)]
    means = [float(c[~torch.eye(len(c), dtype=torch.bool)].mean()) for c in cosines]
    return {"feature_norm": float(h.norm(dim=1).mean()), "feature_cosine": means[0], "bias_cosine": means[1]}


def _settings(p: Definition) -> xr.Dataset:
    """Within and between at the start, by layer, for both initialisations, with and without the unit sphere."""
    settings = []
    datasets = {sphere: load(p.dataset, sphere=sphere) for sphere in (True, False)}
    for initialisation, sphere in product(INITIALISATIONS, (True, False)):
        dataset = datasets[sphere]
        points = _subset(dataset, p.number_of_points, p.seed)
        model = build_model(p.model, dataset, p.seed, initialisation=initialisation)
        grams = gradient_gram(model, cross_entropy, points, by="layer")
        grams = {f"layer {k}": gram for k, gram in enumerate(grams.values(), 1)}
        grams["whole"] = gradient_gram(model, cross_entropy, points)
        layers = [
            _along_measures([within_between(class_stiffness(stiffness(gram, m), points[1])) for m in MEASURES])
            for gram in grams.values()
        ]
        name = f"{initialisation}, {'unit sphere' if sphere else 'no sphere'}"
        along_layers = xr.concat(layers, xr.DataArray(list(grams), dims="layer", name="layer"))
        settings.append(along_layers.assign(_features(model, points)).assign_coords(setting=name))
    return xr.concat(settings, "setting").rename(within="within_by_layer", between="between_by_layer")
