"""Parameters of the chapters: what is refused and how, what is announced; chapter 1's results; real papermill runs."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import nbformat
import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from hypothesis import given
from hypothesis import strategies as st
from oracles import loop_gram
from pydantic import Field
from torch import nn

from stiffkit import class_stiffness, data, definition, rerun
from stiffkit.chapters import (
    Chapter,
    ClassMatrices,
    CriticalLength,
    Definition,
    LearningRate,
    NetworkOrArithmetic,
    ParameterError,
    RandomLabels,
    Superclasses,
    TooLongError,
    book,
    rounded,
)
from stiffkit.models import build_model

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "book/01_definition.ipynb"
CHAPTERS = {
    NOTEBOOK: Definition,
    "book/02_class_matrices.ipynb": ClassMatrices,
    "book/03_random_labels.ipynb": RandomLabels,
    "book/04_superclasses.ipynb": Superclasses,
    "book/05_learning_rate.ipynb": LearningRate,
    "book/06_critical_length.ipynb": CriticalLength,
    "book/08_network_or_arithmetic.ipynb": NetworkOrArithmetic,
}
NAMES = "dataset", "model", "initialisation", "sphere", "points", "learning_rate", "seed", "max_minutes"


class Rates(Chapter):
    """A chapter with parameters that chapter 1 does not have."""

    number: ClassVar[int] = 42
    name: ClassVar[str] = "rates"

    rates: list[float] = Field([0.1])
    words: tuple[str, ...] = ()
    epochs: int = Field(3, gt=0)
    max_minutes: float = Field(2.0, gt=0)

    @property
    def minutes(self):
        return float(self.epochs)


def refused(chapter=Definition, **values):
    """The message of what is refused."""
    with pytest.raises(ParameterError) as caught:
        chapter.check(values)
    return str(caught.value)


# What is refused, and how


def test_an_unknown_name_is_refused_with_the_near_one_and_all_that_are_allowed():
    message = refused(datset="digits")
    assert "unknown parameter 'datset'" in message
    assert "did you mean 'dataset'" in message
    assert all(re.search(rf"\b{name}\b", message) for name in NAMES)


def test_an_unknown_name_that_is_like_none_is_refused_without_a_suggestion():
    message = refused(xyzzy=3)
    assert "'xyzzy'" in message
    assert "did you mean" not in message
    assert all(re.search(rf"\b{name}\b", message) for name in NAMES)


@pytest.mark.parametrize("name", ["points", "seed", "learning_rate", "max_minutes"])
@pytest.mark.parametrize("value", ["abc", "", "1,5", True, False, None, [3], "nan"])
def test_a_number_of_a_wrong_type_is_refused(name, value):
    message = refused(**{name: value})
    assert f"parameter {name!r} = {value!r}: " in message
    assert re.search(r"number|integer|greater", message)


@pytest.mark.parametrize(("name", "value"), [("points", 20.5), ("seed", "1.5"), ("points", "1e2x")])
def test_a_fraction_for_an_integer_is_refused(name, value):
    assert f"parameter {name!r} = {value!r}: " in refused(**{name: value})


@pytest.mark.parametrize("value", ["maybe", 2, None, 0.5])
def test_a_truth_value_of_a_wrong_type_is_refused(value):
    assert f"parameter 'sphere' = {value!r}: " in refused(sphere=value)


@pytest.mark.parametrize("name", ["dataset", "model", "initialisation"])
@pytest.mark.parametrize("value", ["minst", "", 5, None, True])
def test_a_word_that_is_not_known_is_refused(name, value):
    message = refused(**{name: value})
    assert f"parameter {name!r} = {value!r}: " in message
    known = {"dataset": Definition.datasets, "model": ("fc", "cnn", "cnn_v1"), "initialisation": ("keras", "torch")}
    assert not isinstance(value, str) or all(word in message for word in known[name])


@pytest.mark.parametrize(
    ("name", "value"),
    [("points", -10), ("seed", -1), ("learning_rate", 0), ("learning_rate", -1e-3), ("max_minutes", 0)],
)
def test_a_number_out_of_range_is_refused_with_the_range(name, value):
    message = refused(**{name: value})
    assert f"parameter {name!r} = {value!r}: " in message
    assert re.search(r"greater than (or equal to )?0", message)


@pytest.mark.parametrize("seed", [4_294_967, 2**70])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    assert "'seed'" in refused(seed=seed)


@pytest.mark.parametrize(
    ("dataset", "points", "largest"),
    [("digits", 290, 280), ("digits", 500, 280), ("digits", 25, 280), ("digits", 10, 280), ("mnist", 2010, 2000)],
)
def test_points_that_the_data_set_does_not_have_are_refused(dataset, points, largest):
    message = refused(dataset=dataset, points=points)
    assert f"'points' = {points}" in message
    assert dataset in message
    assert str(largest) in message


@pytest.mark.parametrize("points", [0, 20, 280])
def test_points_that_digits_has_are_taken(points):
    chosen = Definition.check({"dataset": "digits", "points": points})
    assert chosen.number_of_points == (points or 200)
    assert len(data.balanced_subset(data.load("digits").validation[1], chosen.number_of_points, 1)) == (points or 200)


def test_points_of_the_real_data_sets():
    for name in ("mnist", "fashion_mnist", "cifar10"):
        assert Definition.check({"dataset": name}).number_of_points == 500
        assert Definition.check({"dataset": name, "points": 2000}).number_of_points == 2000


def test_digits_are_too_small_for_the_network_of_the_first_version():
    message = refused(dataset="digits", model="cnn_v1")
    assert "'model' = 'cnn_v1'" in message
    assert "digits" in message
    assert "take fc or cnn" in message


def test_all_mistakes_are_named_at_once():
    message = refused(seed="abc", model="resnet", datset="digits")
    assert len(message.splitlines()) == 3
    assert all(repr(name) in message for name in ("seed", "model", "datset"))


def test_an_error_is_shown_without_a_traceback():
    error = TooLongError("too long")
    assert isinstance(error, ParameterError)
    assert isinstance(error, ValueError)
    assert error._render_traceback_() == ["TooLongError: too long"]


# What papermill gives


def test_numbers_may_be_strings():
    chosen = Definition.check({"points": "20", "seed": "5", "learning_rate": "1e-3", "max_minutes": "7"})
    assert (chosen.points, chosen.seed, chosen.learning_rate, chosen.max_minutes) == (20, 5, 1e-3, 7.0)
    assert [type(value) for value in (chosen.points, chosen.seed, chosen.learning_rate)] == [int, int, float]


@pytest.mark.parametrize(("value", "meant"), [("False", False), ("true", True), (0, False), (True, True)])
def test_truth_values_may_be_strings(value, meant):
    assert Definition.check({"sphere": value}).sphere is meant


@pytest.mark.parametrize("value", ["[1e-3, 0.5]", [1e-3, 0.5], ["1e-3", "0.5"], '["1e-3", 0.5]'])
def test_a_list_may_be_json(value):
    assert Rates.check({"rates": value}).rates == [1e-3, 0.5]


@pytest.mark.parametrize("value", ["[]", ""])
def test_an_empty_list_may_be_json_or_nothing(value):
    assert Rates.check({"rates": value}).rates == []


def test_a_list_of_words_and_a_tuple():
    assert Rates.check({"words": '["a", "b"]'}).words == ("a", "b")


@pytest.mark.parametrize("value", ["[1, 2", "5", '{"a": 1}', "abc", '["abc"]', 5])
def test_what_is_no_list_is_refused(value):
    assert "'rates'" in refused(Rates, rates=value)


def injected(**values):
    """The source of the cell that papermill adds."""
    from papermill.translators import translate_parameters

    return translate_parameters("python3", "python", values, "Parameters")


def namespace(*sources):
    """A notebook's globals after it has run these cells; a parameters cell has the defaults."""
    names = {}
    for source in sources:
        exec(source, names)
    return {**names, "In": ["", *sources], "Out": {}, "p": 3, "exit": exit}


