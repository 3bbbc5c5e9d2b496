"""Pairs of sentences: what files are read as, and that labels of the generated ones follow from logic."""

import gzip
import json
import sys

import numpy as np
import pytest

from stiffkit.sentences import (
    ACTIONS,
    KINDS,
    QUANTIFIERS,
    RELATIONS,
    Statement,
    checksum,
    fetch,
    load_pairs,
    read_pairs,
    relation,
    statements,
    toy_nli,
)

LINES = [
    {"gold_label": "neutral", "sentence1": "A man eats.", "sentence2": "He is hungry.", "genre": "fiction"},
    {"gold_label": "entailment", "sentence1": "Zwei Bäume.", "sentence2": "Bäume.\n"},
    {"gold_label": "contradiction", "sentence1": "It rains.", "sentence2": "It is dry."},
]


def written(path, lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


# Files


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_pairs_are_read_in_their_order(tmp_path, name):
    found = read_pairs(written(tmp_path / name, LINES))
    assert found.sentences == [("A man eats.", "He is hungry."), ("Zwei Bäume.", "Bäume."), ("It rains.", "It is dry.")]
    assert [RELATIONS[k] for k in found.labels] == ["neutral", "entailment", "contradiction"]
    assert found.labels.dtype == np.int64
    assert (len(found), found.skipped) == (3, {})


def test_lines_of_no_use_are_left_out_and_counted(tmp_path):
    bad = [
        "{",
        "[1, 2]",
        "3",
        {"gold_label": "neutral", "sentence1": "A."},
        {"gold_label": "neutral", "sentence1": "A.", "sentence2": None},
        {"gold_label": "-", "sentence1": "A.", "sentence2": "B."},
        {"gold_label": "hidden", "sentence1": "A.", "sentence2": "B."},
        {"gold_label": "neutral", "sentence1": " ", "sentence2": "B."},
    ]
    found = read_pairs(written(tmp_path / "a.jsonl", [*bad[:4], *LINES, *bad[4:]]))
    assert len(found) == 3
    assert found.skipped == {
        "unreadable": 5,
        "without agreement": 1,
        "with another label": 1,
        "with an empty sentence": 1,
    }


def test_a_file_without_a_line_of_use_is_an_error_that_says_what_was_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl has no line .*\(2 without agreement, 1 unreadable\)"):
        read_pairs(
            written(tmp_path / "a.jsonl", [{**LINES[0], "gold_label": "-"}, "x", {**LINES[1], "gold_label": "-"}])
        )
    with pytest.raises(ValueError, match="it is empty"):
        read_pairs(written(tmp_path / "b.jsonl", []))


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not compressed")
    whole = written(tmp_path / "c.jsonl.gz", LINES * 50).read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d.jsonl.gz").write_bytes(whole[:40] + bytes(b ^ 0xFF for b in whole[40:60]) + whole[60:])
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.gz", "d.jsonl.gz"):
        with pytest.raises(ValueError, match=f"{name} is not a file of JSON lines"):
            read_pairs(tmp_path / name)


# MNLI


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STIFFKIT_DATA", str(tmp_path))
    (tmp_path / "mnli").mkdir()
    return tmp_path / "mnli"


def many(n, prefix):
    labels = ["entailment", "neutral", "contradiction"]
    return [{"gold_label": labels[k % 3], "sentence1": f"{prefix} {k}", "sentence2": "B."} for k in range(n)]


def test_mnli_is_read_from_its_folder_and_its_matched_set_is_halved(folder):
    written(folder / "train.jsonl", many(9, "train"))
    written(folder / "dev_matched.jsonl.gz", [*many(12, "dev"), "bad"])
    parts = load_pairs("mnli")
    assert {name: len(pairs) for name, pairs in parts.items()} == {"train": 9, "validation": 6, "test": 6}
    for part in ("validation", "test"):
        assert np.bincount(parts[part].labels).tolist() == [2, 2, 2]
        assert parts[part].skipped == {"unreadable": 1}
    halves = [set(parts[part].sentences) for part in ("validation", "test")]
    assert not halves[0] & halves[1]
    again = load_pairs("mnli")
    assert checksum(again) == checksum(parts)
    written(folder / "train.jsonl", [*many(8, "train"), {**LINES[0]}])
    assert checksum(load_pairs("mnli")) != checksum(parts)


class Hub:
    """Stands for Hugging Face's datasets."""

    def __init__(self, monkeypatch, fails_at=""):
        self.asked, self.fails_at = [], fails_at
        monkeypatch.setitem(sys.modules, "datasets", self)

    def load_dataset(self, name, revision, split):
        self.asked.append((name, revision, split))
        if split == self.fails_at:
            raise ConnectionError("429 Too Many Requests")
        return [{"label": k, "premise": f"{split} é", "hypothesis": "B."} for k in (0, 1, 2, -1)]


def test_mnli_is_fetched_once_from_a_pinned_revision(folder, monkeypatch):
    hub = Hub(monkeypatch)
    train, matched = fetch()
    assert [name for name, *_ in hub.asked] == ["nyu-mll/multi_nli"] * 2
    assert {len(revision) for _, revision, _ in hub.asked} == {40}
    assert [split for *_, split in hub.asked] == ["train", "validation_matched"]
    found = read_pairs(train)
    assert (found.sentences[0], found.labels.tolist()) == (("train é", "B."), [0, 1, 2])
    assert found.skipped == {"without agreement": 1}
    assert fetch() == [train, matched]
    assert len(hub.asked) == 2
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [matched.name, train.name]


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_a_file_that_is_there_is_left_alone(folder, monkeypatch, name):
    hub = Hub(monkeypatch)
    before = written(folder / name, many(9, "mine")).read_bytes()
    train, _ = fetch()
    assert (train.name, train.read_bytes()) == (name, before)
    assert [split for *_, split in hub.asked] == ["validation_matched"]


def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(folder, monkeypatch):
    Hub(monkeypatch, fails_at="validation_matched")
    with pytest.raises(FileNotFoundError, match=r"429 Too Many Requests.*train\.jsonl and dev_matched\.jsonl.*toy_nli"):
        fetch()
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == []
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'stiffkit\[text\]'.*STIFFKIT_DATA"):
        load_pairs("mnli")


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match=r"'snli'\. Known are toy_nli, mnli"):
        load_pairs("snli")
    assert list(load_pairs("toy_nli")) == ["train", "validation", "test"]


