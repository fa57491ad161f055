"""The tables of docs/support.md, made from a list of Megatron-Bridge's recipes.

`python -m tests.recipes_page` prints them; a unit test looks for each of their lines on the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_laer.tools.recipes.verdict import Judgement, Verdict
from tests import shared_data
from tests.bridge_table import judge_recipe, read_recipes
from tests.documents import ROOT
from tests.published_commands import proof_of

PAGE = ROOT / "docs" / "support.md"
LIST = shared_data.FOLDER / "bridge_recipes_train.csv"

_PROOFS = ("one row", "each feature", "not all features", "nothing yet")

Judged = list[tuple[Mapping[str, str], Judgement]]


def judged(path: Path) -> Judged:
    return [(row, judge_recipe(row)) for row in read_recipes(path)]


def tables(recipes: Judged) -> list[list[str]]:
    lora = [(row, found) for row, found in recipes if row["pool"] == "peft"]
    training = [(row, found) for row, found in recipes if row["pool"] != "peft"]
    return [list(_verdicts(training, lora)), list(_reasons(training, lora))]


def _verdicts(training: Judged, lora: Judged) -> Iterator[str]:
    yield f"| verdict | proved by | of {len(training)} for training | of {len(lora)} for LoRA |"
    yield "|---|---|---|---|"
    for verdict in Verdict:
        for proof in (*_PROOFS, "–"):
            numbers = [
                sum(found.verdict is verdict and _proof(found) == proof for _, found in of)
                for of in (training, lora)
            ]
            if any(numbers):
                yield f"| *{verdict}* | {proof} | {numbers[0]} | {numbers[1]} |"


def _proof(found: Judgement) -> str:
    said = proof_of(found)
    return "not all features" if said.startswith("all but") else said


def _reasons(training: Judged, lora: Judged) -> Iterator[str]:
    yield "| in the way now | verdict | training | LoRA |"
    yield "|---|---|---|---|"
    numbers = [_counted(of) for of in (training, lora)]
    for key in sorted(numbers[0] | numbers[1]):
        yield f"| {key[1]} | {key[0]} | {numbers[0][key]} | {numbers[1][key]} |"


def _counted(of: Judged) -> Counter[tuple[str, str]]:
    return Counter(key for _, found in of for key in _keys(found))


def _keys(found: Judgement) -> Iterable[tuple[str, str]]:
    """Return the kinds of reasons, each once: the text before the colon."""
    kinds = {reason.split(":")[0] for reason in found.because}
    if found.verdict is Verdict.SET_EP:
        kinds = {kind for kind in kinds if kind.startswith("--expert-model-parallel-size")}
    is_flag = {kind: kind.startswith("--") for kind in kinds}
    return [(found.verdict, f"`{kind}`" if is_flag[kind] else kind) for kind in kinds]


if __name__ == "__main__":
    print("\n\n".join("\n".join(table) for table in tables(judged(LIST))))
