"""The ledger: every claim that the book judges, its criterion, the estimate with its interval, and the verdict.

The entries are in `book/claims.yml`. Each was committed before the runs that judge it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any, Literal, Self

import numpy as np
import xarray as xr
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stiffkit import results
from stiffkit.chapters import Chapter, rounded
from stiffkit.endpoints import ALLOWED, QUANTITIES, has_learnt, has_overfitted
from stiffkit.experiment import Experiment
from stiffkit.measurement import SPOKEN
from stiffkit.results import book
from stiffkit.statistics import t_interval
from stiffkit.sweeps import Sweep

REPRODUCED, CONTRADICTED, INCONCLUSIVE = "reproduced", "contradicted", "inconclusive"
DEPENDS, MIXED, NOT_RUN = "depends on the arithmetic", "mixed", "not run"
VERDICTS = (REPRODUCED, CONTRADICTED, DEPENDS, MIXED, INCONCLUSIVE, NOT_RUN)
DASH = "\N{EN DASH}"
_LEDGERS: dict[str, "Ledger"] = {}  # that were read, by their text: chapters look up what is planned many times


class LedgerError(ValueError):
    """`claims.yml` has an entry that cannot be judged."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Criterion(_Entry):
    """What the quantity has to be: above a number, below one, or between two (an equivalence with its margin)."""

    above: float | None = None
    below: float | None = None
    between: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in self.model_fields_set if getattr(self, name) is not None]
        if len(given) != 1 or len(self.model_fields_set) != 1:
            raise ValueError("a criterion is one of above, below, between")
        if self.between and self.between[0] >= self.between[1]:
            raise ValueError("between has the lower number first")
        return self

    @property
    def limits(self) -> tuple[float, float]:
        """The open interval that counts as reproduced."""
        if self.between:
            return self.between
        return (-np.inf if self.above is None else self.above, np.inf if self.below is None else self.below)

    def __str__(self) -> str:
        if self.between:
            text = f"between {self.between[0]:g} and {self.between[1]:g}"
        else:
            text = f"above {self.above:g}" if self.below is None else f"below {self.below:g}"
        return text.replace("-", "\N{MINUS SIGN}")


class Source(_Entry):
    """Where a paper says it."""

    paper: str
    version: str
    where: str
    code: str = Field(description="the claim's number in our own list; stays in the file")


class Former(_Entry):
    """A criterion that was replaced, and why."""

    criterion: Criterion
    reason: str


