"""Experiments: what is trained, what is measured, and running them."""

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise, takewhile
from math import ceil
from typing import Any, Literal, Self

import numpy as np
import torch
import xarray as xr
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from stiffkit import data, results, sentence_models, sentences, stopped, windows
from stiffkit.data import Dataset, Points, balanced_subset, random_labels
from stiffkit.losses import mse, smoothed_cross_entropy
from stiffkit.measurement import (
    ARITHMETICS,
    MEASUREMENT_VERSION,
    OWN,
    evaluate,
    input_similarity,
    measure,
    measured_indices,
    measured_points,
)
from stiffkit.models import ACTIVATIONS, INITIALISATIONS, MODELS, build_model
from stiffkit.spaces import Spaces
from stiffkit.superclasses import SUPERCLASSES, classes_of, realm_of, superclass_of
from stiffkit.training import TRAINING_VERSION, Checkpoint, one_thread, train

EARLY = 1_600  # images seen in the second panel of v1's Fig 6
LATE = 0.42  # of all images seen, in its third panel
LAST = 10  # checkpoints that are measured in every arithmetic, for averages late in training
LOSSES = {**ARITHMETICS, "mse": mse, "label_smoothing": smoothed_cross_entropy}  # that networks are trained with
IMAGE = {"fc": 0.15, "cnn": 0.5, "cnn_v1": 1.3, "resnet20": 5.0}  # milliseconds one of CIFAR-10 takes in one thread
SENTENCES = {"tiny": 1.0, "minilm": 45.0}  # and a pair of MNLI
OTHER = 400.0  # and one in a model that is not known here, if it is as large as BERT-base
PAIR = {"fc": 0.2e-6, "cnn": 0.4e-6, "cnn_v1": 6e-6, "resnet20": 4e-6, "tiny": 4e-6, "minilm": 3e-5}  # seconds that a
# pair of gradients takes
OTHER_PAIR = 2e-4  # and in a model as large as BERT-base
PRETRAINED = ("pretrained", "random")  # how models of sentences begin


@dataclass(frozen=True)
class Scale:
    """How large a data set is, without loading it.

    Attributes:
        images: training images.
        classes: how many there are.
        pixels: of an image, in units of CIFAR-10's, in time; of a pair of sentences in units of MNLI's.
        points: training, and validation, points where none are given: 500 and 3,000 as in the paper.
        most: points that can be had.

    """

    images: int
    classes: int = 10
    pixels: float = 0.5
    points: int = 500
    most: int = 2000


SCALES = {
    "digits": Scale(1_201, pixels=0.1, points=200, most=280),
    "hierarchy": Scale(1_440, classes=24, pixels=0.1, points=240, most=480),
    "mnist": Scale(60_000),
    "fashion_mnist": Scale(60_000),
    "cifar10": Scale(50_000, pixels=1.0),
    "cifar100": Scale(50_000, classes=100, pixels=1.0, points=3000, most=5000),
    "toy_nli": Scale(1_800, classes=3, pixels=0.3, points=150, most=600),
    "mnli": Scale(392_702, classes=3, pixels=1.0, points=501, most=2_700),
}


def known_name(value: str, info: ValidationInfo, kind: str = "") -> str:
    """Check the name of a data set, a network, ..., for a validator of the field of that name, or of another `kind`."""
    field = kind or info.field_name
    if field == "model" and info.data.get("dataset") in sentences.NAMES and value not in MODELS:
        return value  # the Hub's, or a folder
    known = {
        "dataset": (*data.NAMES, *sentences.NAMES),
        "model": MODELS,
        "initialisation": (*INITIALISATIONS, *PRETRAINED),
        "activation": ACTIVATIONS,
        "loss": LOSSES,
    }
    allowed = tuple(known[field])
    if value not in allowed:
        raise ValueError(f"allowed are {', '.join(allowed)}")
    return value


def falling(losses: tuple[float, ...]) -> tuple[float, ...]:
    """Check stopping losses, for a validator."""
    if any(loss <= 0 for loss in losses) or any(a <= b for a, b in pairwise(losses)):
        raise ValueError("losses above zero, each below the one before it, are wanted")
    return losses


