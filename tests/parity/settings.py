"""Settings of parity rows and of command lines, without an argument parser."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tests.parity import bridge_lora
from tests.parity.row import Row

_PUBLISHED = Path(__file__).parents[1] / "published_commands.yaml"


def published_entries() -> list[dict[str, Any]]:
    """Return published commands and recipes with what is known of them."""
    entries: list[dict[str, Any]] = yaml.safe_load(_PUBLISHED.read_text(encoding="utf-8"))
    return entries


def settings_of(row: Row) -> Namespace:
    return settings_in(
        row.fsep_run("data")[1],
        is_lora="lora" in getattr(row.adapt, "__name__", ""),
        adapts_experts=adapts_experts(row),
    )


def adapts_experts(row: Row) -> bool:
    return getattr(row.adapt, "__module__", "") == bridge_lora.__name__


def settings_in(command: Iterable[str], **found: Any) -> Namespace:
    """Return a command line's settings, with these others."""
    flag = ""
    for word in command:
        if word.startswith("--"):
            flag = word.removeprefix("--").replace("-", "_")
            found[flag] = True
        elif flag == "fsep_set":
            name, _, value = word.partition("=")
            found[f"fsep_{name}"] = value
        else:
            found[flag] = _with(found[flag], word)
    switches = {"add_bias_linear": "disable_bias_linear" not in found}
    switches |= {"swiglu": "swiglu" in found, "quick_geglu": "quick_geglu" in found}
    return Namespace(**found | switches)


def _with(before: Any, word: str) -> Any:
    if before is True:
        return word
    return [*before, word] if isinstance(before, list) else [before, word]