class Claim(_Entry):
    """One claim: what the paper says, in our words, and what would count for and against it."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    chapter: int = Field(ge=1)
    title: str
    source: Source
    v1: str = Field("", description="what the first version reports, in our words")
    v2: str = Field("", description="what the version submitted to ICLR 2020 reports")
    v3: str = Field("", description="what the third version reports")
    ours: str = Field("", description="what no version says: a question of this book")
    quantity: dict[str, Any] = Field(description="the name of a function in stiffkit.endpoints, and its arguments")
    criterion: Criterion
    datasets: tuple[str, ...] = Field(min_length=1, description="names of `runs`")
    arithmetics: tuple[Literal["exact", "float32", "keras2019", "own"], ...] = Field(("exact",), min_length=1)
    only_overfitted: bool = Field(False, description="seeds that do not come to overfit are left out")
    exploratory: str = Field("", description="why, if something was seen before the criterion was written")
    former: tuple[Former, ...] = ()

    @field_validator("quantity")
    @classmethod
    def _can_be_computed(cls, value: dict[str, Any]) -> dict[str, Any]:
        name, arguments = value.get("name"), {k: v for k, v in value.items() if k != "name"}
        if not isinstance(name, str) or name not in QUANTITIES:
            raise ValueError(f"quantity {name!r} is unknown; known are {', '.join(QUANTITIES)}")
        code = QUANTITIES[name].__code__
        known = code.co_varnames[1 : code.co_argcount]
        if unknown := set(arguments) - set(known):
            raise ValueError(f"{name} has no argument {', '.join(sorted(unknown))}; it takes {', '.join(known)}")
        required = known[: len(known) - len(QUANTITIES[name].__defaults__ or ())]
        if missing := set(required) - set(arguments):
            raise ValueError(f"{name} needs {', '.join(sorted(missing))}")
        for argument, given in arguments.items():
            if given not in ALLOWED[argument]:
                raise ValueError(f"{argument} = {given!r}: allowed are {', '.join(ALLOWED[argument])}")
        if arguments.get("signal") in ("within", "between") and not {"measure", "regime"} <= set(arguments):
            raise ValueError(f"the signal {arguments['signal']} needs a measure and a regime")
        return value


class Runs(_Entry):
    """The runs that judge: fields of an experiment, fields with several values, and seeds 1 to `seeds`."""

    title: str
    chapter: int = Field(2, ge=1, description="that is about them")
    experiment: dict[str, Any]
    axes: dict[str, tuple[Any, ...]] = Field({}, description="fields with all of their values")
    seeds: int = Field(ge=1)
    only_learnt: bool = Field(False, description="seeds that have not learnt anything are left out")

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        if "seed" in {**self.experiment, **self.axes}:
            raise ValueError("'seed' is counted from 1 to `seeds`")
        if doubled := set(self.experiment) & set(self.axes):
            raise ValueError(f"'{min(doubled)}' is a field and an axis")
        self.of_seed(1)
        return self

    @property
    def short(self) -> str:
        """The title's first part: the data set."""
        return self.title.split(",")[0]

    def experiments(self) -> list[Experiment]:
        """All of them, seed by seed."""
        return [e for seed in range(1, self.seeds + 1) for e in self.of_seed(seed)]

    def of_seed(self, seed: int) -> list[Experiment]:
        """Those of one seed: one for each combination of the axes' values."""
        places = (dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values()))
        return [Experiment.of(**self.experiment, **place, seed=seed) for place in places]


class Alternative(_Entry):
    """One wording of a blank in the answer, and the verdicts that call for it; the first that fits is said."""

    say: str
    when: dict[str, tuple[str, ...]] = Field(description="{claim, or claim/runs: verdicts}; empty: otherwise")


class Answer(_Entry):
    """The book's one sentence, with a list of alternatives for each blank."""

    sentence: str
    blanks: dict[str, tuple[Alternative, ...]]


class Ledger(_Entry):
    """All of `claims.yml`."""

    runs: dict[str, Runs]
    claims: tuple[Claim, ...]
    answer: Answer
    unchecked: str

    def of_chapter(self, number: int) -> list[str]:
        """The names of the runs that a chapter is about."""
        return [name for name, runs in self.runs.items() if runs.chapter == number]

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        ids = [claim.id for claim in self.claims]
        if doubled := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"two claims are called {', '.join(sorted(doubled))}")
        for claim in self.claims:
            if unknown := set(claim.datasets) - set(self.runs):
                raise ValueError(f"claim {claim.id}: no runs are called {', '.join(sorted(unknown))}")
        blanks = {name for _, name, *_ in Formatter().parse(self.answer.sentence) if name is not None}
        if blanks != set(self.answer.blanks):
            raise ValueError(f"answer: the sentence has the blanks {', '.join(sorted(blanks))}, others are filled")
        for blank, options in self.answer.blanks.items():
            if not options or options[-1].when:
                raise ValueError(f"answer: the last alternative of {blank} has to be the one for all other cases")
        for alternative in (a for options in self.answer.blanks.values() for a in options):
            if unknown := set(alternative.when) - {
                *ids,
                *(f"{c.id}/{name}" for c in self.claims for name in c.datasets),
            }:
                raise ValueError(f"answer: no claim is called {', '.join(sorted(unknown))}")
            if unknown := {v for verdicts in alternative.when.values() for v in verdicts} - set(VERDICTS):
                raise ValueError(f"answer: {', '.join(sorted(unknown))} is no verdict; there are {', '.join(VERDICTS)}")
        return self


