"""What the library shows of itself: docstrings, type hints, doctests, and what importing it brings along."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing

import pydantic
import pytest

import stiffkit

MODULES = sorted(
    f"stiffkit.{module.name}" for module in pkgutil.iter_modules(stiffkit.__path__) if module.name != "__main__"
)
HEAVY = ["seaborn", "matplotlib", "sklearn", "torchvision", "transformers", "typer", "h5netcdf", "IPython", "papermill"]


def public(module):
    """{name: object} of the functions and classes that a module defines, and of their methods."""
    found = {}
    for name, value in vars(importlib.import_module(module)).items():
        ours = getattr(value, "__module__", None) == module and (inspect.isfunction(value) or inspect.isclass(value))
        if ours and not name.startswith("_"):
            found[name] = value
            if inspect.isclass(value):
                found |= {f"{name}.{method}": member for method, member in members(value).items()}
    return found


def members(cls):
    """The public methods and properties that a class itself defines, as functions."""
    unwrapped = {name: getattr(member, "__func__", member) for name, member in vars(cls).items()}
    functions = {name: member.fget if isinstance(member, property) else member for name, member in unwrapped.items()}
    return {name: f for name, f in functions.items() if inspect.isfunction(f) and not name.startswith("_")}


OBJECTS = [pytest.param(value, id=f"{module}.{name}") for module in MODULES for name, value in public(module).items()]
FUNCTIONS = [case for case in OBJECTS if inspect.isfunction(case.values[0])]


def test_the_list_holds_the_librarys_own_names():
    names = {case.id for case in OBJECTS}
    assert {"stiffkit.gradients.gradient_gram", "stiffkit.gradients.GradientGram.block", "stiffkit.data.load"} <= names
    assert {"stiffkit.training.train", "stiffkit.chapters.Chapter.minutes", "stiffkit.plots.step_map"} <= names
    assert len(stiffkit.__all__) < 20


def test_all_is_sorted_and_true():
    assert stiffkit.__all__ == sorted(stiffkit.__all__)
    assert all(hasattr(stiffkit, name) for name in stiffkit.__all__)


@pytest.mark.parametrize("name", stiffkit.__all__)
def test_names_of_all_are_explained(name):
    value = getattr(stiffkit, name)
    assert len(inspect.getdoc(value)) > 60
    assert value.__doc__.strip().splitlines()[0].endswith((".", ":")) or "$" in value.__doc__


def own_docstring(thing):
    """The docstring that was written; dataclasses and pydantic would lend one."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    lent = inspect.isclass(thing) and (text or "").startswith(f"{thing.__name__}(")
    return "" if lent or text is None else text


@pytest.mark.parametrize("thing", OBJECTS)
def test_public_names_have_a_docstring(thing):
    assert len(own_docstring(thing).split()) >= 3


@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_functions_have_type_hints(function):
    signature = inspect.signature(function)
    hinted = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    assert not [p.name for p in hinted if p.annotation is inspect.Parameter.empty]
    assert signature.return_annotation is not inspect.Signature.empty
    typing.get_type_hints(inspect.unwrap(function))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_docstring_with_arguments_explains_each_of_them(function):
    parts = (function.__doc__ or "").partition("Args:")[2].partition("Returns:")[0].partition("Raises:")[0]
    if parts:
        names = {name for name in inspect.signature(function).parameters if name not in ("self", "cls")}
        missing = {name for name in names if f"{name}:" not in parts and f"{name}," not in parts}
        assert not missing


def test_public_attributes_have_type_hints():
    classes = [case.values[0] for case in OBJECTS if inspect.isclass(case.values[0])]
    fields = [
        (cls, field.name) for cls in classes if dataclasses.is_dataclass(cls) for field in dataclasses.fields(cls)
    ]
    fields += [(cls, name) for cls in classes if issubclass(cls, pydantic.BaseModel) for name in cls.model_fields]
    assert len(fields) > 15
    assert all(name in typing.get_type_hints(cls) for cls, name in fields)


@pytest.mark.parametrize("module", ["stiffkit", *MODULES])
def test_modules_say_what_they_hold(module):
    assert len(importlib.import_module(module).__doc__.split()) >= 4


@pytest.mark.parametrize("module", ["stiffkit", *MODULES])
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(module), verbose=False)
    assert result.failed == 0


def test_there_are_doctests():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {
        module: sum(len(one.examples) for one in finder.find(importlib.import_module(module))) for module in MODULES
    }
    assert sum(count > 0 for count in found.values()) >= 4


def imported(statement):
    """Which heavy packages a fresh interpreter has after a statement."""
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_library_imports_nothing_that_only_parts_of_it_need():
    assert imported("import stiffkit, stiffkit.data, stiffkit.models, stiffkit.training, stiffkit.chapters") == []
