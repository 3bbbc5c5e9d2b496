"""Sphinx extension: the site needs no network. MathJax comes from an installed package, and thebe is left out."""

import importlib.util
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

MATHJAX = "static/mathjax/tex-svg-full.js"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("config-inited", serve_mathjax)
    app.connect("builder-inited", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def serve_mathjax(app: Sphinx, config: Config) -> None:
    """Copies MathJax, one file, from the package sphinx-mathjax-offline beside the pages."""
    package = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0]
    config.html_static_path.append(str(Path(package, MATHJAX)))
    config.mathjax_path = Path(MATHJAX).name


def drop_thebe(app: Sphinx) -> None:
    """Disconnects sphinx-thebe, which Jupyter Book always loads and which fetches its scripts from elsewhere."""
    for listeners in app.events.listeners.values():
        listeners[:] = [one for one in listeners if not one.handler.__module__.startswith("sphinx_thebe")]
