"""Pairs of sentences with the relation between them: entailment, neutral, contradiction.

`toy_nli` is generated: its labels follow from logic. `mnli` (Williams et al. 2018) is read from `mnli/train.jsonl` and
`mnli/dev_matched.jsonl` in the folder of the data sets (`stiffkit.archives`), or `.jsonl.gz`, and fetched through
Hugging Face's datasets where they are missing. Any pairs will do that have the same form.
"""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from stiffkit.archives import data_folder, fixed_part

NAMES = ("toy_nli", "mnli")
HUB = ("nyu-mll/multi_nli", "da70db2af9d09693783c3320c4249840212ee221")  # and the revision that is fetched
FILES = {"train": "train", "dev_matched": "validation_matched"}  # and what the Hub calls them
RELATIONS = ("entailment", "neutral", "contradiction")  # by their number, as MNLI has them
KINDS = {  # what is a kind of what
    "animals": ("cats", "dogs", "horses", "rabbits"),
    "people": ("children", "doctors", "sailors", "singers"),
    "machines": ("cranes", "drones", "robots", "tractors"),
}
ACTIONS = {  # who does the latter does the former
    "move": ("jump", "run", "turn"),
    "rest": ("lie down", "sleep", "stand still"),
    "make noise": ("hum", "rattle", "roar"),
}
QUANTIFIERS = ("all", "some", "no", "not all")


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs of sentences.

    Attributes:
        sentences: premise and hypothesis of each.
        labels: the number of the relation in `RELATIONS`, shape (n,), int64.
        skipped: how many lines of a file were left out, by the reason.

    """

    sentences: list[tuple[str, str]]
    labels: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


def load_pairs(name: str) -> dict[str, Pairs]:
    """Load train, validation and test pairs of a set; files that are missing are fetched first.

    Of MNLI validation and test are the two halves of the matched development set, label by label, drawn once for all:
    the labels of its test set are not public.

    Raises:
        ValueError: an unknown name, or a file without a line of use.
        FileNotFoundError: a file is missing and cannot be fetched.
        ImportError: it is missing, and Hugging Face's datasets is not installed.

    """
    if name not in NAMES:
        raise ValueError(f"there is no set of sentence pairs {name!r}. Known are {', '.join(NAMES)}")
    if name == "toy_nli":
        return toy_nli()
    train, matched = (read_pairs(path) for path in fetch())
    first = fixed_part(matched.labels, 2)
    return {"train": train, "validation": _chosen(matched, first), "test": _chosen(matched, ~first)}


def _chosen(pairs: Pairs, mask: np.ndarray) -> Pairs:
    sentences = [pair for pair, chosen in zip(pairs.sentences, mask, strict=True) if chosen]
    return Pairs(sentences, pairs.labels[mask], pairs.skipped)


def checksum(parts: Mapping[str, Pairs]) -> str:
    """The SHA-256 of all sentences and labels, in their order."""
    digest = hashlib.sha256()
    for part, pairs in parts.items():
        rows = [[*pair, int(label)] for pair, label in zip(pairs.sentences, pairs.labels, strict=True)]
        digest.update(json.dumps([part, rows]).encode())
    return digest.hexdigest()


def fetch() -> list[Path]:
    """Make sure that the files of MNLI are there, and return their paths. Files that are there are left alone.

    Raises:
        FileNotFoundError: the download failed.
        ImportError: Hugging Face's datasets is not installed.

    """
    folder = data_folder() / "mnli"
    if None not in (found := _files(folder)):
        return found
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if None in _files(folder):
            _fetch_into(folder)
    return _files(folder)


def _files(folder: Path) -> list[Path | None]:
    return [_file(folder, part) for part in FILES]


def count_of_mnli() -> int | None:
    """How many training pairs of MNLI there are, so far as they are here; None where they have to be fetched."""
    path = _file(data_folder() / "mnli", "train")
    return path and _count(path, path.stat().st_mtime_ns)


@cache
def _count(path: Path, changed: int) -> int:
    return len(read_pairs(path))


def _file(folder: Path, part: str) -> Path | None:
    return next((path for end in ("jsonl", "jsonl.gz") if (path := folder / f"{part}.{end}").is_file()), None)


def _fetch_into(folder: Path) -> None:
    how = (
        f"Put train.jsonl and dev_matched.jsonl, with gold_label, sentence1 and sentence2 in each line, into {folder} "
        "(another place: set STIFFKIT_DATA), or take the embedded toy_nli."
    )
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"MNLI is not here, and fetching it needs datasets (pip install 'stiffkit[text]'). {how}"
        ) from None
    unpacked = folder / ".part"
    shutil.rmtree(unpacked, ignore_errors=True)  # what a killed process left: whoever is here holds the lock
    unpacked.mkdir()
    try:
        missing = [part for part in FILES if _file(folder, part) is None]
        for part in missing:
            rows = load_dataset(HUB[0], revision=HUB[1], split=FILES[part])
            with gzip.open(unpacked / f"{part}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(_line(row)) + "\n" for row in rows)
        for part in missing:
            os.replace(unpacked / f"{part}.jsonl.gz", folder / f"{part}.jsonl.gz")
    except Exception as error:  # of many libraries below
        raise FileNotFoundError(f"MNLI is not here and could not be fetched ({error}). {how}") from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _line(row: Mapping[str, Any]) -> dict[str, str]:
    label = RELATIONS[row["label"]] if row["label"] in range(len(RELATIONS)) else "-"
    return {"gold_label": label, "sentence1": row["premise"], "sentence2": row["hypothesis"]}


def read_pairs(path: Path) -> Pairs:
    """Read pairs from a file of JSON lines, plain or compressed (`.gz`), as MNLI is published.

    Each line has `gold_label`, `sentence1` and `sentence2`. Lines that cannot be read, whose annotators did not agree
    (the label "-"), whose label is another, or with an empty sentence are left out and counted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no line is of use, or the file is not text.

    """
    skipped: Counter[str] = Counter()
    sentences, labels = [], []
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                found = _pair(line)
                if isinstance(found, str):
                    skipped[found] += 1
                else:
                    sentences.append(found[:2])
                    labels.append(found[2])
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a file of JSON lines: {error}") from None
    if not labels:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise ValueError(f"{path} has no line with gold_label, sentence1 and sentence2 that is of use ({reasons})")
    return Pairs(sentences, np.array(labels, dtype=np.int64), dict(skipped))


def _pair(line: str) -> tuple[str, str, int] | str:
    """The two sentences and the label of a line, or why it is of no use."""
    try:
        entry: dict[str, Any] = json.loads(line)
        label, *sentences = (entry[key].strip() for key in ("gold_label", "sentence1", "sentence2"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "unreadable"
    if label == "-":
        return "without agreement"
    if label not in RELATIONS:
        return "with another label"
    return (*sentences, RELATIONS.index(label)) if all(sentences) else "with an empty sentence"


@dataclass(frozen=True)
class Statement:
    """What a sentence says: how many of a group do something, or do not.

    Attributes:
        quantifier: one of `QUANTIFIERS`.
        group: 0 the kind, 1 the narrower group.
        action: 0 the broader action, 1 the narrower.
        positive: do it, not do not.

    """

    quantifier: str
    group: int
    action: int
    positive: bool

    def holds(self, world: tuple[tuple[int, int], ...]) -> bool:
        """Whether it is true in a world: of each sort of individual that exists, how narrow a group and an action."""
        true = [(action >= self.action + 1) == self.positive for group, action in world if group >= self.group]
        return {"all": all(true), "some": any(true), "no": not any(true), "not all": not all(true)}[self.quantifier]

    def said(self, kind: str, narrower: str, action: str, narrower_action: str) -> str:
        """The sentence in English, with these words."""
        who, what = (kind, narrower)[self.group], (action, narrower_action)[self.action]
        return f"{self.quantifier} {who} {'' if self.positive else 'do not '}{what}"


def _worlds() -> Iterator[tuple[tuple[int, int], ...]]:
    """Every set of sorts of individuals in which somebody of the narrower group exists.

    A sort is in the narrower group (1) or not (0), and does neither action (0), the broader alone (1) or both (2).
    """
    sorts = list(product((0, 1), (0, 1, 2)))
    for there in product((False, True), repeat=len(sorts)):
        world = tuple(sort for sort, is_there in zip(sorts, there, strict=True) if is_there)
        if any(group == 1 for group, _ in world):
            yield world


@cache
def relation(premise: Statement, hypothesis: Statement) -> int:
    """Entailment where the hypothesis holds in every world in which the premise does, contradiction where in none.

    >>> RELATIONS[relation(Statement("all", 0, 1, True), Statement("some", 1, 0, True))]
    'entailment'

    All animals run: some dogs move.
    """
    found = {hypothesis.holds(world) for world in _worlds() if premise.holds(world)}
    return 1 if len(found) == 2 else 0 if found == {True} else 2


def statements() -> list[Statement]:
    """All of them."""
    return [Statement(*s) for s in product(QUANTIFIERS, (0, 1), (0, 1), (True, False))]


def toy_nli() -> dict[str, Pairs]:
    """Generated pairs with quantifiers and negation: train (1,800), validation and test (600 each).

    Each speaks of a kind and a narrower group ("animals", "dogs"), and of an action and a narrower one ("move", "run").
    The label is what follows from the premise wherever the narrower group is not empty. A third of each part has each
    label; no pair is in two parts. Every part has all groups and actions, so that what is learnt is logic, not words.
    """
    by_label: dict[int, list[tuple[Statement, Statement]]] = {k: [] for k in range(len(RELATIONS))}
    for premise, hypothesis in product(statements(), repeat=2):
        if premise != hypothesis:
            by_label[relation(premise, hypothesis)].append((premise, hypothesis))
    words = [
        (kind, narrower, action, narrower_action)
        for kind, groups in KINDS.items()
        for narrower in groups
        for action, narrower_actions in ACTIONS.items()
        for narrower_action in narrower_actions
    ]
    random = np.random.RandomState(0)  # the one generator whose stream NumPy promises never to change
    each = {"train": 600, "validation": 200, "test": 200}
    drawn = {label: _different(random, forms, words, sum(each.values())) for label, forms in by_label.items()}
    parts, begin = {}, 0
    for part, size in each.items():
        chosen = [(pair, label) for label, pairs in drawn.items() for pair in pairs[begin : begin + size]]
        parts[part] = Pairs([pair for pair, _ in chosen], np.array([label for _, label in chosen], dtype=np.int64))
        begin += size
    return parts


def _different(
    random: np.random.RandomState,
    forms: list[tuple[Statement, Statement]],
    words: list[tuple[str, str, str, str]],
    size: int,
) -> list[tuple[str, str]]:
    """That many different pairs of sentences."""
    found: dict[tuple[str, str], None] = {}
    while len(found) < size:
        premise, hypothesis = forms[random.randint(len(forms))]
        chosen = words[random.randint(len(words))]
        found[premise.said(*chosen), hypothesis.said(*chosen)] = None
    return list(found)
