"""Sphinx reads this: `sphinx-build -W docs SITE` makes the site from the pages of this folder."""

from __future__ import annotations

import importlib.metadata

project = "megatron_laer"
author = "The megatron_laer authors"
copyright = author
release = version = importlib.metadata.version("megatron-laer").partition("+")[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The pages are read in a repository too, whose host makes such names of headings.
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
smartquotes = False  # `--` in running text is a flag
# Nothing of a page's text is told by color alone, and both themes follow the reader's system.
html_theme = "furo"
html_title = "megatron_laer"
html_static_path = ["static"]
html_css_files = ["site.css"]
