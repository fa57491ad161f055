"""Judgement of a run's settings by the table of training's refusals."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_laer.choices import Choice, Unproven
from megatron_laer.rules import (
    REFUSALS,
    WITH_FP8_EXPERTS,
    WITH_FSDP,
    LeftOut,
    Rule,
    problems_by,
)
from megatron_laer.tools.recipes.proof import Proof, proof_of


class Verdict(Choice):
    """Kinds of judgement: a run works with FSEP unchanged, with a change, or not.

    `SET_EP` lacks expert parallelism, which FSEP needs. `SPEED_ONLY` runs without some flags that
    only change the speed, and `PRECISION` without these and in bf16.
    """

    RUNS = "runs"
    SET_EP = "set-ep"
    SPEED_ONLY = "speed-only"
    PRECISION = "precision"
    REFUSED = "refused"


@dataclass(frozen=True)
class Judgement:
    """Verdict on a run, with its reasons in `because`.

    `proof` is for the run without the flags in `drop`; None if nothing proves it or it does not
    run. `allow` are the words that a run needs of `--fsep-allow-unproven`, given or not.
    """

    verdict: Verdict
    proof: Proof | None
    because: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    allow: tuple[Unproven, ...] = ()

    @property
    def runs(self) -> bool:
        """Return True if the run works with changes of speed and precision at most."""
        return self.verdict not in (Verdict.SET_EP, Verdict.REFUSED)


# Features that rows prove on a replacement: only a card is missing.
_PROVED_BY_ROWS = frozenset({Unproven.TE_GRAPHS, Unproven.FP8_EXPERTS})


def judge(
    settings: Namespace,
    allowed: Collection[Unproven] = (),
    *,
    also_refused: Sequence[str] = (),
) -> Judgement:
    """Judge parsed arguments, or an object with the same attributes.

    `allowed` are the words of `--fsep-allow-unproven`. `also_refused` are further reasons for a
    refusal, which no argument shows.
    """
    found_elsewhere = (
        *also_refused,
        *problems_by((*WITH_FP8_EXPERTS, *WITH_FSDP), _allowing(settings, allowed)),
    )
    also_refused = tuple(dict.fromkeys(found_elsewhere))
    asked = {word for row in REFUSALS if row.asks_for_unproven(settings) for word in row.words}
    allow = _PROVED_BY_ROWS & asked
    in_fp8 = _allowing(settings, {Unproven.FP8_EXPERTS})
    against_fp8_experts = problems_by(WITH_FP8_EXPERTS, in_fp8)
    if Unproven.DENSE_FP8 in allowed or against_fp8_experts:
        allow -= {Unproven.FP8_EXPERTS}
    found = _refused(settings, {*allowed, *allow})
    if any(row.flag.startswith("--cuda-graph") for row, _ in found):
        # Without modules Megatron would capture whole layers, so graphs are left out altogether.
        allow -= {Unproven.TE_GRAPHS}
        found = _refused(settings, {*allowed, *allow} - {Unproven.TE_GRAPHS})
    refused = {row.argument for row, _ in found}
    reasons = [text for _, text in found]
    if "fp8" in refused:
        reasons += against_fp8_experts
    drop = tuple(dict.fromkeys(row.flag for row, _ in found if row.left_out))
    if "expert_model_parallel_size" in refused and "num_experts" not in refused:
        return Judgement(Verdict.SET_EP, None, (*reasons, *also_refused), drop)
    blocking = (*(text for row, text in found if not row.left_out), *also_refused)
    if blocking:
        return Judgement(Verdict.REFUSED, None, blocking)
    lost = {row.left_out for row, _ in found}
    verdict = Verdict.RUNS
    if lost:
        verdict = Verdict.PRECISION if LeftOut.PRECISION in lost else Verdict.SPEED_ONLY
    doubts = [
        f"{row.flag} {getattr(settings, row.argument)}: allowed by name, and nobody has run it"
        for row in REFUSALS
        if set(row.words) & (set(allowed) - allow) and row.asks_for_unproven(settings)
    ]
    if "--cuda-graph-impl" in drop:
        settings = Namespace(**vars(settings) | {"cuda_graph_impl": "none"})
    if verdict is Verdict.PRECISION and not getattr(settings, "fp16", False):
        settings = Namespace(**vars(settings) | {"bf16": True, "fp8": None})
    proof = None if doubts else proof_of(settings)
    return Judgement(verdict, proof, (*reasons, *doubts), drop, tuple(sorted(allow)))


def _refused(settings: Namespace, allowed: Collection[Unproven]) -> list[tuple[Rule, str]]:
    settings = _allowing(settings, allowed)
    return [(row, text) for row in REFUSALS if (text := row.problem(settings))]


def _allowing(settings: Namespace, words: Collection[Unproven]) -> Namespace:
    return Namespace(**vars(settings) | {"fsep_allow_unproven": tuple(words)})
