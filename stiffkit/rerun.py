"""Chapters from the command line: parameters checked before a kernel starts, then runs, notebook and page."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stiffkit.chapters import Chapter, ParameterError, chapters
from stiffkit.checked_file import write_whole
from stiffkit.pages import page
from stiffkit.results import book

ATTEMPTS = 3  # at a kernel that dies before its first cell: another program took its port


class ChapterError(ValueError):
    """A cell of a chapter failed."""


def find(name: str) -> type[Chapter]:
    """A chapter by its number or name: 2, 02, class_matrices or 02_class_matrices.

    Raises:
        ParameterError: listing the chapters.

    """
    known = {}
    for chapter in chapters():
        number = f"{chapter.number:02}"
        known |= dict.fromkeys((str(chapter.number), number, chapter.name, f"{number}_{chapter.name}"), chapter)
    if name.removesuffix(".ipynb") not in known:
        listed = ", ".join(f"{c.number} ({c.name})" for c in chapters())
        raise ParameterError(f"there is no chapter {name!r}; there are {listed}")
    return known[name.removesuffix(".ipynb")]


def described(chapter: type[Chapter], values: Mapping[str, Any]) -> str:
    """The parameters of a chapter, a line each: name, type, default, the value given in its place, meaning."""
    rows = [("name", "type", "default", "given", "meaning")]
    for name, field in sorted(chapter.model_fields.items(), key=lambda item: item[0] == "max_minutes"):  # to the end
        given = _shown(values[name]) if name in values else ""
        rows.append((name, field.annotation.__name__, _shown(field.default), given, field.description or ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{part:{w}}" for part, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _shown(value: Any) -> str:
    return '""' if value == "" else str(value)


def profiles(chapter: type[Chapter]) -> dict[str, Path]:
    """The parameter files of a chapter by name: quick, and those of the paper's data sets and networks."""
    number, folder = f"{chapter.number:02}", book() / "parameters"
    files = [folder / "quick" / f"{number}.yml", *sorted((folder / "paper").glob(f"{number}_*.yml"))]
    return {path.stem.removeprefix(number).removeprefix("_") or "quick": path for path in files}


def given(
    chapter: type[Chapter], profile: str = "", file: Path | None = None, pairs: Iterable[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Parameters from a profile, over them those of a file, over them single ones.

    Raises:
        ParameterError: an unknown profile, or a file that is not a mapping.

    """
    known = profiles(chapter)
    if profile and profile not in known:
        raise ParameterError(f"chapter {chapter.number} has no profile {profile!r}; there are {', '.join(known)}")
    files = [known[profile]] if profile else []
    values: dict[str, Any] = {}
    for path in [*files, *([file] if file else [])]:
        values |= _read(path)
    return values | dict(pairs)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ParameterError(f"{path}: parameters are wanted, one `name: value` a line")
    return content


def rerun(chapter: type[Chapter], values: Mapping[str, Any], out: Path, *, progress: bool = True) -> Path:
    """Run a chapter with other parameters.

    Args:
        chapter: as `find` gives it.
        values: parameters by name.
        out: a notebook, or a page that a browser shows (`.html`), in one file.
        progress: show bars on a terminal.

    Returns:
        The file written.

    Raises:
        ParameterError: before anything is computed: a wrong parameter, more minutes than `max_minutes`, a wrong `out`.
        ChapterError: a cell failed, or the kernel died. The notebook is kept as far as it came, beside `out` with the
            ending `.partly.ipynb`; a note of the error says so.

    """
    p = chapter.check(values)
    _check(p, out)
    p.allow()
    p.prepare(progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder, "chapter.ipynb")
        try:
            _execute(p.notebook, notebook, {name: getattr(p, name) for name in values}, progress)
            content = page(notebook).encode() if out.suffix == ".html" else notebook.read_bytes()
            write_whole(out, content)
        except BaseException as error:
            if notebook.exists():
                kept = out.with_suffix(".partly.ipynb")
                shutil.copyfile(notebook, kept)
                error.add_note(f"The notebook as far as it came is {kept}")
            raise
    return out


def _check(p: Chapter, out: Path) -> None:
    """Refuse, before anything is computed, what could not be run or written."""
    if out.suffix not in (".ipynb", ".html"):
        raise ParameterError(f"{out}: a name that ends in .ipynb or .html is wanted")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ParameterError(f"{out}: {'it is a folder' if out.is_dir() else 'its folder does not exist'}")
    if out.resolve().is_relative_to(book().resolve()):
        raise ParameterError(f"{out}: the book's own folder is not written to; choose a name outside of {book()}")
    if not p.notebook.exists():
        raise ParameterError(f"there is no {p.notebook}: chapters need a checkout of the book, or STIFFKIT_BOOK")
    if missing := [name for name in ("papermill", "ipykernel", "myst_nb") if find_spec(name) is None]:
        raise ParameterError(f"chapters need {', '.join(missing)}: pip install 'stiffkit[book]'")


def _execute(source: Path, target: Path, values: dict[str, Any], progress: bool) -> None:
    """Execute with papermill in this environment's kernel, once more where another program took the kernel's port."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel goes before the user's
    for attempt in range(1, ATTEMPTS + 1):
        try:
            papermill.execute_notebook(
                source,
                target,
                values,
                kernel_name="python3",
                progress_bar=progress and sys.stderr.isatty(),
                extra_arguments=["--log-level=CRITICAL"],  # ERROR tells of the interrupt that ends every kernel
            )
            return
        except papermill.PapermillExecutionError as error:
            raise ChapterError(f"cell {error.exec_count} failed with {error.ename}: {error.evalue}") from None
        except DeadKernelError:
            raise ChapterError("the kernel died in the middle of the chapter: was there enough memory?") from None
        except RuntimeError as error:
            if not str(error).startswith(("Kernel died before", "Kernel didn't")):
                raise
            if attempt == ATTEMPTS:
                raise ChapterError(f"the kernel did not start, {ATTEMPTS} times: {error}") from None