DEFAULTS = 'dataset: str = "mnist"  # which\npoints: int = 0  # how many\nseed: int = 1  # of the weights\n'


def test_read_takes_the_parameters_cell_and_the_injected_one():
    assert Definition.read(namespace(DEFAULTS)) == Definition()
    chosen = Definition.read(namespace(DEFAULTS, injected(dataset="digits", points="20", learning_rate=1e-4)))
    assert chosen == Definition(dataset="digits", points=20, learning_rate=1e-4)


def test_read_when_the_parameters_cell_is_run_again():
    again = namespace(DEFAULTS, injected(dataset="digits"), DEFAULTS)
    assert Definition.read(again) == Definition()
    once_more = namespace(DEFAULTS, injected(dataset="digits"), DEFAULTS, injected(dataset="digits"))
    assert Definition.read(once_more) == Definition(dataset="digits")


def test_read_refuses_an_unknown_name_in_the_injected_cell():
    for sources in ([DEFAULTS, injected(datset="digits")], [DEFAULTS, injected(seed=2, datset=None), DEFAULTS]):
        with pytest.raises(ParameterError, match=r"'datset'.*did you mean 'dataset'"):
            Definition.read(namespace(*sources))


def test_read_refuses_a_wrong_value_in_the_injected_cell():
    with pytest.raises(ParameterError, match="'seed' = 'abc'"):
        Definition.read(namespace(DEFAULTS, injected(seed="abc")))


