"""The table of published commands in docs/support.md, with `check-recipe`'s verdicts.

    python -m tests.published_commands

prints it, in a process of its own, since parsing flags as Megatron does may patch torch. A unit
test looks for each of its lines on the page.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any
from unittest import mock

from megatron_laer.tools import cli
from megatron_laer.tools.cli import check_recipe
from megatron_laer.tools.recipes.verdict import Judgement
from tests.bridge_table import COLUMNS, judge_recipe
from tests.parity.settings import published_entries

_SOURCES = {
    "megatron": ("Megatron", "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.19.0"),
    "modelzoo": ("model zoo", "https://github.com/yanring/Megatron-MoE-ModelZoo/blob/main"),
    "bridge": ("Bridge", "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main"),
}
# Defaults of a Megatron-Bridge recipe.
_DEFAULTS = dict.fromkeys(COLUMNS, "") | {
    "pool": "pretrain",
    "precision": "bf16_mixed",
    "optimizer": "opt:distributed_fused_adam_with_cosine_annealing",
}


def table() -> list[str]:
    lines = ["| model | published by | verdict | proved by | in the way |"]
    lines.append("|---|---|---|---|---|")
    for entry in published_entries():
        repository, path = entry["from"].split()
        name, address = _SOURCES[repository]
        if "recipe" in entry:
            row = {name: str(value) for name, value in entry["recipe"].items()}
            found = judge_recipe(_DEFAULTS | row)
        else:
            found = judged(*entry["flags"].split())
        kinds = [*dict.fromkeys(f"`{reason.split(':')[0].strip()}`" for reason in found.because)]
        if "lacking" in entry:
            assert judged(entry["lacking"]) is None, "Megatron has it now"
            kinds.append(f"`{entry['lacking']}`, which Megatron 0.19 lacks")
        cells = (
            entry["model"],
            f"[{name}]({address}/{path})",
            f"*{found.verdict}*",
            proof_of(found),
            ", ".join(kinds) or "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def proof_of(found: Judgement) -> str:
    if found.proof is None:
        return "nothing yet" if found.runs else "–"
    if found.proof.no_row:
        return f"all but {', '.join(found.proof.no_row)}"
    return "one row" if found.proof.row else "each feature"


# Sizes of some model, without which nothing can be judged; the table's flags have none.
_SIZES = "--num-layers 48 --hidden-size 4096 --num-attention-heads 32".split()


def judged(*words: str) -> Any:
    """Return `check-recipe`'s judgement, in place of printing it; None for a refused input."""
    say, printed = mock.Mock(return_value=0), io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        mock.patch.object(check_recipe, "say", say),
    ):
        cli.main(["check-recipe", "--", *_SIZES, *words])
    return say.call_args.args[0] if say.called else None


if __name__ == "__main__":
    print("\n".join(table()))