def check_model(dataset: str, model: str) -> None:
    """Check that a network can read a data set: sentences, or images that are large enough for it."""
    if dataset in sentences.NAMES and model in MODELS:
        raise ValueError(
            f"'model' = {model!r} reads images, and {dataset} has sentences: take {', '.join(SENTENCES)}, "
            "bert-base-uncased, another model of the Hub, or a folder"
        )
    if dataset in ("digits", "hierarchy") and model == "cnn_v1":
        raise ValueError(
            f"'model' = 'cnn_v1': its four poolings need 16 x 16 pixels, and {dataset} has 8 x 8: take fc or cnn"
        )


def check_points(dataset: str, points: int) -> None:
    """Check that a data set can give so many training, and validation, points, as many of each class."""
    scale = SCALES[dataset]
    if points % scale.classes or points < 2 * scale.classes or points > scale.most:
        raise ValueError(
            f"'points' = {points}: {dataset} allows multiples of {scale.classes} (its classes) from "
            f"{2 * scale.classes} to {scale.most}"
        )


def cost_of_images(dataset: str, model: str) -> tuple[int, float]:
    """How many training images there are, and the seconds that training on one takes in one thread, about."""
    milliseconds = SENTENCES.get(model, OTHER) if dataset in sentences.NAMES else IMAGE[model]
    n = sentences.count_of_mnli() if dataset == "mnli" else None
    return n or SCALES[dataset].images, 1e-3 * milliseconds * SCALES[dataset].pixels


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def identity(self) -> str:
        """JSON of the fields that are not at their default: a field that is added later changes no key."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)

    def _key(self, slug: str) -> str:
        return f"{slug}-{hashlib.sha256(self.identity.encode()).hexdigest()[:8]}"


class Training(_Part):
    """What is trained, and when it is looked at. Defaults are the paper's; a default never changes."""

    dataset: str = Field(description="data set")
    model: str = Field(description="network")
    epochs: float = Field(gt=0, le=10_000, description="passes over the training set")
    seed: int = Field(ge=0, le=1_000_000, description="of weights, order of training and choice of points")
    initialisation: str = Field("keras", description="of the weights")
    sphere: bool = Field(True, description="scale each image to unit norm")
    optimizer: Literal["adam", "sgd", "adamw"] = Field("adam", description="optimiser, at a constant rate")
    learning_rate: float = Field(1e-3, gt=0, description="constant")
    batch_size: int = Field(32, gt=0, description="images in a step")
    clip: float = Field(0.0, ge=0, description="norm that the gradient of a batch is cut to; 0: it is not")
    checkpoints: tuple[int, ...] = Field((), description="in images seen; empty: those of the schedule")
    loss: str = Field("float32", description="that is minimised")
    activation: str = Field("relu", description="of the hidden layers")
    dtype: Literal["float32", "float64"] = Field("float32", description="of weights, images and optimiser")
    train_size: int = Field(0, ge=0, description="training images, as many of each class; 0: all of them")
    label_noise: float = Field(0.0, ge=0, le=1, description="share of the labels that are permuted among themselves")
    schedule: Literal["standard", "sparse", "few", "ends", "doubling", "geometric"] = Field(
        "standard", description="of the checkpoints"
    )
    batch_norm: bool = Field(False, description="after the convolutions of resnet20")
    folder: str = Field("", description="checksum of a model that is a folder, filled in")

    _known = field_validator("dataset", "model", "initialisation", "loss", "activation")(known_name)

    @model_validator(mode="before")
    @classmethod
    def _know_the_folder(cls, fields: Any) -> Any:
        """A folder whose files change is another model."""
        if not isinstance(fields, dict) or fields.get("dataset") not in sentences.NAMES or fields.get("folder"):
            return fields
        checksum = sentence_models.checksum_of_folder(str(fields.get("model", "")))
        return {**fields, "folder": checksum} if checksum else fields

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_model(self.dataset, self.model)
        images, classes = SCALES[self.dataset].images, SCALES[self.dataset].classes
        largest = min(images, 50_000) // (2 * classes) * classes  # every class has half of its share at least
        if self.train_size % classes or self.train_size > largest:
            raise ValueError(
                f"'train_size' = {self.train_size}: {self.dataset} allows multiples of {classes} (its classes) to "
                f"{largest}"
            )
        if self.batch_norm and self.model != "resnet20":
            raise ValueError(f"'batch_norm' is an option of resnet20, {self.model} has none")
        allowed = PRETRAINED if self.dataset in sentences.NAMES else INITIALISATIONS
        if self.initialisation not in allowed:
            raise ValueError(f"'initialisation' = {self.initialisation!r}: {self.dataset} allows {', '.join(allowed)}")
        of_images = ("sphere", "activation", "dtype")
        chosen = [name for name in of_images if getattr(self, name) != type(self).model_fields[name].default]
        if self.dataset in sentences.NAMES and chosen:
            raise ValueError(f"'{chosen[0]}' is an option of networks that read images, {self.dataset} has none")
        if self.model == "tiny" and self.initialisation == "pretrained":
            raise ValueError("'initialisation' = 'pretrained': tiny has random weights alone: take random, or minilm")
        return self

    @field_validator("checkpoints")
    @classmethod
    def _ascend(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(k < 0 for k in value) or any(a >= b for a, b in pairwise(value)):
            raise ValueError("images seen, ascending from 0 or more, are wanted")
        return value

    @property
    def key(self) -> str:
        """A readable name and 8 hex digits of `identity`."""
        model = re.sub(r"[^A-Za-z0-9_.]+", "_", self.model)  # may be a folder
        return self._key(f"{self.dataset}-{model}-{self.epochs:g}ep-s{self.seed}")

    def images(self, n: int) -> list[int]:
        """The checkpoints, in images seen, for a training set of n images.

        The standard schedule: before training, at 1,600 images, each quarter of an epoch up to the fifth, then each
        epoch, at 42 % of the run, and at its end. The sparse one has half as many: of the quarters the first and those
        from the fourth to the thirteenth in steps of two, then every third epoch, but each of the last ten. The few are
        twelve: before training, 1,600 images, a quarter, half and a whole epoch, and 10, 15, 25, 42, 60, 80 and 100 %
        of the run; the ends are the first and the last of them. Doubling: before training, 1,600 images, a quarter of
        an epoch, and each doubling of it up to the end. The geometric schedule, for averages at equal loss: before
        training, and from the end back to a fortieth of an epoch, each at 25/26 of the next: 25 or 26 of them while
        the images seen grow e times.
        """
        if self.checkpoints:
            return list(self.checkpoints)
        end, last, sparse = ceil(self.epochs * n), int(self.epochs), self.schedule == "sparse"
        if self.schedule == "doubling":
            doubled = takewhile(lambda k: k < end, (ceil(n / 4 * 2**k) for k in count()))
            return sorted(k for k in {0, EARLY, *doubled, end} if k <= end)
        if self.schedule == "ends":
            return [0, end]
        if self.schedule == "few":
            shares = (round(share * end) for share in (0.1, 0.15, 0.25, LATE, 0.6, 0.8, 1))
            return sorted(k for k in {0, EARLY, ceil(n / 4), ceil(n / 2), n, *shares} if k <= end)
        if self.schedule == "geometric":
            back = takewhile(lambda k: k >= min(n / 40, end), (round(end * (25 / 26) ** k) for k in count()))
            return sorted({0, *back})
        quarters = (1, *range(4, 13, 2)) if sparse else range(1, 21)
        epochs = {k for k in range(6, last + 1) if not sparse or k % 3 == 0 or k > last - 10}
        chosen = {*(ceil(k * n / 4) for k in quarters), *(k * n for k in epochs)}
        return sorted(k for k in {0, EARLY, round(LATE * end), *chosen, end} if k <= end)

    @property
    def images_an_epoch(self) -> int:
        """How many training images there are."""
        return self.train_size or cost_of_images(self.dataset, self.model)[0]

    def reached(self, n: int) -> list[int]:
        """The images seen when the checkpoints are reached: after whole batches; an epoch's last may be smaller."""
        epochs_and_rest = [divmod(k, n) for k in self.images(n)]
        batch = self.batch_size
        return sorted({epochs * n + min(ceil(rest / batch) * batch, n) for epochs, rest in epochs_and_rest})


class Measurement(_Part):
    """What is measured at the checkpoints."""

    points: int = Field(500, gt=0, description="training points, and as many validation points")
    arithmetics: tuple[str, ...] = Field(tuple(ARITHMETICS), description="in which gradients are computed")
    every: int = Field(
        1,
        ge=0,
        description="arithmetics other than exact: at every so many checkpoints, the stages and the last ten; 0: at "
        "the last alone",
    )

    subset: int | None = Field(None, ge=0, description="seed of the choice of points; none: the run's own seed")
    attribution: bool = Field(
        False, description="also by layer, by right and wrong points, by logit gap, but without errors over points"
    )
    distances: bool = Field(False, description="also stiffness against distance, at each checkpoint")
    stopping_losses: tuple[float, ...] = Field(
        (),
        description="training losses, falling: also stiffness against distance, kept around these, around epochs 1, 2, "
        "4, ..., and at the end",
    )

    @field_validator("arithmetics")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = (*ARITHMETICS, OWN)
        if value[:1] != ("exact",) or not set(value) <= set(known) or len(set(value)) < len(value):
            raise ValueError(f"exact, and after it any of {', '.join(known[1:])}")
        return value

    @field_validator("stopping_losses")
    @classmethod
    def _fall(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return falling(value)

    @property
    def has_spaces(self) -> bool:
        """Whether stiffness is measured against distance."""
        return self.distances or bool(self.stopping_losses)

    @property
    def key(self) -> str:
        """A readable name and 8 hex digits of `identity`."""
        return self._key(f"{self.points}pts")


class Experiment(_Part):
    """One run: a training and what is measured on the way."""

    training: Training
    measurement: Measurement = Measurement()

    @model_validator(mode="after")
    def _has_points(self) -> Self:
        points, images = self.measurement.points, self.training.images_an_epoch
        check_points(self.training.dataset, points)
        if points > images:
            raise ValueError(f"'points' = {points}: there are {images} training images")
        return self

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """An experiment from the fields of both parts; `points` left out is the data set's own number.

        Raises:
            ValueError: naming the field and what is allowed.

        >>> Experiment.of(dataset="mnist", model="fc", epochs=30, seed=1).key
        'mnist-fc-30ep-s1-72156e1a.500pts-44136fa3'

        """
        if "points" not in fields and fields.get("dataset") in SCALES:
            fields["points"] = SCALES[fields["dataset"]].points
        parts = {
            "training": {k: v for k, v in fields.items() if k not in Measurement.model_fields},
            "measurement": {k: v for k, v in fields.items() if k in Measurement.model_fields},
        }
        try:
            return cls(**parts)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(e) for e in error.errors())) from None

    @property
    def key(self) -> str:
        """The keys of both parts: the name of the file in the cache."""
        return f"{self.training.key}.{self.measurement.key}"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of both parts, as `of` takes them."""
        return dict(self.training) | dict(self.measurement)

    @property
    def minutes(self) -> float:
        """An estimate of the time that computing takes in one thread; right within a factor of two."""
        n, image = self.training.images_an_epoch, cost_of_images(self.training.dataset, self.training.model)[1]
        points = 2 * self.measurement.points
        checkpoints = len(self.training.images(n))
        measuring = 0.05 + PAIR.get(self.training.model, OTHER_PAIR) * points**2
        measuring += 0 if self.training.model == "fc" else 3 * image * points
        evaluating = 0.25 * image * 2 * min(n, 10_000)
        measured = (
            1
            + self.measurement.attribution
            + (len(self.measurement.arithmetics) - 1) / (self.measurement.every or checkpoints)
        )
        images = self.training.images(n)[-1]
        return (images * image + checkpoints * (measured * measuring + evaluating)) / 60

    def run(self, *, device: str | None = None, progress: bool = True) -> xr.Dataset:
        """The results: recorded ones, else cached ones, else computed and cached.

        Args:
            device: where it is computed, if it has to be: "cpu" or "cuda"; by default `$STIFFKIT_DEVICE`, or "cpu".
            progress: show a bar on a terminal.

        Returns:
            As `compute` says, less what the recorded file leaves out; attribute `source` tells where it came from.

        """
        return run_together([self], device=device, progress=progress)[0]


def run_together(
    experiments: Sequence[Experiment], *, device: str | None = None, progress: bool = True
) -> list[xr.Dataset]:
    """Run experiments that have their training in common: what has to be computed takes one training.

    A run that was stopped, by a signal or by a machine that died, goes on from its last checkpoint, and gives the
    numbers that it would have given.
    """
    missing: list[Experiment] = []
    if not all(map(results.source, experiments)):
        key = experiments[0].training.key
        with results.reserved(key):  # who had to wait finds what the other process has computed
            missing = [e for e in dict.fromkeys(experiments) if not results.source(e)]
            computed = compute(missing, device=chosen_device(device), progress=progress) if missing else []
            for experiment, run in zip(missing, computed, strict=True):
                results.save(experiment, run)
            stopped.forget(key)
    found = {e: results.find(e) for e in experiments}
    return [found[e].assign_attrs({"source": "computed now"} if e in missing else {}) for e in experiments]


def chosen_device(name: str | None = None) -> str:
    """Where runs are computed: "cpu" or "cuda"; where none is named, `$STIFFKIT_DEVICE`, or "cpu"."""
    name = name or os.environ.get("STIFFKIT_DEVICE") or "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: allowed are cpu and cuda")
    return name


def run_all(experiments: Iterable[Experiment], **options: Any) -> xr.Dataset:
    """Run experiments that differ in their seed and put them side by side, along `seed`."""
    return results.side_by_side([experiment.run(**options) for experiment in experiments])


def compute(experiments: Sequence[Experiment], *, device: str = "cpu", progress: bool = True) -> list[xr.Dataset]:
    """Train once, in one thread, and measure what each experiment says; the run is kept at every checkpoint.

    Args:
        experiments: that have their training in common.
        device: where it is computed.
        progress: show a bar on a terminal.

    Returns:
        For each experiment a Dataset along `images` (seen), the checkpoints, with `epochs`, what `measure` gives at
        each, and the mean `batch_loss` since the checkpoint before; `loss` and `accuracy` (images, split) on a fixed
        subset of 10,000 training images (all, where there are fewer), on the validation half and on the test half of
        the official test set. Where classes have superclasses, `input_similarity` as the function of that name gives
        it. With `distances` also what `Spaces.measured` gives; with `stopping_losses` that along `at` in place of
        `images`: averages over the windows that `windows.places` names. With `label_noise` training and validation
        images have permuted labels, test images their true ones. NaN where an arithmetic was not measured. A run whose
        loss stops being finite ends there and has the attribute `diverged` = 1.

    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no CUDA device on {platform.node()}: take the device cpu")
    training = experiments[0].training
    clean = _dataset(training, device)
    dataset = _with_noise(clean, training)
    watched = _splits(dataset)
    points = {e: _points(e, dataset) for e in experiments}
    truth = {e: _truth(e, dataset, clean) for e in experiments}
    spaces = {e: Spaces(*points[e][1]) for e in experiments if e.measurement.has_spaces}
    model = _model(training, dataset)
    dtype = getattr(torch, training.dtype)
    layout = torch.channels_last  # trains convolutions a fifth faster on a CPU
    model = model.train().to(device, dtype, memory_format=layout)
    due = training.reached(len(dataset.train[1]))
    run = stopped.find(training.key, [e.identity for e in experiments], _made_with(training, dataset, model, device))
    diverged, mark = False, time.perf_counter()
    with one_thread(), _bar(training, due[-1], progress) as bar:
        for checkpoint in _checkpoints(model, dataset.train, due, training, run.training):
            bar.update(checkpoint.images - bar.n)
            model.eval()
            seen = {split: evaluate(checkpoint.model, part) for split, part in watched.items()}
            if diverged := checkpoint.diverged or not np.isfinite(list(seen.values())).all():
                break
            before = time.perf_counter()
            for e in experiments:
                found = _measured(e, checkpoint, points[e], truth[e], spaces.get(e), due)
                run.add(e.identity, _at(checkpoint, found, seen))
            now = time.perf_counter()
            run.seconds, run.seconds_measuring = run.seconds + now - mark, run.seconds_measuring + now - before
            run.training, mark = checkpoint.state, now
            stopped.save(training.key, run)
            model.train()
    run.seconds += time.perf_counter() - mark
    return [_together(e, dataset, points[e], run, diverged) for e in experiments]