def test_read_leaves_other_names_alone():
    cell = DEFAULTS + "helper = 3\n_hidden = 4\n"
    assert Definition.read(namespace(cell, "import os\ndataset_name = 3", injected(seed=2))) == Definition(seed=2)


def test_read_after_a_person_has_corrected_the_injected_cell():
    wrong, right = injected(datset="digits"), injected(dataset="digits")
    assert Definition.read(namespace(DEFAULTS, wrong, right)) == Definition(dataset="digits")


def test_read_outside_a_notebook():
    assert Definition.read({"seed": 4, "other": 5}) == Definition(seed=4)


# What a re-run says, costs and is called


def displayed(monkeypatch, chapter):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *objects, **_: shown.extend(objects))
    chapter.announce()
    return " ".join(one.data for one in shown)


def test_announce_says_nothing_for_the_defaults(monkeypatch):
    assert displayed(monkeypatch, Definition()) == ""
    assert displayed(monkeypatch, Definition(max_minutes=60, seed=1)) == ""


def test_announce_names_what_was_changed_alone(monkeypatch):
    text = displayed(monkeypatch, Definition(dataset="digits", sphere=False, max_minutes=60))
    assert text.startswith("**You ran this chapter with `dataset` = `'digits'`, `sphere` = `False`.**")
    assert "max_minutes" not in text
    assert "the text around describes the defaults" in text


def test_identity_leaves_max_minutes_out_and_holds_all_else():
    assert Definition(max_minutes=60).identity == Definition().identity
    assert set(json.loads(Definition().identity)) == {*NAMES} - {"max_minutes"}
    changed = [{"dataset": "cifar10"}, {"model": "cnn"}, {"initialisation": "torch"}, {"sphere": False}]
    changed += [{"points": 20}, {"learning_rate": 1e-4}, {"seed": 2}]
    assert len({Definition(**change).identity for change in [{}, *changed]}) == 8


def test_parameters_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Definition().seed = 3


def test_the_book_is_beside_the_package_or_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    assert book() == ROOT / "book"
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Definition().recorded == tmp_path / "results" / "01_definition.nc"
    assert Rates().recorded == tmp_path / "results" / "42_rates.nc"


def test_too_long_says_how_long_how_to_look_quickly_and_how_to_allow_more():
    with pytest.raises(TooLongError) as caught:
        Rates(epochs=4, max_minutes=2).allow()
    message = str(caught.value)
    assert "4.0 minutes" in message
    assert "max_minutes allows 2." in message
    assert "stiffkit chapter 42 --profile quick -o out.html" in message
    (more,) = re.findall(r"-p max_minutes (\S+)", message)
    Rates(epochs=4, max_minutes=more.rstrip(".")).allow()


@pytest.mark.parametrize(
    ("dataset", "model"),
    sorted({*itertools.product(Definition.datasets, ("fc", "cnn", "cnn_v1"))} - {("digits", "cnn_v1")}),
)
def test_what_is_advised_to_allow_more_does(dataset, model):
    with pytest.raises(TooLongError) as caught:
        Definition(dataset=dataset, model=model, max_minutes=0.01).allow()
    (more,) = re.findall(r"-p max_minutes (\d+)", str(caught.value))
    Definition(dataset=dataset, model=model, max_minutes=more).allow()


