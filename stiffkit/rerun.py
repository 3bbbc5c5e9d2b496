"""Chapters from the command line: parameters checked before a kernel starts, runs with progress, then the notebook."""

import base64
import mimetypes
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stiffkit.chapters import Chapter, ParameterError, chapters
from stiffkit.results import book

ATTEMPTS = 3  # at a kernel that dies before its first cell: another program took its port


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


def described(chapter: type[Chapter]) -> str:
    """The parameters of a chapter, a line each: name, type, default, meaning."""
    rows = []
    for name, field in chapter.model_fields.items():
        default = '""' if field.default == "" else str(field.default)
        rows.append((name, field.annotation.__name__, default, field.description or ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{part:{w}}" for part, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def profiles(chapter: type[Chapter]) -> dict[str, Path]:
    """The parameter files of a chapter by name: quick, and those of the paper's data sets and networks."""
    number = f"{chapter.number:02}"
    quick = {"quick": path for path in (book() / "parameters/quick").glob(f"{number}.yml")}
    paper = (book() / "parameters/paper").glob(f"{number}_*.yml")
    return quick | {path.stem.removeprefix(f"{number}_"): path for path in sorted(paper)}


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
        raise ParameterError(f"{path}: {error}") from None
    if not isinstance(content, dict):
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
        ParameterError: before a kernel starts: a wrong parameter, or more minutes than `max_minutes`.
        papermill.PapermillExecutionError: a cell failed; the notebook is kept as far as it came, at `out` with the
            ending `.ipynb`.

    """
    if out.suffix not in (".ipynb", ".html"):
        raise ParameterError(f"{out}: a name that ends in .ipynb or .html is wanted")
    p = chapter.check(values)
    p.allow()
    p.prepare(progress=progress)
    notebook = out.with_suffix(".ipynb")
    asked = {name: getattr(p, name) for name in values}
    with tempfile.TemporaryDirectory() as folder:
        target = notebook if out.suffix == ".ipynb" else Path(folder) / notebook.name
        try:
            _execute(chapter, asked, target, progress)
        except BaseException:
            if target != notebook and target.exists():
                notebook.write_bytes(target.read_bytes())
            raise
        if out.suffix == ".html":
            out.write_text(page(target), encoding="utf-8")
    return out


def _execute(chapter: type[Chapter], values: dict[str, Any], target: Path, progress: bool) -> None:
    import papermill

    source = book() / f"{chapter.number:02}_{chapter.name}.ipynb"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            papermill.execute_notebook(source, target, values, kernel_name="python3", progress_bar=progress)
            return
        except RuntimeError as error:  # jupyter_client's word for a kernel that died while it was starting
            if attempt == ATTEMPTS or "Kernel died" not in str(error):
                raise


def page(notebook: Path) -> str:
    """An executed notebook as one HTML page that needs no network: text, figures, what cells printed."""
    from docutils.core import publish_string
    from docutils.parsers.rst import roles
    from myst_nb.docutils_ import Parser

    for name in ("cite:p", "cite:t", "doc", "ref", "numref", "eq"):  # what only the whole book resolves is shown as text
        roles.register_local_role(name, _as_text)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "math_output": "MathML",
            "myst_enable_extensions": ["amsmath", "colon_fence", "deflist", "dollarmath", "substitution"],
            "nb_execution_mode": "off",
            "nb_output_folder": folder,
            "output_encoding": "unicode",
            "report_level": 4,
        }
        html = publish_string(
            notebook.read_text(encoding="utf-8"),
            source_path=str(notebook),
            parser=Parser(),
            writer_name="html5",
            settings_overrides=settings,
        )
        return re.sub(r'src="([^":]+)"', lambda match: f'src="{_embedded(Path(folder), match[1])}"', html)


def _as_text(name: str, raw: str, text: str, *_: Any) -> tuple[list, list]:
    from docutils import nodes

    return [nodes.inline(raw, text)], []


def _embedded(folder: Path, name: str) -> str:
    """A picture as a data URI."""
    path = folder / Path(name).name
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
