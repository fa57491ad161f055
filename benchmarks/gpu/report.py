"""Results of the GPU check's parts, and a description of the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import Budget
from benchmarks.report import machine, print_table

DRY = "dry run: no card"
# What replaces a card in dry runs, and runs a module on it.
LABELLED = "tests.fake_cuda.program"
NO_CARD = f"torch sees no card; run this on one, or by -m {LABELLED} with --dry-run"
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")


@dataclass
class Part:
    """Tables of one part.

    `tables` are rows by title. `left_out` are omitted measurements, with the reason. `problems` are
    failures, such as results that differ.
    """

    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """Device, size and time budget of a part."""

    device: torch.device
    budget: Budget
    dry: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def run_part(
    doc: str | None,
    measure: Callable[[Setting], Part],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run one part from its command line: print its tables, and write them to --json."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="what it may take")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, help="where to write the tables")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_CARD, file=sys.stderr)
        return 2
    part = measure(Setting(torch.device("cuda"), Budget(options.seconds), options.dry_run))
    finish(part, options.json, options.dry_run)
    return 0


def finish(part: Part, json_file: Path | None, dry: bool) -> None:
    show(part, dry)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(part), indent=1) + "\n")


def show(part: Part, dry: bool) -> None:
    for title, rows in part.tables.items():
        print(f"{title} ({DRY})" if dry else title)
        print_table(rows)
    for what in part.left_out:
        print(f"left out: {what}")
    for problem in part.problems:
        print(f"PROBLEM: {problem}")


def about(command: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = machine()
    found |= {name: _version(name) for name in _PACKAGES}
    found["commit"] = _said("git", "-C", str(_ROOT), "describe", "--always", "--dirty")
    found["command"] = shlex.join(command)
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
        found["cards"] = torch.cuda.device_count()
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        query = "--query-gpu=driver_version", "--format=csv,noheader"
        found["driver"] = (_said("nvidia-smi", *query) or "").split("\n")[0]
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def page_rows(result: dict[str, Any]) -> str:
    """Return the text for docs/gpu_status.md: the machine, and a table for each part's."""
    told = result["about"]
    card = told.get("card", DRY)
    lines = [
        f"## {card}",
        "",
        f"{', '.join(f'{key} {value}' for key, value in told.items() if value and key != 'card')}.",
    ]
    for part in result["parts"].values():
        for title, rows in part["tables"].items():
            lines += ["", f"**{title}**" if "card" in told else f"**{title}** ({DRY})", ""]
            lines += markdown(rows)
        lines += ["", *(f"* left out: {what}" for what in part["left_out"])]
        lines += [f"* **problem**: {what}" for what in part["problems"]]
    return "\n".join(lines).rstrip() + "\n"


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*map(_cell, row.values())] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