def test_the_quick_command_works_as_it_is_printed(monkeypatch):
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    with pytest.raises(TooLongError) as caught:
        Definition(max_minutes=0.01).allow()
    (command,) = re.findall(r"For a quick look: (.+)$", str(caught.value))
    program, subcommand, number, *profile, _, out = shlex.split(command)
    assert shutil.which(ROOT / program), f"{program} from the root of the repository"
    assert (subcommand, profile, out) == ("chapter", ["--profile", "quick"], "out.html")
    assert Definition.check(rerun.given(rerun.find(number), "quick")).dataset == "digits"


def test_exactly_max_minutes_is_allowed():
    Rates(epochs=2, max_minutes=2).allow()
    with pytest.raises(TooLongError):
        Rates(epochs=3, max_minutes=2.999).allow()


def test_too_long_stops_before_anything_is_loaded_or_trained(monkeypatch):
    for name in ("load", "train", "build_model", "step_on_toy", "gradient_gram"):
        monkeypatch.setattr(definition, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    with pytest.raises(TooLongError):
        definition.results(Definition(dataset="digits", max_minutes=0.01))


def test_the_estimate_grows_with_what_is_asked_for():
    small, large = (Definition(dataset=name).minutes for name in ("digits", "mnist"))
    assert 0 < small < large < Definition().max_minutes
    assert large < Definition(points=2000).minutes < Definition(points=2000, model="cnn_v1").minutes


@given(st.floats(-1e9, 1e9), st.integers(0, 4))
def test_rounded_is_a_number_with_fixed_decimals_and_a_true_minus_sign(value, digits):
    text = rounded(value, digits)
    assert re.fullmatch(r"\N{MINUS SIGN}?\d+" + (rf"\.\d{{{digits}}}" if digits else ""), text)
    assert float(text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(value, abs=0.5000001 * 10**-digits, rel=1e-12)
    assert not re.fullmatch(r"\N{MINUS SIGN}0*\.?0*", text)


# Chapter 1: the recorded run


@pytest.fixture(scope="module")
def recorded():
    with xr.open_dataset(ROOT / "book/results/01_definition.nc", engine="h5netcdf") as stored:
        return stored.load()


def variables_of_the_text():
    """What chapter 1's cells take from the results, by name."""
    cells = "\n".join(cell.source for cell in nbformat.read(ROOT / NOTEBOOK, 4).cells if cell.cell_type == "code")
    by_dot = set(re.findall(r"\b(?:results|start|at|sign)\.([a-z]\w+)", cells))
    methods = {"sel", "isel", "sizes", "results", "where", "values", "to_series"}
    return by_dot - methods | {f"{name}_{what}" for name in ("within", "between") for what in ("error", "spread")}


def test_the_text_takes_what_this_test_thinks_it_takes():
    expected = {"stiffness", "agreement_adam", "output_cosine", "within_by_layer", "toy_change", "test_accuracy"}
    assert expected <= variables_of_the_text()


def assert_complete(results):
    assert not {name for name in variables_of_the_text() if name not in results.variables}
    assert not [name for name, array in results.data_vars.items() if bool(array.isnull().any())]
    assert dict(results.stiffness.sizes) == {"stage": 2, "measure": 2, "class_a": 10, "class_b": 10}
    for name in ("stiffness", "output_cosine", "last_layer_cosine", "within_by_layer", "between_by_layer"):
        assert float(abs(results[name]).max()) <= 1 + 1e-6
    for name in ("agreement", "agreement_adam", "same_sign_as_outputs", "test_accuracy", "toy_accuracy"):
        assert 0 <= float(results[name].min()) <= float(results[name].max()) <= 1


def test_the_defaults_are_read_and_not_measured(monkeypatch, recorded):
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    monkeypatch.setattr(definition, "measure", lambda p: pytest.fail("measured"))
    assert definition.results(Definition()).identical(recorded)
    assert definition.results(Definition(max_minutes=0.001)).identical(recorded)


@pytest.mark.parametrize("change", [{"dataset": "digits"}, {"seed": 2}, {"points": 200}, {"sphere": False}])
def test_a_recorded_run_of_other_parameters_is_not_used(monkeypatch, change):
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    monkeypatch.setattr(definition, "measure", lambda p: ("measured", p))
    assert definition.results(Definition(**change)) == ("measured", Definition(**change))


def test_without_a_recorded_run_the_defaults_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path))
    monkeypatch.setattr(definition, "measure", lambda p: "measured")
    assert definition.results(Definition()) == "measured"