@dataclass(frozen=True)
class Estimate:
    """One quantity on one data set in one arithmetic.

    Attributes:
        values: one a seed.
        mean: over the seeds.
        low, high: 95 % t interval over the seeds; NaN for a single one.
        verdict: of this data set and arithmetic alone.

    """

    dataset: str
    arithmetic: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Judgement:
    """A claim, what was found, and the verdict over data sets and arithmetics."""

    claim: Claim
    estimates: tuple[Estimate, ...]
    by_dataset: dict[str, str]
    verdict: str


def read(path: Path | None = None) -> Ledger:
    """Read and check the ledger.

    Raises:
        LedgerError: naming the entry and what is wrong with it.

    """
    import yaml

    path = path or book() / "claims.yml"
    try:
        text = path.read_text(encoding="utf-8")
        if text not in _LEDGERS:
            entries = yaml.load(text, _strict_loader())
            _LEDGERS[text] = Ledger.model_validate(entries)
        return _LEDGERS[text]
    except ValidationError as error:
        raise LedgerError("\n".join(f"{path.name}: {_explain(e, entries)}" for e in error.errors())) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LedgerError(f"{path.name}: {error}") from None


def _strict_loader() -> type:
    """YAML's safe loader, which would take the last of two entries of one name; this refuses them."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            if doubled := [str(name) for name in names if names.count(name) > 1]:
                raise yaml.YAMLError(f"{doubled[0]!r} is there twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    return Strict


def _explain(error: Mapping[str, Any], entries: Any) -> str:
    place = error["loc"]
    text = "".join(f"{part}: " for part in place) + error["msg"]
    text += f", not {error['input']!r}" if isinstance(error["input"], str) else ""
    if place[:1] == ("claims",) and len(place) > 1 and isinstance(entries["claims"][place[1]], dict):
        text += f" (claim {entries['claims'][place[1]].get('id')!r})"
    return text


def verdict_of(criterion: Criterion, values: Iterable[float]) -> str:
    """The verdict of one set of seeds.

    Reproduced where the whole interval fulfils the criterion, contradicted where the whole interval does not; a single
    seed, or a value that is NaN, decides nothing. With fewer than five seeds such an interval is wider than the seeds
    are apart, so that every seed says the same.
    """
    values = tuple(values)
    if not values:
        return NOT_RUN
    if len(values) < 2 or not np.isfinite(values).all():
        return INCONCLUSIVE
    _, low, high = _interval(values)
    least, most = criterion.limits
    if low > least and high < most:
        return REPRODUCED
    return CONTRADICTED if high <= least or low >= most else INCONCLUSIVE


@lru_cache(maxsize=1024)
def _interval(values: tuple[float, ...]) -> tuple[float, float, float]:
    interval = t_interval(xr.DataArray(list(values), dims="seed"))
    return float(interval["mean"]), float(interval.low), float(interval.high)


def judge(claim: Claim, runs: Mapping[str, xr.Dataset]) -> Judgement:
    """Judge one claim from the runs of each data set, side by side along `seed`; one without runs is left out."""
    estimates, by_dataset = [], {}
    for dataset in claim.datasets:
        here = _estimates(claim, dataset, runs[dataset]) if dataset in runs else []
        estimates += here
        by_dataset[dataset] = _over_arithmetics([e.verdict for e in here])
    return Judgement(claim, tuple(estimates), by_dataset, _over_datasets(by_dataset.values()))


def _estimates(claim: Claim, dataset: str, runs: xr.Dataset) -> list[Estimate]:
    quantity, found = dict(claim.quantity), []
    values = QUANTITIES[quantity.pop("name")](runs, **quantity)
    if claim.only_overfitted:
        values = values.sel(seed=has_overfitted(runs))
    for arithmetic in claim.arithmetics:
        own = values.sel(arithmetic=arithmetic) if "arithmetic" in values.dims else values
        seeds = tuple(float(v) for v in own.values)
        if not seeds:
            return []
        found.append(Estimate(dataset, arithmetic, seeds, *_interval(seeds), verdict_of(claim.criterion, seeds)))
    return found


def _over_arithmetics(verdicts: list[str]) -> str:
    if not verdicts:
        return NOT_RUN
    if INCONCLUSIVE in verdicts:
        return INCONCLUSIVE
    return verdicts[0] if len(set(verdicts)) == 1 else DEPENDS


def _over_datasets(verdicts: Iterable[str]) -> str:
    """Mixed where data sets disagree; inconclusive where one of them is and the others agree."""
    run = [v for v in verdicts if v != NOT_RUN]
    decided = {v for v in run if v != INCONCLUSIVE}
    if not run:
        return NOT_RUN
    if len(decided) > 1:
        return MIXED
    return INCONCLUSIVE if INCONCLUSIVE in run else decided.pop()


def recorded_runs(ledger: Ledger, names: Iterable[str] | None = None) -> dict[str, xr.Dataset]:
    """The recorded runs of each entry of `runs`, or of those named, side by side along its axes and `seed`.

    Seeds of which a run is missing are left out, and of entries that say so those that have not learnt; entries without
    a seed as well.
    """
    files = tuple((path, path.stat().st_mtime_ns) for path in results.recorded())
    state = (files, tuple(results.versions().items()))
    chosen = ledger.runs if names is None else names
    found = {name: _together(ledger.runs[name].model_dump_json(), state) for name in chosen}
    return {name: together.copy() for name, together in found.items() if together is not None}


@lru_cache(maxsize=64)
def _together(entry: str, state: tuple) -> xr.Dataset | None:
    """The recorded runs of an entry of `runs`, once for a state of the recorded files."""
    runs = Runs.model_validate_json(entry)
    of_seeds = [list(map(results.find_recorded, runs.of_seed(seed))) for seed in range(1, runs.seeds + 1)]
    there = [run for own in of_seeds if all(run is not None for run in own) for run in own]
    if not there:
        return None
    together = results.side_by_side(there, *runs.axes, "seed")
    if runs.only_learnt:
        together = together.sel(seed=has_learnt(together))
    return together if together.sizes["seed"] else None


def recorded_sets(ledger: Ledger, names: Iterable[str]) -> dict[str, xr.Dataset]:
    """The recorded runs of some entries by their short titles; an entry that the ledger does not have is left out."""
    runs = recorded_runs(ledger, [name for name in names if name in ledger.runs])
    return {ledger.runs[name].short: found for name, found in runs.items()}


def record(chapter: type[Chapter], arguments: Sequence[str], leave_out: Collection[str] = ()) -> None:
    """What the scripts in book/record do: compute the runs of a chapter's entries, and add them to its recorded file.

    Args:
        chapter: gives the entries and the name of the file.
        arguments: of the command line: names of entries, all of the chapter's if there is none. With `--present`
            nothing is computed: what the cache has is recorded.
        leave_out: variables that the book does not show.

    """
    ledger = read()
    own = ledger.of_chapter(chapter.number)
    chosen = [word for word in arguments if word != "--present"] or own
    if unknown := set(chosen) - set(own):
        raise SystemExit(f"no runs of this chapter are called {', '.join(sorted(unknown))}; there are {', '.join(own)}")
    for name in chosen:
        experiments = tuple(ledger.runs[name].experiments())
        if "--present" in arguments:
            experiments = tuple(e for e in experiments if results.source(e))
        if experiments:
            print(name, Sweep({"seed": []}, experiments).record(chapter().recorded.stem, leave_out=leave_out))


def judge_all(
    ledger: Ledger | None = None, runs: Mapping[str, xr.Dataset] | None = None, chapter: int | None = None
) -> list[Judgement]:
    """Judge every claim of the ledger, or of one chapter, from the recorded runs, or from those given."""
    ledger = ledger or read()
    chosen = [claim for claim in ledger.claims if chapter in (None, claim.chapter)]
    if runs is None:
        runs = recorded_runs(ledger, dict.fromkeys(name for claim in chosen for name in claim.datasets))
    return [judge(claim, runs) for claim in chosen]


def answer(ledger: Ledger, judgements: Iterable[Judgement]) -> str:
    """The book's one sentence, from the verdicts."""
    verdicts = {}
    for j in judgements:
        verdicts |= {j.claim.id: j.verdict} | {f"{j.claim.id}/{name}": v for name, v in j.by_dataset.items()}
    return ledger.answer.sentence.format(
        **{
            blank: next(a.say for a in options if all(verdicts[c] in v for c, v in a.when.items()))
            for blank, options in ledger.answer.blanks.items()
        }
    )


