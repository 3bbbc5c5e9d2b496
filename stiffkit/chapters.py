"""The parameters of each chapter: what is allowed, what a re-run changes, what it would cost."""

import ast
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import xarray as xr
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stiffkit import results, sentence_models, sentences
from stiffkit.experiment import (
    LOSSES,
    SCALES,
    Experiment,
    check_model,
    check_points,
    cost_of_images,
    falling,
    known_name,
)
from stiffkit.lengths import DEFINITIONS
from stiffkit.measurement import ARITHMETICS, OWN
from stiffkit.models import ACTIVATIONS
from stiffkit.results import book
from stiffkit.spaces import INPUT_DISTANCES, JUDGED
from stiffkit.superclasses import SUPERCLASSES
from stiffkit.sweeps import Sweep

ADAM = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # the first version's own rates (Fig 10)
FEWER = {"digits": (3e-4, 1e-3, 3e-3), "cifar10": ADAM[2:]}
DESCENT = (3e-2, 1e-1, 3e-1)
STOPPING = {  # chosen in pilots with seed 101: most rates come to all three of their set
    "digits": (1.0, 0.3, 0.1),
    "mnist": (0.3, 0.1, 0.03),
    "fashion_mnist": (0.5, 0.4, 0.3),
    "cifar10": (1.4, 1.2, 1.0),
}
TUNING = {"tiny": 1e-3, "minilm": 1e-4}  # rates of AdamW; larger models have 2e-5
LAYERS = {"fc": 4, "cnn": 4, "cnn_v1": 5, "resnet20": 22}  # with weights
FEW = 5_000  # images whose labels are memorised whole