def test_the_recorded_run_is_small_complete_and_in_float32(recorded):
    assert (ROOT / "book/results/01_definition.nc").stat().st_size < 3 * 2**20
    assert_complete(recorded)
    floats = {array.dtype for array in recorded.data_vars.values() if array.dtype.kind == "f"}
    assert floats == {np.dtype("float32")}


def test_the_recorded_run_says_where_it_comes_from(recorded):
    attributes = recorded.attrs
    assert json.loads(attributes["parameters"]) == json.loads(Definition().identity)
    assert re.fullmatch(r"[0-9a-f]{7,40}", attributes["commit"]), "recorded from a clean checkout"
    assert re.fullmatch(r"[0-9a-f]{64}", attributes["data_checksum"])
    assert re.fullmatch(r"\d+\.\d+.*", attributes["torch"])
    assert re.fullmatch(r"3\.\d+\.\d+", attributes["python"])
    assert attributes["device"]
    assert attributes["stiffkit"]
    assert attributes["seconds"] > 1
    assert attributes["threads"] >= 1
    assert attributes["peak_memory_mb"] > 100


def test_the_recorded_run_is_of_the_official_data(recorded):
    assert recorded.attrs["data_checksum"] == "09188002361db2d0c735b4c24c7f3b42b2ec471eb2d28af44306628fd69c65ec"


def test_the_recorded_class_matrices_count_500_points(recorded):
    assert recorded.pairs.values.tolist() == np.where(np.eye(10), 50 * 49, 50 * 50).tolist()
    assert recorded.class_name.values.tolist() == list("0123456789")


@pytest.mark.parametrize("place", [0, 1])
def test_recorded_first_order_holds_for_small_steps_and_not_for_large_ones(recorded, place):
    here = recorded.isel(stage=place)
    error = here.relative_error.sel(quantile=0.5)
    assert (error.sel(epsilon=slice(None, 1.1e-4)) < 1e-2).all()
    slope = np.log10(error.sel(epsilon=1e-2, method="nearest") / error.sel(epsilon=1e-5, method="nearest")) / 3
    assert float(slope) == pytest.approx(1, abs=0.3)
    assert float(here.agreement.sel(epsilon=1e-6, method="nearest")) > 0.999
    assert float(here.agreement_adam) < float(here.agreement.sel(epsilon=1e-3, method="nearest"))


def assert_start_is_the_losss(results):
    """PAPERS 6.3: what the class matrix is before training, by initialisation."""
    within, between = results.within_by_layer.sel(measure="sign"), results.between_by_layer.sel(measure="sign")
    assert (within.sel(layer="layer 4") == 1).all()
    assert (between.sel(layer="layer 4", setting=["keras, unit sphere", "torch, unit sphere"]) < -0.99).all()
    whole = between.sel(layer="whole")
    assert float(whole.sel(setting="keras, unit sphere")) < -0.4
    assert float(whole.sel(setting="torch, unit sphere")) < -0.95
    assert float(whole.sel(setting="keras, no sphere")) > float(whole.sel(setting="keras, unit sphere"))
    cosine = results.between_by_layer.sel(measure="cos", setting="torch, unit sphere", layer="whole")
    assert float(cosine) == pytest.approx(-1 / 9, abs=0.02)
    baseline = np.where(np.eye(10), 1, -1 / 9)
    np.testing.assert_allclose(results.output_cosine.isel(stage=0), baseline, atol=0.1)


def test_the_recorded_start_is_the_losss(recorded):
    assert_start_is_the_losss(recorded)
    sign = {"keras, unit sphere": -0.72, "keras, no sphere": -0.3, "torch, unit sphere": -1.0}
    found = recorded.between_by_layer.sel(measure="sign", layer="whole")
    assert {setting: float(found.sel(setting=setting)) for setting in sign} == pytest.approx(sign, abs=0.1)


# Chapter 1: measured on a few embedded points


@pytest.fixture(scope="module")
def tiny():
    p = Definition(dataset="digits", points=20, seed=3)
    return p, definition.measure(p)


