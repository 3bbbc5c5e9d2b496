"""The page on measuring one's own network: its code runs in order, its errors are the real ones, its commands exist."""

import re
import shlex
import shutil
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from stiffkit._torchvision import import_torchvision

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book/own_network.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def announced(block):
    """The error that the last line of a block announces, or (None, "")."""
    found = re.search(r"^# (\w+(?:Error|Warning)): (.+)\Z", block.strip(), flags=re.MULTILINE)
    return found.groups() if found else (None, "")


def outcome(block, namespace):
    """The error that a block ends with, or None, and the warnings that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(compile(block, "book/own_network.md", "exec"), namespace)
        except Exception as error:
            return error, caught
    return None, caught


@pytest.fixture(scope="module")
def outcomes():
    """[(block, the error it ended with, its warnings)], run in the page's order in one namespace, and that."""
    with suppress(ImportError):  # transformers does without torchvision, but not with one that fails to import
        import_torchvision()
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ran = [(block, *outcome(block, namespace)) for block in blocks(PAGE, "python")]
    return ran, namespace


def test_every_block_runs_or_fails_as_it_says(outcomes):
    for block, error, _ in outcomes[0]:
        kind, message = announced(block)
        ended = f"{type(error).__name__}: {error}"
        if kind is None:
            assert error is None, f"{ended}\n{block}"
        else:
            assert type(error).__name__ == kind, f"{ended}\n{block}"
            assert message in str(error), f"{ended}\n{block}"


def test_the_page_shows_the_mistakes_that_it_has_to(outcomes):
    errors = [announced(block) for block, _, _ in outcomes[0] if announced(block)[0]]
    assert len(errors) >= 4
    for words in ("one loss a point", "train mode", "NaN", "not a set with itself"):
        assert any(words in message for _, message in errors), words


def test_no_block_warns_but_that_it_is_slow(outcomes):
    """BERT with an attention mask goes point by point with some versions of transformers."""
    texts = [str(warning.message) for _, _, caught in outcomes[0] for warning in caught]
    assert not [text for text in texts if "every point is differentiated on its own" not in text]


def test_announced_errors_are_read_as_they_are_written():
    assert announced("int('a')\n# ValueError: invalid literal\n") == ("ValueError", "invalid literal")
    assert announced("x = 1  # ValueError: no\ny = 2\n") == (None, "")
    assert isinstance(outcome("int('a')", {})[0], ValueError)


def test_the_names_on_the_page_are_what_it_says(outcomes):
    _, names = outcomes
    assert names["S"].shape == (200, 100)
    assert names["C"].dims == ("class_a", "class_b")
    assert names["gram"].cos.shape == (200, 200)
    assert names["y"][names["index"]].bincount().tolist() == [10] * 10


def test_the_page_covers_what_it_has_to():
    code = "".join(blocks(PAGE, "python"))
    wanted = ("DataLoader", "weight=", "F.cross_entropy", "transformers", "cuda", "x_val", "bootstrap_error")
    assert not [words for words in wanted if words not in code]
    assert not [words for words in ("at initialisation", "after one epoch", "How sure is one") if words not in PAGE]


def test_the_errors_of_the_bootstrap_are_small_numbers(outcomes):
    _, names = outcomes
    errors = names["bootstrap_error"](names["stiffkit"].stiffness(names["gram"], "cos"), names["y"])
    assert 0 < float(errors.between) < 0.5
    assert 0 < float(errors.within) < 0.5


def commands(page):
    lines = [line.strip() for block in blocks(page, "console") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("command", commands(PAGE))
def test_console_commands_are_of_programs_that_exist(command):
    program = shlex.split(command)[0]
    assert re.match(r"(\.venv/bin/\w+|pip|git|python)\Z", program)
    name = program.removeprefix(".venv/bin/")
    assert shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def test_readmes_three_lines_run(outcomes):
    (block,) = blocks(README, "python")
    names = {name: outcomes[1][name] for name in ("stiffkit", "nn", "model", "x", "y")}
    assert outcome(block, names)[0] is None
    assert names["C"].shape == (10, 10)