def stages(images: Iterable[int]) -> list[int]:
    """The four checkpoints of v1's Fig 6: before training, at 1,600 images, at 42 % of the run, at its end.

    >>> stages([0, 1000, 1600, 40000, 42000, 100000])
    [0, 1600, 42000, 100000]

    """
    return sorted(_four([int(k) for k in images]))


def _points(experiment: Experiment, dataset: Dataset) -> tuple[Points, Points]:
    return measured_points(dataset, experiment.measurement.points, _seed_of_points(experiment))


def _seed_of_points(experiment: Experiment) -> int:
    subset = experiment.measurement.subset
    return experiment.training.seed if subset is None else subset


def _truth(experiment: Experiment, dataset: Dataset, clean: Dataset) -> Tensor | None:
    """The true labels of the measured points, where training has others."""
    if not experiment.training.label_noise:
        return None
    index, index2 = measured_indices(dataset, experiment.measurement.points, _seed_of_points(experiment))
    return torch.cat([clean.train[1][index], clean.validation[1][index2]])


def _made_with(training: Training, dataset: Dataset, model: nn.Module, device: str) -> dict[str, Any]:
    reads = training.dataset in sentences.NAMES
    return (sentence_models.made_with(training.model, model) if reads else {}) | {
        "data_checksum": dataset.checksum,
        "training_version": TRAINING_VERSION,
        "measurement_version": MEASUREMENT_VERSION,
        "torch": str(torch.__version__),
        "device": f"CPU, {platform.machine()}" if device == "cpu" else torch.cuda.get_device_name(),
    }


