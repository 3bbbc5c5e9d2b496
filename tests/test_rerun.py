"""Chapters from the command line: what is listed and refused, what goes before what, failures, and pages."""

import json
import re
from pathlib import Path
from typing import ClassVar

import nbformat
import papermill
import pytest
from nbformat import v4
from pydantic import Field
from typer.testing import CliRunner

from stiffkit import rerun
from stiffkit.__main__ import app
from stiffkit.chapters import Chapter, ClassMatrices, ParameterError

ROOT = Path(__file__).resolve().parent.parent
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
TABLE = 'from IPython.display import Markdown\n\nMarkdown("| claim | verdict |\\n|---|---|\\n| a | mixed |")'


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A chapter with one parameter, whose second cell fails where that is zero."""
    monkeypatch.setenv("STIFFKIT_CACHE", str(tmp_path / "cache"))

    class Toy(Chapter):
        number: ClassVar[int] = 42
        name: ClassVar[str] = "toy"
        n: int = Field(3, description="how many")
        max_minutes: float = 1.0
        minutes: ClassVar[float] = 0.5
        notebook: ClassVar = tmp_path / "42_toy.ipynb"

    parameters = v4.new_code_cell("n: int = 3", metadata={"tags": ["parameters"]})
    shown = v4.new_code_cell("print(12 // n, 'each')", metadata={"tags": ["hide-input"]})
    cells = [v4.new_markdown_cell("# A toy"), parameters, shown, v4.new_code_cell(TABLE)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), Toy.notebook)
    return Toy


def run(*arguments):
    return CliRunner().invoke(app, ["chapter", *map(str, arguments)])


def test_without_a_name_the_chapters_and_without_an_output_the_parameters_are_listed():
    assert run().stdout.splitlines()[:2] == ["1  definition", "2  class_matrices"]
    listed = run("2", "--profile", "quick", "-p", "epochs", "4").stdout
    for name, field in ClassMatrices.model_fields.items():
        assert re.search(
            rf"^{name} +{field.annotation.__name__} .*{re.escape(field.description)}$", listed, re.MULTILINE
        )
    assert re.search(r"^epochs +float +0 +4 ", listed, re.MULTILINE), "-p goes before the profile"
    assert "profiles: quick, cifar10, cifar10_v3, fashion_mnist" in listed
    assert "minutes to compute" in listed


@pytest.mark.parametrize("name", ["2", "02", "class_matrices", "02_class_matrices", "02_class_matrices.ipynb"])
def test_a_chapter_has_several_names(name):
    assert rerun.find(name) is ClassMatrices


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["99"], "there is no chapter '99'; there are 1 (definition), 2 (class_matrices)"),
        (["2", "-p", "epoch", "3"], "did you mean 'epochs'"),
        (["2", "-p", "epochs", "many"], "'epochs' = 'many'"),
        (["2", "-p", "points", "15"], "multiples of 10"),
        (["2", "--profile", "slow"], "no profile 'slow'; there are quick, cifar10"),
        (["2", "-f", "none.yml"], "none.yml: No such file"),
        (["2", "-o", "out.pdf"], "ends in .ipynb or .html"),
        (["2", "-o", "none/out.html"], "its folder does not exist"),
        (["2", "-o", str(ROOT / "book/02_class_matrices.ipynb")], "the book's own folder is not written to"),
        (["2", "-p", "epochs=3", "-o", "out.html"], "a name and a value are wanted"),
        (["2", "-p", "epochs", "-o", "out.html"], "a name and a value are wanted"),
        (["-o", "out.html"], "a chapter is wanted"),
        (["2", "-p", "seeds", "40", "-o", "out.html"], "Nothing was computed. To allow it: -p max_minutes"),
        (["2", "-p", "epochs"], "a name and a value are wanted"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_computed(arguments, words, monkeypatch):
    monkeypatch.setattr(rerun, "_execute", None)
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert words in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert "Traceback" not in result.output


def test_single_parameters_go_before_those_of_a_file_and_these_before_a_profile(tmp_path):
    file = tmp_path / "own.yml"
    file.write_text("epochs: 5\nseeds: 1\n", encoding="utf-8")
    values = rerun.given(ClassMatrices, "quick", file, [("epochs", "7")])
    assert values == {"dataset": "digits", "max_minutes": 2, "points": 60, "epochs": "7", "seeds": 1}


@pytest.mark.parametrize("content", ["- 1\n", "a: [", "\x00", "1: 2"])
def test_a_file_without_parameters_is_refused(content, tmp_path):
    (tmp_path / "own.yml").write_text(content, encoding="utf-8")
    with pytest.raises(ParameterError, match=r"own\.yml"):
        rerun.given(ClassMatrices, file=tmp_path / "own.yml")


def test_a_page_is_one_file_with_what_was_run(toy, tmp_path):
    out = rerun.rerun(toy, {"n": "4"}, tmp_path / "out.html", progress=False)
    html = out.read_text(encoding="utf-8")
    assert "3 each" in html
    assert re.search(r"<td>\s*<p>mixed</p>|<td>mixed</td>", html), "a table, not its source"
    assert '<meta charset="utf-8"' in html
    assert not re.search(r'<link|<script|src="(?!data:)', html)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["42_toy.ipynb", "out.html"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("book/[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_on_the_page_of_a_chapter_formulas_and_references_are_resolved(path):
    html = rerun.page(path)
    assert '<pre class="math"' not in html
    assert "system-message" not in html
    text = re.sub(r"<[^>]*>", " ", html)
    assert re.search(r"[A-Z]\w+( et al\.| and [A-Z]\w+)?,? \(?20\d\d\)", text), "a citation"
    assert not re.search(r"fort2020|\b(fig|eq)-[a-z]|\\[a-z]{2}", text)


def test_pictures_are_in_the_page(tmp_path):
    picture = v4.new_output("display_data", data={"image/png": PIXEL})
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("draw()", outputs=[picture])]), tmp_path / "a.ipynb")
    assert f"data:image/png;base64,{PIXEL}" in rerun.page(tmp_path / "a.ipynb")


def kept_of(error, tmp_path):
    """The notebook that was kept, which the error names; what was there before is as it was."""
    assert str(tmp_path / "out.partly.ipynb") in error.__notes__[0]
    assert (tmp_path / "out.ipynb").read_text() == (tmp_path / "out.html").read_text() == "mine"
    return json.dumps(nbformat.read(tmp_path / "out.partly.ipynb", 4).cells)


@pytest.fixture
def earlier(tmp_path):
    for name in ("out.ipynb", "out.html"):
        (tmp_path / name).write_text("mine")


@pytest.mark.usefixtures("earlier")
@pytest.mark.parametrize("out", ["out.ipynb", "out.html"])
def test_where_a_cell_fails_the_notebook_is_kept_as_far_as_it_came(out, toy, tmp_path):
    with pytest.raises(rerun.ChapterError, match="ZeroDivisionError") as caught:
        rerun.rerun(toy, {"n": 0}, tmp_path / out, progress=False)
    kept = kept_of(caught.value, tmp_path)
    assert "n = 0" in kept
    assert "ZeroDivisionError" in kept


@pytest.mark.usefixtures("earlier")
def test_where_the_page_cannot_be_made_the_notebook_is_kept(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(rerun, "page", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        rerun.rerun(toy, {}, tmp_path / "out.html", progress=False)
    assert "4 each" in kept_of(caught.value, tmp_path)


@pytest.mark.usefixtures("earlier")
def test_a_kernel_that_dies_in_the_middle_is_not_started_again(toy, tmp_path):
    content = nbformat.read(toy.notebook, 4)
    content.cells[2].source = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\nimport os\nos._exit(1)"
    nbformat.write(content, toy.notebook)
    with pytest.raises(rerun.ChapterError, match="kernel died in the middle") as caught:
        rerun.rerun(toy, {}, tmp_path / "out.ipynb", progress=False)
    assert (tmp_path / "ran").read_text() == "x"
    kept_of(caught.value, tmp_path)


def test_ctrl_c_says_where_the_notebook_is(monkeypatch):
    def stopped(*_):
        error = KeyboardInterrupt()
        error.add_note("The notebook as far as it came is here")
        raise error

    monkeypatch.setattr(rerun, "rerun", stopped)
    result = run("1", "-o", "out.html")
    assert result.exit_code == 130
    assert "is here" in result.stderr


def test_without_the_book_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path))
    result = run("1", "-p", "dataset", "digits", "-o", tmp_path.parent / "out.html")
    assert result.exit_code == 1
    assert "chapters need a checkout of the book" in result.stderr


def test_a_kernel_that_loses_its_port_is_started_again_and_no_other_error_is_repeated(toy, tmp_path, monkeypatch):
    really, calls = papermill.execute_notebook, []

    def execute(*arguments, **options):
        calls.append(arguments)
        if len(calls) < rerun.ATTEMPTS:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return really(*arguments, **options)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    rerun.rerun(toy, {}, tmp_path / "out.ipynb", progress=False)
    assert len(calls) == rerun.ATTEMPTS
    calls.clear()
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: calls.append(1) or int("other"))
    with pytest.raises(ValueError, match="other"):
        rerun.rerun(toy, {}, tmp_path / "out.ipynb", progress=False)
    assert len(calls) == 1