def estimate(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A mean and its interval as the book prints them; without an interval for a single seed.

    >>> estimate(0.5, 0.4, 0.6), estimate(0.5, np.nan, np.nan)
    ('0.50 [0.40, 0.60]', '0.50')

    """
    if np.isnan(mean):
        return DASH
    interval = "" if np.isnan(low) else f" [{rounded(low, digits)}, {rounded(high, digits)}]"
    return rounded(mean, digits) + interval


def over_seeds(values: xr.DataArray, digits: int = 2) -> str:
    """The mean over seeds and its interval, as the book prints them."""
    return estimate(*_interval(tuple(values.values)), digits=digits)


def seeds_by_number(seeds: Sequence[int]) -> str:
    """Seeds named in a sentence.

    >>> seeds_by_number([2]), seeds_by_number([2, 3])
    ('seed 2', 'seeds 2, 3')

    """
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def found(judgement: Judgement, ledger: Ledger, *, verdicts: bool = True) -> str:
    """What was found for a claim, in one line: each data set, its estimate and interval, and its own verdict."""
    parts = []
    for dataset, verdict in judgement.by_dataset.items():
        here = [e for e in judgement.estimates if e.dataset == dataset]
        if here:
            names = [f"{SPOKEN[e.arithmetic]} " if len(here) > 1 else "" for e in here]
            digits = 2 if abs(here[0].mean) >= 0.05 else 3
            values = [name + estimate(e.mean, e.low, e.high, digits) for name, e in zip(names, here, strict=True)]
            own = f" ({verdict}, n = {len(here[0].values)})" if verdicts else ""
            parts.append(f"{ledger.runs[dataset].short} {', '.join(values)}{own}")
    overfits = " that overfits" if judgement.claim.only_overfitted else ""
    return "; ".join(parts) or f"no recorded run{overfits}"


def front(judgements: Iterable[Judgement], ledger: Ledger, folder: str = "") -> str:
    """What the front page and the README show: the answer, its figure, claims by verdict, what was not checked.

    Folded away is one plain row a claim, with what the versions said and what we find.

    Args:
        judgements: of the whole ledger.
        ledger: they belong to.
        folder: the book's, as seen from the page, with a slash at its end.

    """
    judgements = list(judgements)
    papers, ours = ([j for j in judgements if bool(j.claim.ours) == own] for own in (False, True))
    lines = [
        f"**{answer(ledger, judgements)}**",
        "",
        f"![Stiffness within and between classes against images seen, MNIST and CIFAR-10]({folder}_static/answer.png)",
        "",
        "Within classes (blue) and between classes (orange), by sign: exact gradients solid, gradients of a clipped "
        "loss dotted, least validation loss marked.",
        "",
        "What becomes of the paper's claims, by chapter:",
        "",
        *_by_verdict(papers, folder),
        *_folded("Claim by claim: what the versions said, what we find", _rows(papers, ledger, folder)),
    ]
    if ours:
        lines += _folded("Questions of our own", _rows_of_ours(ours, ledger, folder))
    lines += ["", f"Runs so far: {seeds_so_far([j for j in judgements if j.verdict != NOT_RUN], ledger)}."]
    return "\n".join([*lines, "", f"Not checked: {ledger.unchecked[0].lower()}{ledger.unchecked[1:]}"])


def _by_verdict(judgements: Sequence[Judgement], folder: str) -> list[str]:
    lines = []
    for verdict in VERDICTS:
        chapters: dict[str, list[str]] = {}
        for claim in (j.claim for j in judgements if j.verdict == verdict):
            chapters.setdefault(_link(claim, folder), []).append(claim.title)
        if chapters:
            lines += [
                f"* **{verdict}**",
                *(f"  * chapter {link}: {'; '.join(titles)}" for link, titles in chapters.items()),
            ]
    return lines


def _folded(title: str, lines: list[str]) -> list[str]:
    summary = f"<summary>{title} (in brackets 95 % t intervals over seeds)</summary>"
    return ["", "<details>", summary, "", *lines, "", "</details>"]


def _rows(judgements: Iterable[Judgement], ledger: Ledger, folder: str) -> list[str]:
    lines = ["| claim | we find | v1 said | v2 (ICLR) or v3 said | chapter |", "|---|---|---|---|---|"]
    for j in judgements:
        c = j.claim
        later = "; ".join(filter(None, [c.v2 and f"{c.v2} (v2)", c.v3])) or DASH
        lines.append(f"| {c.title} | {_we_find(j, ledger)} | {c.v1 or DASH} | {later} | {_link(c, folder)} |")
    return lines


def _rows_of_ours(judgements: Iterable[Judgement], ledger: Ledger, folder: str) -> list[str]:
    rows = [f"| {j.claim.title} | {_we_find(j, ledger)} | {_link(j.claim, folder)} |" for j in judgements]
    return ["| question | we find | chapter |", "|---|---|---|", *rows]


def _we_find(judgement: Judgement, ledger: Ledger) -> str:
    return f"**{judgement.verdict}**: {found(judgement, ledger, verdicts=judgement.verdict == MIXED)}"


def _link(claim: Claim, folder: str) -> str:
    chapter = next(iter(book().glob(f"{claim.chapter:02}_*.ipynb")), None)
    return f"[{claim.chapter}]({folder}{chapter.name})" if chapter else str(claim.chapter)


def seeds_so_far(judgements: Iterable[Judgement], ledger: Ledger) -> str:
    """How many seeds of the sets of runs that claims are about are recorded, of how many that are planned."""
    found: dict[str, int] = {}
    for judgement in judgements:
        for dataset in judgement.claim.datasets:
            here = [len(e.values) for e in judgement.estimates if e.dataset == dataset]
            found[dataset] = max([found.get(dataset, 0), *here])
    planned = {name: ledger.runs[name].seeds for name in found}
    less = [f"{ledger.runs[name].short} {n} of {planned[name]}" for name, n in found.items() if n < planned[name]]
    complete = f"{len(found) - len(less)} of {len(found)} planned sets have all their seeds"
    return f"{complete}; {', '.join(less)}" if less else complete


def table(judgements: Iterable[Judgement], ledger: Ledger) -> str:
    """The ledger whole, as a Markdown table."""
    lines = ["| claim | where | reproduced means | found | verdict |", "|---|---|---|---|---|"]
    for j in judgements:
        c = j.claim
        named = c.source.where if c.source.where.startswith("v") else f"{c.source.version}, {c.source.where}"
        where = f"our question: {c.ours}" if c.ours else named
        seen = f"exploratory: {c.exploratory}" if c.exploratory else ""
        quantity = ", ".join(str(v) for v in c.quantity.values())
        formerly = "".join(f"; formerly {f.criterion}, changed because {f.reason}" for f in c.former)
        overfits = ", of seeds that overfit" if c.only_overfitted else ""
        criterion = f"{quantity}: {c.criterion}{overfits}{formerly}"
        lines.append(f"| {c.title} | {where} | {criterion} | {found(j, ledger)} | **{j.verdict}** {seen} |")
    return "\n".join(lines)


def box(judgements: Iterable[Judgement], chapter: int) -> str:
    """The claims of one chapter and their verdicts, as the Markdown table at its head."""
    rows = [f"| {j.claim.title} | **{j.verdict}**{_mark(j.claim)} |" for j in judgements if j.claim.chapter == chapter]
    return "\n".join(["| claim judged here | verdict |", "|---|---|", *rows])


def said(judgements: Iterable[Judgement], ledger: Ledger, *ids: str) -> str:
    """What the recorded runs say about some claims, as a Markdown list: verdict, criterion, estimates."""
    chosen = [next(j for j in judgements if j.claim.id == i) for i in ids]
    return "\n".join(
        f"* {j.claim.title}: **{j.verdict}**{_mark(j.claim)}. {found(j, ledger)}; reproduced means {j.claim.criterion}."
        for j in chosen
    )


def _mark(claim: Claim) -> str:
    return " (exploratory)" if claim.exploratory else ""