class ParameterError(ValueError):
    """A chapter was given a parameter that it does not know or cannot take; shown without a traceback in a notebook."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class TooLongError(ParameterError):
    """What would have to be computed takes longer than `max_minutes`."""


def rounded(value: float, digits: int = 2) -> str:
    """A number as the book prints it: fixed decimals, a true minus sign, never minus zero.

    >>> rounded(0.719), rounded(-0.001)
    ('0.72', '0.00')
    """
    text = f"{float(value):.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _open_or_known(value: str, info: Any) -> str:
    """Check an arithmetic or the name of a network, ..., for a validator; a network may be left open."""
    if (info.field_name, value) == ("model", ""):
        return value
    return _known_arithmetic(value) if info.field_name == "arithmetic" else known_name(value, info)


class Chapter(BaseModel):
    """Parameters of a chapter; subclasses give the fields, their defaults being those of the recorded run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    number: ClassVar[int]
    name: ClassVar[str]
    datasets: ClassVar[tuple[str, ...]] = tuple(name for name, scale in SCALES.items() if scale.classes == 10)
    kind: ClassVar[str] = "those of ten classes"
    max_minutes: float = Field(gt=0, description="what a re-run may take, in minutes")

    @field_validator("dataset", check_fields=False)
    @classmethod
    def _is_shown_here(cls, value: str) -> str:
        if value not in cls.datasets:
            raise ValueError(f"allowed are {', '.join(cls.datasets)}, {cls.kind}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _as_papermill_gives_it(cls, value: Any, info: Any) -> Any:
        """Take a list that `-p` passed as a JSON string; refuse a bool where a number is due."""
        wanted = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and wanted in (int, float):
            raise ValueError("a number is wanted")
        if isinstance(value, str) and getattr(wanted, "__origin__", wanted) in (list, tuple):
            return json.loads(value or "[]")
        return value

    @classmethod
    def read(cls, namespace: Mapping[str, Any]) -> Self:
        """Validate the parameters in a notebook's namespace: `globals()`, after the parameters cells have run.

        Raises:
            ParameterError: naming the parameter and what is allowed: an unknown name in papermill's injected cell, a
                value of a wrong type or out of range.

        """
        injected = [source for source in namespace.get("In", ()) if source.startswith("# Parameters\n")]
        assigned = _assigned(injected[-1]) if injected else []
        unknown = {name: None for name in assigned if name not in cls.model_fields}
        return cls.check({name: namespace[name] for name in cls.model_fields if name in namespace} | unknown)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Self:
        """Validate parameters given by name, as a dict."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ParameterError("\n".join(cls._explain(e) for e in error.errors())) from None

    @classmethod
    def _explain(cls, error: Mapping[str, Any]) -> str:
        name = str(error["loc"][0]) if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, cls.model_fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            return f"unknown parameter {name!r}{hint} This chapter takes: {', '.join(cls.model_fields)}"
        message = error["msg"].removeprefix("Value error, ")
        return f"parameter {name!r} = {error['input']!r}: {message}" if name else message

    @property
    def changed(self) -> dict[str, Any]:
        """The parameters, but for `max_minutes`, that are not at their defaults, which the recorded run has."""
        default = type(self)()
        return {k: v for k, v in self if k != "max_minutes" and v != getattr(default, k)}

    def announce(self) -> None:
        """Display what a re-run says first; nothing for the recorded run."""
        if self.changed:
            from IPython.display import Markdown, display

            what = ", ".join(f"`{name}` = `{value!r}`" for name, value in self.changed.items())
            text = (
                f"**You ran this chapter with {what}.** The figures are yours; the text around describes the defaults."
            )
            display(Markdown(text))

    @property
    def identity(self) -> str:
        """The parameters that decide the results, as JSON."""
        return self.model_dump_json(exclude={"max_minutes"})

    @property
    def recorded(self) -> Path:
        """Where the recorded results lie, whether they are there or not."""
        return book() / "results" / f"{self.number:02}_{self.name}.nc"

    @property
    def notebook(self) -> Path:
        """Where the chapter's notebook lies."""
        return book() / f"{self.number:02}_{self.name}.ipynb"

    @property
    def minutes(self) -> float:
        """An estimate of the time that computing takes on two cores, in minutes."""
        raise NotImplementedError

    def allow(self) -> None:
        """Stop before anything is computed if it would take longer than `max_minutes`.

        Raises:
            TooLongError: with the estimate, the quick command, and how to allow more.

        """
        if self.minutes > self.max_minutes:
            raise TooLongError(
                f"this would take about {self.minutes:.1f} minutes, and max_minutes allows {self.max_minutes:g}. "
                f"Nothing was computed. To allow it: -p max_minutes {self.minutes * 1.5:.0f}. For a quick look: "
                f"{_command('stiffkit')} chapter {self.number} --profile quick -o out.html"
            )

    def prepare(self, *, progress: bool = True) -> None:
        """Compute, with a bar on a terminal, the runs that the notebook would compute without one."""


class Definition(Chapter):
    """Parameters of chapter 1."""

    number: ClassVar[int] = 1
    name: ClassVar[str] = "definition"

    dataset: str = Field("mnist", description="data set")
    model: str = Field("fc", description="network")
    initialisation: str = Field("keras", description="of the weights")
    sphere: bool = Field(True, description="scale each image to unit norm")
    points: int = Field(0, ge=0, description="points in the class matrices; 0: the data set's own number")
    learning_rate: float = Field(1e-3, gt=0, description="of the single step, for gradient descent and for Adam")
    seed: int = Field(1, ge=0, le=1_000_000, description="of weights, order of training and choice of points")
    max_minutes: float = Field(5.0, gt=0, description="what a re-run may take, in minutes")

    _known = field_validator("model", "initialisation")(known_name)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_sizes(self.dataset, self.model, self.points)
        return self

    @property
    def number_of_points(self) -> int:
        """Points in the class matrices: 500 for the full data sets as in the paper, 200 for the embedded digits."""
        return self.points or SCALES[self.dataset].points

    @property
    def minutes(self) -> float:
        """One epoch of training and the measurements, from timings on two cores; right within a factor of two."""
        images, seconds = cost_of_images(self.dataset, self.model)
        measuring = 20 + 0.02 * self.number_of_points + (0 if self.model == "fc" else 1e5 * seconds)
        return (images * seconds + measuring) / 60


class ClassMatrices(Chapter):
    """Parameters of chapter 2."""

    number: ClassVar[int] = 2
    name: ClassVar[str] = "class_matrices"

    dataset: str = Field("mnist", description="data set")
    model: str = Field("", description="network; empty: the data set's own")
    initialisation: str = Field("keras", description="of the weights")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam, constant")
    epochs: float = Field(0, ge=0, le=1000, description="passes over the training set; 0: the data set's own")
    points: int = Field(0, ge=0, description="training, and validation, points; 0: the data set's own")
    seeds: int = Field(0, ge=0, le=100, description="runs, with seeds 1 to this; 0: the data set's own")
    arithmetic: str = Field("exact", description="of the gradients that the first figures show")
    max_minutes: float = Field(10.0, gt=0, description="what a re-run may take, in minutes")

    _known = field_validator("model", "initialisation", "arithmetic")(_open_or_known)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_sizes(self.dataset, self.model, self.points)
        return self

    @property
    def experiments(self) -> list[Experiment]:
        """One a seed; what the parameters leave open is the data set's own."""
        chosen = {name: getattr(self, name) or value for name, value in own_of(self.dataset).items()}
        seeds = chosen.pop("seeds")
        chosen |= {"every": 4} if chosen["model"] == "cnn_v1" else {}
        same = {name: getattr(self, name) for name in ("dataset", "initialisation", "learning_rate")}
        return [Experiment.of(**same, **chosen, seed=seed) for seed in range(1, seeds + 1)]

    @property
    def minutes(self) -> float:
        """The estimate for the runs that are neither recorded nor cached."""
        return sum(e.minutes for e in self.experiments if not results.source(e))

    def prepare(self, *, progress: bool = True) -> None:
        """Compute the runs on all cores; one that fails does so again in the notebook, where it is explained."""
        Sweep({"seed": []}, tuple(self.experiments)).run(progress=progress)


class Planned(Chapter):
    """Parameters of a chapter some of whose runs the ledger plans: those are shown as far as they are there."""

    @property
    def series(self) -> list[list[Experiment]]:
        """All series of these parameters; an experiment may be in two of them."""
        raise NotImplementedError

    @property
    def to_run(self) -> tuple[Experiment, ...]:
        """What a re-run computes where it is not there; what the ledger plans is shown as far as it is recorded."""
        from stiffkit import claims

        planned = {e for runs in claims.read().runs.values() for e in runs.experiments()}
        return tuple(dict.fromkeys(e for experiments in self.series for e in experiments if e not in planned))

    @property
    def minutes(self) -> float:
        """The estimate for the runs that are neither recorded nor cached."""
        return sum(e.minutes for e in self.to_run if not results.source(e))

    def prepare(self, *, progress: bool = True) -> None:
        """Compute the runs on all cores; one that fails does so again in the notebook, where it is explained."""
        Sweep({"seed": []}, self.to_run).run(progress=progress)

    def found(self, experiments: Sequence[Experiment], *axes: str) -> xr.Dataset | None:
        """The runs of a series side by side: recorded, cached, or computed now; None where none is there."""
        to_run = set(self.to_run)
        runs = [e.run() if e in to_run else results.find(e) for e in experiments]
        there = [run for run in runs if run is not None]
        return results.side_by_side(there, *axes) if there else None

    def missing(self, what: str, chapter: int | None = None) -> ParameterError:
        """The error where planned runs are not there: `what` they are, and which sweeps compute them."""
        return ParameterError(
            f"no {what} is recorded or in the cache. The sweeps book/sweeps/{chapter or self.number:02}_*.yml "
            "compute the planned ones: .venv/bin/stiffkit sweep FILE"
        )


class Series(Planned):
    """Parameters of a chapter that lays series of runs side by side, each with seeds 1 to `seeds`."""

    dataset: str = Field("mnist", description="data set")
    model: str = Field("", description="network; empty: the data set's own")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam, constant")
    epochs: float = Field(0, ge=0, le=1000, description="passes over the training set; 0: the series' own")
    points: int = Field(0, ge=0, description="training, and validation, points; 0: the data set's own")
    seeds: int = Field(0, ge=0, le=100, description="runs, with seeds 1 to this; 0: the data set's own")
    max_minutes: float = Field(10.0, gt=0, description="what a re-run may take, in minutes")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_sizes(self.dataset, self.model, self.number_of_points)
        return self

    @property
    def number_of_points(self) -> int:
        """Training, and validation, points; 0: the data set's own number."""
        return self.points

    def _one_a_seed(self, own: Mapping[str, Any], **fields: Any) -> list[Experiment]:
        """A series whose network, epochs, points and seeds are `own` where the parameters leave them open."""
        given = {name: getattr(self, name) for name in own} | {"points": self.number_of_points}
        chosen = {name: given[name] or value for name, value in own.items()}
        seeds = chosen.pop("seeds")
        same = {"dataset": self.dataset, "learning_rate": self.learning_rate, "schedule": "sparse", "attribution": True}
        return [Experiment.of(**{**same, **chosen, **fields}, seed=seed) for seed in range(1, seeds + 1)]


class RandomLabels(Series):
    """Parameters of chapter 3."""

    number: ClassVar[int] = 3
    name: ClassVar[str] = "random_labels"

    label_noise: float = Field(1.0, ge=0, le=1, description="share of the labels that are permuted among themselves")
    arithmetic: str = Field("exact", description="of the gradients that the first figures show")

    _known = field_validator("model", "arithmetic")(_open_or_known)

    @property
    def experiments(self) -> dict[str, list[Experiment]]:
        """Networks that are taught random labels, of all images and of few, or true ones: one experiment a seed."""
        few = (
            {}
            if self.dataset == "digits"
            else {f"random labels, {FEW:,} images": self.with_noise(self.label_noise, FEW)}
        )
        return {"random labels": self.with_noise(self.label_noise), **few, "true labels": self.with_noise(0)}

    @property
    def series(self) -> list[list[Experiment]]:
        """The main series, and on the embedded digits one between."""
        return [*self.experiments.values(), *(map(self.with_noise, self.shares) if self.dataset == "digits" else ())]

    @property
    def shares(self) -> tuple[float, ...]:
        """Of random labels, between none and all of them."""
        return (0.5,) if self.dataset == "digits" else (0.25, 0.5, 0.75)

    def with_noise(self, share: float, images: int = 0) -> list[Experiment]:
        """A series of which a share of the labels is permuted: it takes longer to learn than the true ones.

        With a number of images, so many training images alone: they are memorised whole.
        """
        own = own_of(self.dataset)
        own["seeds"] = min(own["seeds"], 5)
        noise = {"label_noise": share} if share else {}
        own["epochs"] = {"digits": 40.0}.get(self.dataset, 100.0) if share else own["epochs"]
        noise |= {"train_size": images} if images else {}
        return self._one_a_seed(own, every=8, **noise)


class Superclasses(Series):
    """Parameters of chapter 4."""

    number: ClassVar[int] = 4
    name: ClassVar[str] = "superclasses"
    datasets: ClassVar[tuple[str, ...]] = tuple(SUPERCLASSES)
    kind: ClassVar[str] = "those whose classes have superclasses"

    dataset: str = Field("cifar100", description="data set")
    batch_norm: bool = Field(False, description="after the convolutions of resnet20")
    points: int = Field(0, ge=0, description="of each class, for training as for validation; 0: the data set's own")
    permutations: int = Field(9_999, ge=99, le=1_000_000, description="random groupings, of each test")

    @field_validator("model")
    @classmethod
    def _is_known(cls, value: str, info: Any) -> str:
        return value and known_name(value, info)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_norm and self.model != "resnet20":
            raise ValueError("'batch_norm' is an option of resnet20: give -p model resnet20 as well")
        most = SCALES[self.dataset].most // SCALES[self.dataset].classes
        if self.points and not 2 <= self.points <= most:
            raise ValueError(f"'points' = {self.points}: {self.dataset} allows 2 to {most} of each class")
        check_model(self.dataset, self.model)
        return self

    @property
    def number_of_points(self) -> int:
        """Training, and validation, points of all classes; 0: the data set's own number."""
        return self.points * SCALES[self.dataset].classes

    @property
    def experiments(self) -> list[Experiment]:
        """One a seed; what the parameters leave open is the data set's own."""
        return self._grouped()

    @property
    def shuffled(self) -> list[Experiment]:
        """The same with all labels permuted among themselves, measured before training and at the end alone."""
        return self._grouped(label_noise=1.0, schedule="ends")

    @property
    def series(self) -> list[list[Experiment]]:
        """The runs, and on the embedded set those with permuted labels."""
        return [self.experiments, *([self.shuffled] if self.dataset == "hierarchy" else [])]

    def _grouped(self, schedule: str = "few", **fields: Any) -> list[Experiment]:
        own = {"model": "cnn_v1", "epochs": 20.0, "points": SCALES[self.dataset].points, "seeds": 3}
        own |= {"epochs": 12.0} if self.model == "resnet20" else {"seeds": 5}
        own |= {"model": "fc", "seeds": 2} if self.dataset == "hierarchy" else {}
        norm = {"batch_norm": True} if self.batch_norm else {}
        return self._one_a_seed(own, schedule=schedule, attribution=False, every=0, **norm, **fields)


class Rates(Planned):
    """Parameters of a chapter that lays runs with several learning rates side by side."""

    dataset: str = Field("mnist", description="data set")
    model: str = Field("", description="network; empty: the data set's own")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="optimiser, at a constant rate")
    learning_rates: tuple[float, ...] = Field((), description="constant, rising; empty: the data set's own")
    stopping_losses: tuple[float, ...] = Field((), description="of training, falling; empty: the data set's own")
    epochs: float = Field(0, ge=0, le=1000, description="passes over the training set; 0: the data set's own")
    points: int = Field(0, ge=0, description="training, and validation, points; 0: the data set's own")
    seeds: int = Field(0, ge=0, le=100, description="runs of each rate, with seeds 1 to this; 0: the data set's own")
    arithmetic: str = Field("exact", description="of the gradients that the first figures show")
    max_minutes: float = Field(10.0, gt=0, description="what a re-run may take, in minutes")

    _known = field_validator("model", "arithmetic")(_open_or_known)

    @field_validator("learning_rates")
    @classmethod
    def _rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value and (len(value) < 2 or value[0] <= 0 or any(a >= b for a, b in pairwise(value))):
            raise ValueError("two rates or more above zero, each above the one before it, are wanted")
        return value

    @field_validator("stopping_losses")
    @classmethod
    def _fall(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return falling(value)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_sizes(self.dataset, self.model, self.points)
        return self

    @property
    def experiments(self) -> list[Experiment]:
        """One a rate and seed; what the parameters leave open is the data set's own."""
        chosen = {name: getattr(self, name) or value for name, value in rates_of(self.dataset, self.optimizer).items()}
        rates, seeds = chosen.pop("learning_rates"), chosen.pop("seeds")
        same = {"dataset": self.dataset, "optimizer": self.optimizer, "schedule": "geometric"}
        chosen |= {"every": 4} if chosen["model"] == "cnn_v1" else {}
        places = ((rate, seed) for seed in range(1, seeds + 1) for rate in rates)
        return [Experiment.of(**same, **chosen, learning_rate=rate, seed=seed) for rate, seed in places]

    @property
    def series(self) -> list[list[Experiment]]:
        """All rates and seeds are one series."""
        return [self.experiments]


class LearningRate(Rates):
    """Parameters of chapter 5."""

    number: ClassVar[int] = 5
    name: ClassVar[str] = "learning_rate"


class CriticalLength(Rates):
    """Parameters of chapter 6, whose runs are those of chapter 5."""

    number: ClassVar[int] = 6
    name: ClassVar[str] = "critical_length"

    distance: str = Field("cosine", description="between inputs, in the figure against the epoch")
    layer: str = Field("input", description="whose representation that figure is about")
    definition: str = Field("line", description="of the critical length in that figure")

    @field_validator("arithmetic")
    @classmethod
    def _has_curves(cls, value: str) -> str:
        if value not in JUDGED:
            raise ValueError(f"allowed are {', '.join(JUDGED)}: curves are measured in these")
        return value

    @field_validator("distance", "definition")
    @classmethod
    def _is_known(cls, value: str, info: Any) -> str:
        known = {"distance": tuple(INPUT_DISTANCES), "definition": tuple(DEFINITIONS)}[info.field_name]
        if value not in known:
            raise ValueError(f"allowed are {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _is_a_space(self) -> Self:
        layers = LAYERS[self.experiments[0].training.model]
        known = ["input", *(f"layer {k}" for k in range(1, layers)), "output"]
        if self.layer not in known:
            raise ValueError(f"'layer' = {self.layer!r}: allowed are {', '.join(known)}")
        if self.distance != "cosine" and self.layer != "input":
            raise ValueError(f"'distance' = {self.distance!r} is measured between inputs alone: layers have the cosine")
        return self

    @property
    def of_layers(self) -> list[Experiment]:
        """The highest rate once more, each layer's gradients by themselves: one a seed, five at most, of Adam alone."""
        fastest = max(e.training.learning_rate for e in self.experiments)
        found = [e for e in self.experiments if e.training.learning_rate == fastest and e.training.seed <= 5]
        asked = {"schedule": "few", "every": 0, "attribution": True, "distances": True, "stopping_losses": ()}
        return [] if self.optimizer != "adam" else [Experiment.of(**(e.fields | asked)) for e in found]

    @property
    def series(self) -> list[list[Experiment]]:
        """All rates and seeds, and the highest rate once more."""
        return [self.experiments, self.of_layers]

    @property
    def space(self) -> str:
        """Where the figure against the epoch takes its distances, as `stiffkit.spaces` calls it."""
        return self.layer if self.distance == "cosine" else INPUT_DISTANCES[self.distance]


class BertMnli(Planned):
    """Parameters of chapter 7."""

    number: ClassVar[int] = 7
    name: ClassVar[str] = "bert_mnli"
    datasets: ClassVar[tuple[str, ...]] = sentences.NAMES
    kind: ClassVar[str] = "those of pairs of sentences"

    dataset: str = Field("mnli", description="pairs of sentences")
    model: str = Field("minilm", description="tiny, minilm, bert-base-uncased, another model of the Hub, or a folder")
    initialisation: Literal["", "pretrained", "random"] = Field(
        "", description="of the weights; empty: the model's own"
    )
    learning_rate: float = Field(0, ge=0, description="of AdamW, constant; 0: the model's own")
    epochs: float = Field(0, ge=0, le=1000, description="passes over the training set; 0: the data set's own")
    points: int = Field(0, ge=0, description="training, and validation, points; 0: the data set's own")
    seeds: int = Field(0, ge=0, le=100, description="runs, with seeds 1 to this; 0: the data set's own")
    arithmetic: str = Field("exact", description="of the gradients that the first figures show")
    max_minutes: float = Field(10.0, gt=0, description="what a re-run may take, in minutes")

    _known = field_validator("model", "arithmetic")(_open_or_known)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.experiments  # noqa: B018  # refuses what cannot be run
        return self

    @property
    def experiments(self) -> list[Experiment]:
        """One a seed; what the parameters leave open is the model's and the data set's own."""
        own = tuned(self.dataset, self.model, self.initialisation)
        chosen = {name: getattr(self, name) or value for name, value in own.items()}
        seeds = chosen.pop("seeds")
        measured = {"schedule": "doubling", "every": 0, "attribution": True, "distances": True}
        same = {"dataset": self.dataset, "model": self.model, "optimizer": "adamw", "clip": 1.0} | measured
        return [Experiment.of(**same, **chosen, seed=seed) for seed in range(1, seeds + 1)]

    @property
    def series(self) -> list[list[Experiment]]:
        """All seeds are one series."""
        return [self.experiments]


class NetworkOrArithmetic(Series):
    """Parameters of chapter 8."""

    number: ClassVar[int] = 8
    name: ClassVar[str] = "network_or_arithmetic"

    activation: str = Field("relu", description="of the hidden layers")
    training_loss: str = Field("", description="that is minimised, beside the fused one; empty: all five")
    arithmetic: str = Field("keras2019", description="that exact ones are held against in the table of deciles")

    @field_validator("model", "activation", "training_loss", "arithmetic")
    @classmethod
    def _is_known(cls, value: str, info: Any) -> str:
        if value == "" and info.field_name in ("model", "training_loss"):
            return value
        if info.field_name == "arithmetic":
            return _known_arithmetic(value, but=("exact",))
        return known_name(value, info, "loss" if info.field_name == "training_loss" else "")

    @property
    def experiments(self) -> dict[str, list[Experiment]]:
        """For each training loss one experiment a seed; the fused one is always there, as the figures begin with it."""
        losses = dict.fromkeys(["float32", self.training_loss]) if self.training_loss else LOSSES
        return {loss: self._trained(loss, self.activation) for loss in losses}

    @property
    def controls(self) -> dict[str, list[Experiment]]:
        """For each activation one experiment a seed, trained with the fused loss: features of one sign and of both."""
        return {activation: self._trained("float32", activation) for activation in ACTIVATIONS}

    @property
    def series(self) -> list[list[Experiment]]:
        """Those of the training losses, and on the embedded digits the controls."""
        return [*self.experiments.values(), *(self.controls.values() if self.dataset == "digits" else ())]

    def _trained(self, loss: str, activation: str) -> list[Experiment]:
        arithmetics = {"arithmetics": ("exact", OWN)} if loss not in ARITHMETICS else {}
        return self._one_a_seed(own_of(self.dataset), loss=loss, activation=activation, **arithmetics)


def own_of(dataset: str) -> dict[str, Any]:
    """The network, epochs, points and seeds that a data set has where a chapter's parameters leave them open."""
    own = {"model": "fc", "epochs": 30.0, "points": SCALES[dataset].points, "seeds": 8}
    return own | {"cifar10": {"model": "cnn_v1", "seeds": 3}, "digits": {"epochs": 12.0, "seeds": 2}}.get(dataset, {})


def tuned(dataset: str, model: str, initialisation: str = "") -> dict[str, Any]:
    """How a transformer is tuned where the parameters of chapter 7 leave it open."""
    own = {"learning_rate": TUNING.get(model, 2e-5), "epochs": 6.0, "points": SCALES[dataset].points, "seeds": 5}
    own |= {"seeds": 3} if model not in TUNING or initialisation == "random" else {}
    own |= {"epochs": 20.0, "seeds": 2} if dataset == "toy_nli" else {}
    return own | {"initialisation": "random" if model == sentence_models.RANDOM else "pretrained"}


def rates_of(dataset: str, optimizer: str) -> dict[str, Any]:
    """The same for chapters 5 and 6, with the rates and the stopping losses."""
    own = own_of(dataset) | {"learning_rates": FEWER.get(dataset, ADAM), "stopping_losses": STOPPING[dataset]}
    own |= {"epochs": 20.0, "points": 300} if dataset == "cifar10" else {}
    return own | ({"learning_rates": DESCENT, "seeds": min(own["seeds"], 5)} if optimizer == "sgd" else {})


def _known_arithmetic(value: str, but: tuple[str, ...] = ()) -> str:
    allowed = [name for name in ARITHMETICS if name not in but]
    if value not in allowed:
        raise ValueError(f"allowed are {', '.join(allowed)}")
    return value


def chapters() -> list[type[Chapter]]:
    """All chapters, in their order."""
    below = [Chapter]
    for chapter in below:  # grows on the way
        below += chapter.__subclasses__()
    return sorted((c for c in below if c.__module__ == __name__ and "number" in vars(c)), key=lambda c: c.number)


def _check_sizes(dataset: str, model: str, points: int) -> None:
    check_model(dataset, model)
    if points:
        check_points(dataset, points)


def _command(name: str) -> str:
    """How a program of the running environment is called at the root of the checkout."""
    program = Path(sys.executable).with_name(name)
    return str(program.relative_to(book().parent) if program.is_relative_to(book().parent) else program)


def _assigned(source: str) -> list[str]:
    """The names that a parameters cell assigns."""
    targets = [node.targets if isinstance(node, ast.Assign) else [] for node in ast.parse(source).body]
    return [target.id for group in targets for target in group if isinstance(target, ast.Name)]