# Logic


def parsed(sentence):
    """What a sentence of the generated set says, read from its words."""
    quantifier = next(q for q in ("not all", "all", "some", "no") if sentence.startswith(f"{q} "))
    rest = sentence.removeprefix(f"{quantifier} ")
    who, what = rest.split(" ", 1)
    positive = not what.startswith("do not ")
    return quantifier, who, what.removeprefix("do not "), positive


def true_in(people, sentence):
    """Whether it holds of individuals, {name: (the groups it is in, the actions that it does)}."""
    quantifier, who, what, positive = parsed(sentence)
    does = [(what in actions) == positive for groups, actions in people if who in groups]
    if quantifier == "all":
        return False not in does
    if quantifier == "not all":
        return False in does
    return (True in does) == (quantifier == "some")


def worlds(random, count=4000):
    """Random crowds of animals, a dog among them, who run, only move, or neither."""
    sorts = [({"animals"} | more, does) for more in (set(), {"dogs"}) for does in (set(), {"move"}, {"move", "run"})]
    for _ in range(count):
        crowd = [sorts[k] for k in random.integers(0, 6, random.integers(1, 7))]
        if any("dogs" in groups for groups, _ in crowd):
            yield crowd


def test_labels_are_what_holds_in_random_crowds():
    crowds = list(worlds(np.random.default_rng(0)))
    every = {s: s.said("animals", "dogs", "move", "run") for s in statements()}
    truth = {s: np.array([true_in(crowd, text) for crowd in crowds]) for s, text in every.items()}
    for premise, here in truth.items():
        for hypothesis, there in truth.items():
            follows = there[here]
            expected = "entailment" if follows.all() else "neutral" if follows.any() else "contradiction"
            assert RELATIONS[relation(premise, hypothesis)] == expected, (every[premise], every[hypothesis])


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        (("all", 0, 1, True), ("all", 1, 0, True), "entailment"),  # all animals run: all dogs move
        (("all", 1, 0, True), ("all", 0, 1, True), "neutral"),
        (("no", 0, 0, True), ("some", 1, 1, True), "contradiction"),  # no animals move: some dogs run
        (("some", 1, 1, False), ("not all", 0, 1, True), "entailment"),  # some dogs do not run: not all animals run
        (("no", 1, 1, False), ("all", 1, 1, True), "entailment"),  # no dogs do not run: all dogs run
        (("not all", 0, 0, True), ("all", 1, 1, True), "neutral"),
    ],
)
def test_labels_that_a_reader_can_check(premise, hypothesis, expected):
    assert RELATIONS[relation(Statement(*premise), Statement(*hypothesis))] == expected


# The generated set


def test_the_generated_set_is_balanced_and_its_parts_share_no_pair():
    parts = toy_nli()
    assert {name: len(pairs) for name, pairs in parts.items()} == {"train": 1800, "validation": 600, "test": 600}
    every = [pair for pairs in parts.values() for pair in pairs.sentences]
    assert len(set(every)) == len(every)
    for pairs in parts.values():
        assert np.bincount(pairs.labels).tolist() == [len(pairs) // 3] * 3
        words = " ".join(" ".join(pair) for pair in pairs.sentences)
        assert all(word in words for word in [*KINDS, *ACTIONS, *QUANTIFIERS])
        assert all(word in words for group in [*KINDS.values(), *ACTIONS.values()] for word in group)


def test_the_generated_set_is_always_the_same():
    first, again = toy_nli(), toy_nli()
    assert [first[part].sentences for part in first] == [again[part].sentences for part in again]
    assert first["train"].sentences[0] == ("no doctors do not turn", "some people turn"), "on every machine"


def test_the_generated_labels_are_those_of_their_sentences():
    for premise, hypothesis in (pair for pairs in toy_nli().values() for pair in pairs.sentences):
        (_, who, what, _), (_, who2, what2, _) = parsed(premise), parsed(hypothesis)
        assert any({who, who2} <= {kind, group} for kind, groups in KINDS.items() for group in groups)
        assert any({what, what2} <= {action, one} for action, more in ACTIONS.items() for one in more)
