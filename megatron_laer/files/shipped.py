"""Cluster and model files, given as the name of a shipped one or as a path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from megatron_laer.files.checks import quoted

_PACKAGE = Path(__file__).resolve().parents[1]


def yaml_file(kind: str, path_or_name: str | Path) -> Path:
    """Return a shipped file by name, or a path: a text with a slash, .yaml or .yml, or a file."""
    name = str(path_or_name)
    if isinstance(path_or_name, Path) or name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(path_or_name)
    # The package's own data first: `configs` next to an installed package may be another project's.
    folders = (_PACKAGE / "configs" / f"{kind}s", _PACKAGE.parent / "configs" / f"{kind}s")
    known = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    if name not in known and os.path.lexists(name):  # read, or refused by what it is
        return Path(name)
    if name not in known:
        raise ValueError(
            f"unknown {kind} {quoted(name)}{did_you_mean(name, known) or ';'} known are "
            f"{sorted(known)}, or pass a path to a YAML file"
        )
    return known[name]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a question for the known word that is most like a given one; "" if none is."""
    # No typing error has a thousand letters, whose comparison would take minutes.
    words = {word.lstrip("-"): word for word in known}
    close = get_close_matches(given.lstrip("-")[:100], list(words), n=1)
    return f", did you mean {words[close[0]]}?" if close else ""
