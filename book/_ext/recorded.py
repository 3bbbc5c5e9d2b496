"""Sphinx extension: what pages say about the runs behind them: results of older code, the last run on a GPU."""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

from stiffkit import claims, results

OF_ALL = ("book/index", "book/verdicts")  # pages that speak of every run that judges a claim
ALSO = {"book/06_critical_length": "05_learning_rate"}  # and a chapter that is made of another one's runs


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", name_last_gpu_run)
    app.connect("doctree-read", warn_of_stale)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def name_last_gpu_run(app: Sphinx, config: Config) -> None:
    """Gives pages the words for `{{ last_gpu_run }}`."""
    config.myst_substitutions["last_gpu_run"] = last_gpu_run(results.book() / "results" / "gpu.json")


def last_gpu_run(path: Path) -> str:
    """When what was run on a GPU, from the summary that ci/gpu.py leaves."""
    if not path.exists():
        return "none so far"
    stages = json.loads(path.read_text(encoding="utf-8")).items()
    return "; ".join(
        f"{stage} {found['date']} ({found['device']}, {found['computed']} runs computed): {verdict(found)}"
        for stage, found in stages
    )


def verdict(found: dict) -> str:
    """Of one stage: passed, or what failed."""
    bad = {name: result for name, result in found["steps"].items() if result != "passed"}
    return ", ".join(f"{name} {result}" for name, result in bad.items()) or "passed"


def warn_of_stale(app: Sphinx, doctree: nodes.document) -> None:
    """Says at the head of a page that its recorded results were made by other versions of the code."""
    page = app.env.docname
    judging = {e.identity for runs in claims.read().runs.values() for e in runs.experiments()} if page in OF_ALL else ()
    stale = sum(
        not results.is_current(made_with)
        for path in results.recorded()
        for experiment, made_with in results.described(path).items()
        if path.stem in (page.removeprefix("book/"), ALSO.get(page)) or experiment in judging
    )
    if stale:
        words = (
            f"{stale} of the results behind this page were made by another version of the training or the measuring "
            "code than the present one, and are to be computed again: its numbers may change."
        )
        heading = next(doctree.findall(nodes.title))
        heading.parent.insert(heading.parent.index(heading) + 1, nodes.warning("", nodes.paragraph(text=words)))
