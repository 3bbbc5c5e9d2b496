"""Sphinx extension: a chapter's number is that of its file, 8 for book/08_NAME, whichever chapters stand before it."""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("env-get-updated", keep_numbers, priority=900)  # after Sphinx has counted
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def keep_numbers(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Replaces the first part of the numbers of sections, figures and equations."""
    chapters = {page: re.match(r"book/(\d+)_", page) for page in env.toc_secnumbers}
    for page, number in ((page, int(found[1])) for page, found in chapters.items() if found):
        places = [env.toc_secnumbers[page], *env.toc_fignumbers.get(page, {}).values()]
        for numbers in places:
            numbers.update({anchor: (number, *rest[1:]) for anchor, rest in numbers.items() if rest})
        env.titles[page]["secnumber"] = (number,)
        for reference in env.tocs[page].findall(nodes.reference):
            if reference.get("secnumber"):
                reference["secnumber"] = (number, *reference["secnumber"][1:])
    return []
