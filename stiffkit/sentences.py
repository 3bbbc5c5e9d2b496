"""Pairs of sentences with the relation between them: entailment, neutral, contradiction.

`toy_nli` is generated: its labels follow from logic. Pairs of MNLI (Williams et al. 2018) and of others in its form are
read from files.
"""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
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


class Statement(NamedTuple):
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
