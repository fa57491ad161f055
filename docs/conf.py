"""Sphinx reads this: `sphinx-build -W docs SITE` makes the site from the pages of this folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

from megatron_laer.config import FSEPConfig
from megatron_laer.fsep_flags import help_of

project = "megatron_laer"
author = "The megatron_laer authors"
copyright = author
release = version = importlib.metadata.version("megatron-laer").partition("+")[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
# The pages are read in a repository too, whose host makes such names of headings.
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "literal"  # docstrings have names between single backticks
smartquotes = False  # `--` in running text is a flag
# Color alone marks nothing in a page's text, and both themes follow the reader's system.
html_theme = "furo"
html_title = "megatron_laer"
html_static_path = ["static"]
html_css_files = ["site.css"]


def setup(app: Any) -> None:
    """Connect the step that completes docstrings."""
    app.connect("autodoc-process-docstring", _complete)


def _complete(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Describe fields of FSEPConfig as their flags are, and take indented lines for code."""
    for number, line in enumerate(lines[:-2]):
        if line.endswith(":") and not lines[number + 1] and lines[number + 2].startswith("    "):
            lines[number] += ":"
    if what == "class" and name.endswith(".FSEPConfig"):
        for field in dataclasses.fields(FSEPConfig):
            lines.append(f":param {field.name}: {help_of(field.name).replace('%%', '%')}")
