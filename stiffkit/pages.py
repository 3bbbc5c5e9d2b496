"""Executed notebooks as pages for a browser: one file each, which needs no network."""

import re
import tempfile
from pathlib import Path

from stiffkit.results import book

_LABEL = r"\((eq-[\w-]+)\)"
_MATHML = {  # what docutils' MathML does not know, in words that it knows
    r"\\rm (\w+)": r"\\mathrm{\1}",
    r"\\tag\{([^}]*)\}": r"\\qquad\\text{(\1)}",
    r"\\mathop\{(\\\w+ \w)\}": r"\1",
    r"\\vec (\w)": r"\\mathbf{\1}",  # an arrow pushes the index below it
}


def page(notebook: Path) -> str:
    """An executed notebook as one HTML page that needs no network: text, figures, what cells printed."""
    from docutils.core import publish_string
    from myst_nb.docutils_ import Parser

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "image_loading": "embed",
            "math_output": "MathML",
            "myst_enable_extensions": ["amsmath", "colon_fence", "deflist", "dollarmath", "substitution"],
            "nb_append_css": False,
            "nb_execution_mode": "off",
            "nb_output_folder": folder,
            "nb_render_markdown_format": "gfm",
            "output_encoding": "unicode",
            "report_level": 4,
            "stylesheet_path": [str(book() / "_static" / "page.css")],
            "syntax_highlight": "none",
        }
        html = publish_string(
            _standing_alone(notebook),
            source_path=str(notebook),
            parser=Parser(),
            writer_name="html5",
            settings_overrides=settings,
        )
    return html.replace("<head>", '<head>\n<meta charset="utf-8" />', 1)


def _standing_alone(notebook: Path) -> str:
    """A notebook with references to figures, equations and papers as the whole book would resolve them."""
    import nbformat

    content = nbformat.read(notebook, 4)
    own = [cell.metadata.get("mystnb", {}).get("figure", {}) for cell in content.cells]
    text = "\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    numbers = {
        "numref": {name: f"Fig. {k}" for k, name in enumerate([f["name"] for f in own if "name" in f], 1)},
        "eq": {name: f"({k})" for k, name in enumerate(re.findall(_LABEL, text), 1)},
    }

    def resolved(source: str) -> str:
        source = re.sub(r"\n\$\$ *" + _LABEL, lambda m: f"\\qquad {numbers['eq'][m[1]]}\n$$", source)
        for pattern, ours in _MATHML.items():
            source = re.sub(pattern, ours, source)
        return re.sub(r"\{(cite:[pt]|numref|eq|doc|ref)\}`([^`]+)`", reference, source)

    def reference(match: re.Match) -> str:
        role, target = match.groups()
        return _cited(role, target) if role.startswith("cite") else numbers.get(role, {}).get(target, target)

    for cell, figure in zip(content.cells, own, strict=True):
        if cell.cell_type == "markdown":
            cell.source = resolved(cell.source)
        elif "caption" in figure:
            figure["caption"] = resolved(figure["caption"])
    return nbformat.writes(content)


def _cited(role: str, keys: str) -> str:
    """Authors and year, in a sentence (`cite:t`) or in brackets (`cite:p`)."""
    from pybtex.database import parse_file

    known = parse_file(str(book() / "references.bib")).entries
    said = []
    for entry in (known[key.strip()] for key in keys.split(",")):
        names = [" ".join(person.last_names) for person in entry.persons["author"]]
        who = names[0] + (" et al." if len(names) > 2 else f" and {names[1]}" if len(names) == 2 else "")
        year = entry.fields["year"]
        said.append(f"{who} ({year})" if role == "cite:t" else f"{who}, {year}")
    return ", ".join(said) if role == "cite:t" else f"({'; '.join(said)})"
