"""A run's settings are judged by the table that training refuses them by."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_laer.config import Choice, Unproven
from megatron_laer.files.checks import quoted
from megatron_laer.support.refusal import LeftOut
from megatron_laer.support.table import REFUSALS
from megatron_laer.tools.recipes.proof import Proof, proof_of


class Verdict(Choice):
    """Kinds of judgement: a run works with FSEP as it is, with a change, or not.

    `SET_EP` uses no expert parallelism, which FSEP needs. `SPEED_ONLY` runs without some flags that
    only change the speed, and `PRECISION` without these and in bf16.
    """

    RUNS = "runs"
    SET_EP = "set-ep"
    SPEED_ONLY = "speed-only"
    PRECISION = "precision"
    REFUSED = "refused"


@dataclass(frozen=True)
class Judgement:
    """Verdict on a run with its reasons.

    Attributes:
        proof: what rows prove of the run without the flags in `drop`; None if nothing is known to
            be proved, or if it does not run.
        because: why it is refused; of what runs, why flags must go and what is not proved.
        drop: the flags without which it runs, or would once it used expert parallelism.
        if_none_of: settings that would change the verdict, and of which nothing was given.
    """

    verdict: Verdict
    proof: Proof | None
    because: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    if_none_of: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Return whether there is a way to run it that changes no more than speed or precision."""
        return self.verdict not in (Verdict.SET_EP, Verdict.REFUSED)


# Beyond them a size is a slip of the hand, and no row of the table looks.
_MOST = 10**6
_SIZES = (
    "num_experts expert_model_parallel_size expert_tensor_parallel_size "
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size"
).split()


def judge(
    settings: Namespace,
    allowed: Collection[Unproven] = (),
    *,
    also_refused: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> Judgement:
    """Judge parsed arguments, or the same attributes from elsewhere.

    Args:
        settings: every attribute that the table looks for is checked if it is there.
        allowed: the words of `--fsep-allow-unproven`.
        also_refused: what else keeps the run from working, which no argument tells.
        doubts: why nothing proves the run, if it is not refused.
    """
    _check_sizes(settings)
    found = [(row, text) for row in REFUSALS if (text := row.problem_with_flag(settings, allowed))]
    refused = {row.argument for row, _ in found}
    reasons = tuple(text for _, text in found)
    drop = tuple(row.flag for row, _ in found if row.left_out)
    if "expert_model_parallel_size" in refused and "num_experts" not in refused:
        return Judgement(Verdict.SET_EP, None, (*reasons, *also_refused), drop)
    blocking = (*(text for row, text in found if not row.left_out), *also_refused)
    if blocking:
        return Judgement(Verdict.REFUSED, None, blocking)
    lost = {row.left_out for row, _ in found}
    verdict = Verdict.RUNS
    if lost:
        verdict = Verdict.PRECISION if LeftOut.PRECISION in lost else Verdict.SPEED_ONLY
    doubts = [*doubts] + [
        f"{row.flag} {getattr(settings, row.argument)}: allowed by name, and nobody has run it"
        for row in REFUSALS
        if row.unproven in allowed and row.asks_for_unproven(settings, row.argument)
    ]
    if verdict is Verdict.PRECISION and not getattr(settings, "fp16", False):
        settings = Namespace(**vars(settings) | {"bf16": True})
    return Judgement(verdict, None if doubts else proof_of(settings), (*reasons, *doubts), drop)


def _check_sizes(settings: Namespace) -> None:
    for name in _SIZES:
        size = getattr(settings, name, None)
        if size is not None and size > _MOST:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {quoted(size)}: more than there can be; give at most {_MOST}")
