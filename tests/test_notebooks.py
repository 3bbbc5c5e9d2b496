"""Text and notebook in step, notebooks that can be compared, parameters, and the pages made from a run."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from jupytext.compare import NotebookDifference, compare_notebooks
from nbformat import v4

from stiffkit import claims

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "ci"))

import chapters  # noqa: E402
import live  # noqa: E402
import setup  # noqa: E402

NAMES = sorted({path.stem for path in [*ROOT.glob("book/*.ipynb"), *ROOT.glob("book/text/*.md")]})
CHAPTERS = [name for name in NAMES if name[0].isdigit()]
UNSTABLE = {
    "an address in memory": r"\b0x[0-9a-f]{6,}",
    "a path of one machine": r"(/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\)",
    "a random identifier": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-",
}
TOY = """---
jupytext:
  notebook_metadata_filter: stiffkit
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
stiffkit:
  quick_note: Two points are too few.
---

# A toy

```{code-cell} ipython3
:tags: [parameters]

n: int = 3  # how many
```

```{code-cell} ipython3
import os
print(n, "STIFFKIT_CACHE" in os.environ)
```
"""


def notebook(name):
    return nbformat.read(ROOT / "book" / f"{name}.ipynb", 4)


def code_cells(name):
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


def parameters(name):
    """{parameter: source line} of the cell tagged parameters."""
    (cell,) = [cell for cell in code_cells(name) if "parameters" in cell.metadata.get("tags", [])]
    found = {node.target.id: node for node in ast.parse(cell.source).body if isinstance(node, ast.AnnAssign)}
    return {key: cell.source.splitlines()[node.lineno - 1] for key, node in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_text_and_notebook_are_in_step(name):
    text = ROOT / "book" / "text" / f"{name}.md"
    stored = ROOT / "book" / f"{name}.ipynb"
    advice = f"after an edit of the text: make chapters ARGS={name[:2]}\nof the notebook: {chapters.take_over(name)}"
    assert text.exists(), advice
    assert stored.exists(), advice
    try:
        compare_notebooks(notebook(name), jupytext.read(text, fmt="md:myst"), fmt="md:myst")
    except NotebookDifference as difference:
        pytest.fail(f"book/{name}.ipynb and book/text/{name}.md differ; {advice}\n\n{difference}", pytrace=False)
    stale = notebook(name).metadata.get("source_hash") != chapters.fingerprint(notebook(name))
    assert not stale, f"the outputs are older than the cells: make chapters ARGS={name[:2]}"


@pytest.mark.parametrize("name", NAMES)
def test_notebook_holds_nothing_of_the_moment(name):
    stored = notebook(name)
    assert [cell.id for cell in stored.cells] == [f"cell-{index:02d}" for index in range(len(stored.cells))]
    assert "widgets" not in stored.metadata
    assert not [cell.id for cell in stored.cells if "execution" in cell.metadata]
    counts = [cell.execution_count for cell in code_cells(name)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_can_be_compared_on_another_machine(name):
    outputs = [output for cell in code_cells(name) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    texts = [output.get("text", "") for output in outputs]
    texts += [str(value) for output in outputs for kind, value in output.get("data", {}).items() if "image" not in kind]
    wrong = [(what, text[:200]) for what, pattern in UNSTABLE.items() for text in texts if re.search(pattern, text)]
    assert not wrong


@pytest.mark.parametrize(("page", "folder"), [("book/index.md", ""), ("README.md", "book/")])
def test_the_answer_on_the_front_is_the_ledgers(page, folder):
    ledger = claims.read()
    front = claims.front(claims.judge_all(ledger), ledger, folder)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == chapters.with_front(text, front), "make chapters writes it anew"


@pytest.mark.parametrize("name", CHAPTERS)
def test_parameters_are_annotated_commented_and_have_quick_values(name):
    first, known = code_cells(name)[0], parameters(name)
    assert "parameters" in first.metadata.get("tags", []), "the first code cell holds the parameters"
    assert known
    assert not [line for line in known.values() if not re.match(r"\w+: (int|float|str|bool|list) = .+  # \S", line)]
    quick = yaml.safe_load((ROOT / f"book/parameters/quick/{name[:2]}.yml").read_text(encoding="utf-8"))
    assert set(quick) <= set(known)
    assert notebook(name).metadata["stiffkit"]["quick_note"]


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_a_figure_with_label_caption_and_alt_text(name):
    labels = []
    for cell in code_cells(name):
        kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
        if any(kind.startswith("image/") for kind in kinds):
            own = cell.metadata.get("mystnb", {})
            assert len(own.get("figure", {}).get("caption", "")) > 20, cell.source
            assert len(own.get("image", {}).get("alt", "")) > 20, cell.source
            labels.append(own["figure"]["name"])
    assert len(set(labels)) == len(labels)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository with one small chapter in tmp_path, for the scripts to work on."""
    for folder in ("book/text", "book/live", "book/parameters/quick", "_build/live"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "book/text/01_toy.md").write_text(TOY, encoding="utf-8")
    (tmp_path / "book/parameters/quick/01.yml").write_text("n: 2\n", encoding="utf-8")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(chapters, "BOOK", tmp_path / "book")
    monkeypatch.setattr(live, "RUNS", tmp_path / "_build/live")
    monkeypatch.setattr(live, "PAGES", tmp_path / "book/live")
    monkeypatch.setattr(live, "QUICK", tmp_path / "book/parameters/quick")
    monkeypatch.setattr(live, "commit", lambda: "`abc1234`")
    return tmp_path