def _measured(
    experiment: Experiment,
    checkpoint: Checkpoint,
    points: tuple[Points, Points],
    truth: Tensor | None,
    spaces: Spaces | None,
    due: list[int],
) -> xr.Dataset:
    measurement, stage = experiment.measurement, _four(due)
    often = {*stage, *due[-LAST:], *due[:: measurement.every]} if measurement.every else {due[-1]}
    arithmetics = measurement.arithmetics if checkpoint.images in often else ("exact",)
    return measure(
        checkpoint.model,
        *points,
        arithmetics,
        errors=checkpoint.images in stage and not measurement.attribution and measurement.points <= 1000,
        own=LOSSES[experiment.training.loss],
        attribution=measurement.attribution,
        truth=truth,
        groups=_groups(experiment.training.dataset),
        spaces=spaces,
    )


def _groups(dataset: str) -> dict[str, tuple[str, ...]]:
    """What the classes of a data set belong to, where something is known."""
    if dataset not in SUPERCLASSES:
        return {}
    classes = classes_of(dataset)
    return {"superclass": superclass_of(classes), "realm": realm_of(classes)}


def _together(
    experiment: Experiment, dataset: Dataset, points: tuple[Points, Points], run: stopped.Stopped, diverged: bool
) -> xr.Dataset:
    rows, arithmetics = run.rows(experiment.identity), list(experiment.measurement.arithmetics)
    together = xr.Dataset(coords={"images": np.empty(0, int), "arithmetic": arithmetics})
    if rows:
        together = xr.concat(rows, "images", join="outer", data_vars="all", coords="minimal", compat="override")
    if losses := experiment.measurement.stopping_losses:
        names = windows.places(losses, experiment.training.epochs)
        spatial = [name for name, values in together.data_vars.items() if "space" in values.dims]
        averages = windows.together(together[spatial], together, names)
        together = together.drop_vars(spatial).assign(averages.data_vars)
    if _groups(experiment.training.dataset):
        together = together.assign(input_similarity=input_similarity(*points))
    return together.reindex(arithmetic=arithmetics).assign_attrs(
        run.made_with,
        classes=json.dumps(dataset.classes),
        diverged=int(diverged),
        threads=1,
        seconds=round(run.seconds, 1),
        seconds_measuring=round(run.seconds_measuring, 1),
    )


