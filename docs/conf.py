"""Sphinx reads this: `sphinx-build -W docs SITE` makes the site from the pages of this folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
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
# Nothing of a page's text is told by color alone, and both themes follow the reader's system.
html_theme = "furo"
html_title = "megatron_laer"
html_static_path = ["static"]
html_css_files = ["site.css"]

# Former pages, and where their contents are.
MOVED = {
    "announced": "rl#announced-routing",
    "bridge": "own_loop#megatron-bridge",
    "comparison": "paper#other-systems",
    "compatibility": "support#versions",
    "configurations": "calibrate#models",
    "containers": "install#containers",
    "convergence": "performance#convergence",
    "end_to_end": "performance",
    "errors": "troubleshooting",
    "faq": "tuning#questions",
    "faults": "troubleshooting#faults",
    "fork": "megatron",
    "gemm": "communication#matrix-products-of-experts",
    "glossary": "concepts#glossary",
    "known_limits": "support#not-shown",
    "new_release": "releasing#a-new-release-of-megatron",
    "prepare_data": "megatron#your-data",
    "release": "releasing",
    "scaling": "simulator#scale",
    "site": "releasing#this-site",
    "slime": "rl#slime",
    "stock_names": "checkpoints#weights-under-stock-s-names",
    "timeline": "report#profiles",
}
_REDIRECT = (
    '<!doctype html><meta http-equiv="refresh" content="0; url={0}"><a href="{0}">Moved</a>\n'
)


def setup(app: Any) -> None:
    """Connect the steps that complete docstrings and redirect old addresses."""
    app.connect("autodoc-process-docstring", _complete)
    app.connect("build-finished", _redirect)


def _redirect(app: Any, error: Exception | None) -> None:
    """Write a page for each former address, which leads to the new one."""
    if error is None and app.builder.format == "html":
        for old, new in MOVED.items():
            name, mark, part = new.partition("#")
            page = _REDIRECT.format(f"{name}.html{mark}{part}")
            Path(app.outdir, f"{old}.html").write_text(page, encoding="utf-8")


def _complete(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Describe fields of FSEPConfig as their flags are, and take indented lines for code."""
    for number, line in enumerate(lines[:-2]):
        if line.endswith(":") and not lines[number + 1] and lines[number + 2].startswith("    "):
            lines[number] += ":"
    if what == "class" and name.endswith(".FSEPConfig"):
        for field in dataclasses.fields(FSEPConfig):
            lines.append(f":param {field.name}: {help_of(field.name).replace('%%', '%')}")
