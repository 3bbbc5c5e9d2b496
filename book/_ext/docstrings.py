"""Sphinx extension: formulas in docstrings may be written as on the pages, between dollar signs."""

import re

from sphinx.application import Sphinx

FORMULA = re.compile(r"(?<![\\`$\w])\$(?!\s)([^$`]+?)(?<!\s)\$")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", write_roles, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_roles(app: Sphinx, what: str, name: str, obj: object, options: dict, lines: list[str]) -> None:
    """Writes each formula, also one that goes over a line's end, as the role that autodoc's markup knows."""
    lines[:] = FORMULA.sub(role, "\n".join(lines)).split("\n")


def role(formula: re.Match) -> str:
    """One formula as a role, on one line."""
    return f":math:`{' '.join(formula[1].split())}`"