def test_chapters_are_written_the_same_twice_and_an_edit_is_not_lost(toy, capsys):
    stored, text = toy / "book/01_toy.ipynb", toy / "book/text/01_toy.md"
    chapters.main([])
    first = stored.read_bytes()
    chapters.main(["01"])
    assert stored.read_bytes() == first
    assert nbformat.read(stored, 4).cells[2].outputs[0].text == "3 True\n"

    edited = nbformat.read(stored, 4)
    edited.cells[2].source = "print(n + 1)"
    nbformat.write(edited, stored)
    with pytest.raises(SystemExit, match="01_toy"):
        chapters.main([])
    command = next(line.strip() for line in capsys.readouterr().out.splitlines() if "--to md:myst" in line)

    words = shlex.split(command, posix=False)
    subprocess.run([str(ROOT / words[0]), *words[1:]], cwd=toy, check=True, capture_output=True)
    assert "print(n + 1)" in text.read_text(encoding="utf-8")
    assert "Two points are too few." in text.read_text(encoding="utf-8")
    chapters.main([])
    assert nbformat.read(stored, 4).cells[2].outputs[0].text == "4\n"


def test_a_chapter_that_fails_writes_no_notebook(toy, capsys):
    (toy / "book/text/01_toy.md").write_text(TOY.replace("print(n", "print(m"), encoding="utf-8")
    with pytest.raises(SystemExit, match="01_toy"):
        chapters.main([])
    assert "NameError" in capsys.readouterr().out
    assert not (toy / "book/01_toy.ipynb").exists()


def test_a_live_page_has_the_facts_and_the_figures_without_label_prose_and_verdict(toy):
    picture = v4.new_output("display_data", data={"image/png": "AAAA"})
    table = v4.new_output("display_data", data={"text/plain": "a verdict"})
    figure = {"figure": {"name": "fig-a", "caption": "On MNIST."}, "image": {"alt": "a line", "width": "80%"}}
    own = {"live": {"caption": "On digits."}}
    cells = [
        v4.new_markdown_cell("# Title\n\nProse."),
        v4.new_code_cell("plot()", metadata={"mystnb": figure, "stiffkit": own}, outputs=[picture, table]),
        v4.new_code_cell("verdict()", outputs=[table]),
    ]
    executed = v4.new_notebook(cells=cells, metadata={"papermill": {"duration": 4.25}})
    nbformat.write(executed, toy / "_build/live/01_toy.ipynb")
    executed.metadata["stiffkit"] = {"quick_note": "Digits are easy."}
    nbformat.write(executed, toy / "book/01_toy.ipynb")

    live.write_page(toy / "book/01_toy.ipynb", "")
    page = nbformat.read(toy / "book/live/01_toy.ipynb", 4)

    assert [cell.cell_type for cell in page.cells] == ["markdown", "code"]
    for words in ("# Title, on this machine", "Digits are easy.", "`n`: `2`", "4.2 seconds", "CPU: ", "`abc1234`"):
        assert words in page.cells[0].source
    assert "Prose" not in page.cells[0].source
    assert page.cells[1].metadata.mystnb == {
        "figure": {"caption": "On digits."},
        "image": {"alt": "a line", "width": "80%"},
    }
    assert page.cells[1].metadata.tags == ["remove-input"]
    assert page.cells[1].outputs == [picture]


def test_a_failing_chapter_gets_a_page_with_its_traceback_and_the_others_are_run(toy, monkeypatch):
    (toy / "book/text/02_toy.md").write_text(TOY.replace("print(n", "print(m"), encoding="utf-8")
    for text in toy.glob("book/text/*.md"):
        nbformat.write(jupytext.read(text, fmt="md:myst"), toy / f"book/{text.stem}.ipynb")
    shutil.copy(toy / "book/01_toy.ipynb", toy / "book/03_toy.ipynb")
    (toy / "book/parameters/quick/02.yml").write_text("n: 2\n", encoding="utf-8")

    assert live.run_chapters(setup.environment(STIFFKIT_CACHE=str(toy))) == ["02_toy", "03_toy"]
    pages = {path.stem: nbformat.read(path, 4).cells for path in toy.glob("book/live/*.ipynb")}
    assert len(pages["01_toy"]) == 1
    assert "NameError" in pages["02_toy"][-1].source
    assert "book/parameters/quick/03.yml is missing" in pages["03_toy"][-1].source