def test_a_tiny_run_has_all_that_the_text_uses(tiny):
    _, results = tiny
    assert_complete(results)
    assert_start_is_the_losss(results)
    assert results.attrs["data_checksum"] == data.load("digits").checksum
    assert results.pairs.values.tolist() == np.where(np.eye(10), 2, 4).tolist()


def test_a_tiny_runs_first_matrix_is_that_of_the_loop(tiny):
    p, results = tiny
    digits = data.load("digits")
    x, y = digits.validation
    index = data.balanced_subset(y, 20, p.seed)
    reference = loop_gram(
        build_model("fc", digits, p.seed), nn.CrossEntropyLoss(reduction="none"), (x[index], y[index])
    )
    start = results.stiffness.sel(stage="before training")
    for measure, S in (("cos", reference.cos), ("sign", reference.cos.sign())):
        expected = class_stiffness(S.clone().fill_diagonal_(torch.nan), y[index])
        np.testing.assert_allclose(start.sel(measure=measure), expected, atol=1e-5)


def test_a_tiny_runs_layers_and_whole_network_agree(tiny):
    _, results = tiny
    whole = results.within_by_layer.sel(layer="whole", setting="keras, unit sphere")
    same = results.stiffness.isel(stage=0).where(results.class_a == results.class_b).mean(["class_a", "class_b"])
    np.testing.assert_allclose(whole, same, atol=1e-6)


def test_measuring_leaves_the_generators_alone(tiny):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    p = Definition(dataset="digits", points=20)
    definition._settings(p)
    assert torch.equal(torch.get_rng_state(), before)


# Commands that the pages print


def commands():
    pages = [ROOT / "README.md", *ROOT.glob("book/*.md"), *ROOT.glob("book/text/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return sorted(set(re.findall(r"(?:papermill book/\d\d|stiffkit chapter \d).*?(?=[`\n])", text)))


@pytest.mark.parametrize("command", commands())
def test_printed_commands_are_accepted(command):
    words = shlex.split(command)
    values = {words[k + 1]: words[k + 2] for k, word in enumerate(words) if word == "-p"}
    for file in (words[k + 1] for k, word in enumerate(words) if word == "-f"):
        values |= yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    if words[0] == "stiffkit":
        profile = words[words.index("--profile") + 1] if "--profile" in words else ""
        chapter = rerun.find(words[2])
        chapter.check(rerun.given(chapter, profile, pairs=values.items())).allow()
        return
    assert values
    assert (ROOT / words[1]).exists()
    CHAPTERS[words[1]].check(values).allow()


def test_some_commands_are_printed():
    assert {line.split()[0] for line in commands()} == {"papermill", "stiffkit"}


# Real papermill


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs at once, as a person starts them: (exit code, executed notebook, what was printed)."""
    folder = tmp_path_factory.mktemp("papermill")
    arguments = {
        "wrong": ["-p", "datset", "digits", "-p", "points", "abc"],
        "long": ["-p", "dataset", "digits", "-p", "max_minutes", "0.05"],
    }
    base = [sys.executable, "-m", "papermill", NOTEBOOK]
    started = {
        name: subprocess.Popen(
            [*base, str(folder / f"{name}.ipynb"), "-k", "python3", "--no-progress-bar", *more],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, more in arguments.items()
    }
    ended = {}
    for name, process in started.items():
        printed = process.communicate(timeout=300)[1]
        ended[name] = process.returncode, nbformat.read(folder / f"{name}.ipynb", 4), printed
    return ended


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("wrong", "ParameterError", ["'datset'", "did you mean 'dataset'", "'points' = 'abc'", "integer"]),
        ("long", "TooLongError", ["max_minutes allows 0.05", "-p max_minutes 1", "chapter 1 --profile quick"]),
    ],
)
def test_papermill_stops_at_the_validation_cell(runs, name, error, words):
    code, notebook, printed = runs[name]
    assert code == 1
    (shown,) = errors(notebook)
    assert shown.ename == error
    assert len(shown.traceback) == 1
    assert all(word in shown.evalue and word in printed for word in words)
    ran = [index for index, cell in enumerate(code_cells(notebook)) if cell.execution_count]
    assert "Definition.read" in code_cells(notebook)[ran[-1]].source
    assert not any(cell.outputs for cell in code_cells(notebook)[ran[-1] + 1 :])
