"""The table of published commands in docs/recipes.md, with `check-recipe`'s verdicts.

    python -m tests.published_commands

prints it, in a process of its own, since parsing flags as Megatron does may patch torch. A unit
test looks for each of its lines on the page.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_laer.tools import cli
from megatron_laer.tools.cli.check_recipe import STATUS, say
from tests.bridge_table import COLUMNS, judge_recipe
from tests.parity.settings import published_entries

_SOURCES = {
    "megatron": ("Megatron", "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.19.0"),
    "modelzoo": ("model zoo", "https://github.com/yanring/Megatron-MoE-ModelZoo/blob/main"),
    "bridge": ("Bridge", "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main"),
}
# Proofs by a text of the first line; the last text is in all of them.
_PROOFS = {
    "one row": "; proved by row ",
    "each feature": "; each feature proved ",
    "nothing yet": "; nothing proves it yet",
    "–": "",
}
_NO_ROW = re.compile(r"; no row has ([^;]*);")
# Defaults of a Megatron-Bridge recipe.
_DEFAULTS = dict.fromkeys(COLUMNS, "") | {
    "pool": "pretrain",
    "precision": "bf16_mixed",
    "optimizer": "opt:distributed_fused_adam_with_cosine_annealing",
}


def table(folder: Path) -> list[str]:
    lines = ["| model | published by | verdict | proved by | in the way |"]
    lines.append("|---|---|---|---|---|")
    for number, entry in enumerate(published_entries()):
        repository, path = entry["from"].split()
        name, address = _SOURCES[repository]
        status, said, *because = _checked(entry, folder / str(number))
        verdict = next(verdict for verdict in STATUS if str(STATUS[verdict]) == status)
        kinds = [*dict.fromkeys(f"`{reason.split(':')[0].strip()}`" for reason in because)]
        if "lacking" in entry:
            assert _said(["--", entry["lacking"]])[0] == 2, "Megatron has it now"
            kinds.append(f"`{entry['lacking']}`, which Megatron 0.19 lacks")
        cells = (
            entry["model"],
            f"[{name}]({address}/{path})",
            f"*{verdict}*",
            proof_in(said),
            ", ".join(kinds) or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def proof_in(said: str) -> str:
    if lacking := _NO_ROW.search(said):
        return f"all but {lacking[1]}"
    return next(kind for kind, text in _PROOFS.items() if text in said)


def _checked(entry: Mapping[str, Any], file: Path) -> list[str]:
    """Return the exit status of `check-recipe`, and its output up to a working command line."""
    if "recipe" in entry:
        row = _DEFAULTS | {name: str(value) for name, value in entry["recipe"].items()}
        status, (first, *rest) = _said_by(lambda: say(judge_recipe(row)))
    else:
        file.write_text(shlex.join(entry["flags"].split()), encoding="utf-8")
        status, (first, *rest) = _said([str(file)])
    return [str(status), first, *(line for line in rest if line.startswith("  "))]


def _said(words: list[str]) -> tuple[int, list[str]]:
    return _said_by(lambda: cli.main(["check-recipe", *words]))


def _said_by(run: Callable[[], int]) -> tuple[int, list[str]]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = run()
    return status, said.getvalue().splitlines()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print("\n".join(table(Path(temporary))))