def _four(images: list[int]) -> set[int]:
    if not images:
        return set()
    return {min(images, key=lambda k: abs(k - wanted)) for wanted in (0, EARLY, LATE * images[-1], images[-1])}


def _checkpoints(
    model: nn.Module, points: Points, due: list[int], training: Training, resume: dict[str, Any] | None
) -> Iterable[Checkpoint]:
    return train(
        model,
        points,
        checkpoints=due,
        unit="images",
        seed=training.seed,
        loss=LOSSES[training.loss],
        optimizer=training.optimizer,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        lengths=sentence_models.lengths_of(points[0]),
        clip=training.clip,
        mixed=points[0].is_cuda and not points[0].is_floating_point(),
        resume=resume,
    )


def _splits(dataset: Dataset) -> dict[str, Points]:
    inputs, targets = dataset.train
    if len(targets) > 10_000:
        chosen = balanced_subset(targets, 10_000 // len(dataset.classes) * len(dataset.classes), seed=0)
        inputs, targets = inputs[chosen], targets[chosen]
    return {"train": (inputs, targets), "validation": dataset.validation, "test": dataset.test}


def _dataset(training: Training, device: str) -> Dataset:
    """The data set on the device, in the dtype of the training, with as many training images as that takes."""
    dataset, dtype = _loaded(training), getattr(torch, training.dtype)
    parts = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    if training.train_size:
        x, y = parts["train"]
        chosen = balanced_subset(y, training.train_size, training.seed)
        parts["train"] = x[chosen], y[chosen]
    return replace(
        dataset,
        **{
            name: (x.to(device, dtype if x.is_floating_point() else None), y.to(device))
            for name, (x, y) in parts.items()
        },
    )


def _loaded(training: Training) -> Dataset:
    if training.dataset in sentences.NAMES:
        return sentence_models.load(training.dataset, training.model)
    return data.load(training.dataset, sphere=training.sphere)


def _model(training: Training, dataset: Dataset) -> nn.Module:
    if training.dataset in sentences.NAMES:
        pretrained = training.initialisation == "pretrained"
        tokenizer = sentence_models.tokenizer_for(training.dataset, training.model)
        return sentence_models.build_classifier(training.model, tokenizer, training.seed, pretrained=pretrained)
    return build_model(
        training.model,
        dataset,
        training.seed,
        initialisation=training.initialisation,
        activation=training.activation,
        batch_norm=training.batch_norm,
    )


def _with_noise(dataset: Dataset, training: Training) -> Dataset:
    """With training and validation labels permuted; test labels stay true."""
    if not training.label_noise:
        return dataset
    parts = {name: getattr(dataset, name) for name in ("train", "validation")}
    noise = {name: (x, random_labels(y, training.label_noise, training.seed)) for name, (x, y) in parts.items()}
    return replace(dataset, **noise)


def _at(checkpoint: Checkpoint, found: xr.Dataset, watched: dict[str, tuple[float, float]]) -> xr.Dataset:
    losses, accuracies = zip(*watched.values(), strict=True)
    curves = {
        "loss": ("split", list(losses)),
        "accuracy": ("split", list(accuracies)),
        "batch_loss": checkpoint.loss,
        "epochs": checkpoint.epochs,
    }
    return found.assign(curves).assign_coords(split=list(watched), images=checkpoint.images)


def _bar(training: Training, images: int, progress: bool) -> Any:
    from tqdm import tqdm

    silent = None if progress else True  # None: silent where there is no terminal, as in a notebook's kernel
    return tqdm(total=images, desc=training.key, unit=" images", unit_scale=True, disable=silent)


def _explain(error: dict[str, Any]) -> str:
    names = [place for place in error["loc"][1:] if isinstance(place, str)]  # the first is the part
    name = names[-1] if names else "experiment"
    if error["type"] == "extra_forbidden":
        known = ", ".join([*Training.model_fields, *Measurement.model_fields])
        return f"unknown field {name!r}; known are {known}"
    if error["type"] == "missing":
        return f"{name!r} is missing"
    message = re.sub("^Value error, ", "", error["msg"])
    return f"{name!r} = {error['input']!r}: {message}" if names else message
