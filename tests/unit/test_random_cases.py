"""Random cases of the parity check are repeatable by seed, cover every feature, and are legal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch

from megatron_laer.cpu.ranks import Raised
from megatron_laer.cpu.training import Record
from tests.parity.random.generator import Case, Draft, draw
from tests.parity.random.judge import Verdict, judge
from tests.parity.random.on_ranks import Outcome
from tests.parity.random.rules import refusals
from tests.parity.random.settings import BALANCING, FP8, GRAPHS, MODES, SETTINGS
from tests.parity.row import AT_HOME
from tests.parity.rows import BEHIND_DISPATCH, COMBINED, DELAYED

IN_FP8, GRAPHED = ([*table][1:] for table in (FP8, GRAPHS))
CASES = [draw(seed) for seed in range(1000)]


def test_a_seed_gives_the_same_case_again() -> None:
    assert [draw(case.seed) for case in CASES] == CASES
    assert len({str(case.row) for case in CASES}) == len(CASES)
    draft = Draft(1)
    found = [draft.pick(range(1000)) for _ in range(4)]
    assert found == [134, 847, 763, 255], "no seed gives what it gave"


def test_every_feature_is_drawn_after_those_that_it_needs_and_none_that_it_excludes() -> None:
    for case in CASES:
        for table in (BALANCING, MODES):
            assert sum(name in case.features for name in table) == 1
        for at, name in enumerate(case.features):
            before, setting = {*case.features[:at]}, SETTINGS[name]
            assert before.isdisjoint(setting.never), f"{case.seed}: {name}"
            assert not setting.needs or before & {*setting.needs}, f"{case.seed}: {name}"
    assert {name for case in CASES for name in case.features} == {*SETTINGS}


def test_no_case_recomputes_a_dense_layer_with_a_bias_which_megatron_does_without_end() -> None:
    dense = {"first layer dense", "experts in every second layer"}
    checkpointed = [case for case in CASES if case.has("mlp") and case.has("linear bias")]
    assert checkpointed and all(dense.isdisjoint(case.features) for case in checkpointed)


def test_schedules_are_drawn_where_megatron_takes_them_and_stock_has_the_plain_one() -> None:
    combined = [case for case in CASES if case.has("combined 1F1B")]
    assert len(combined) >= 20
    for case in combined:
        assert case.has("bf16") and case.row.expert_parallel != 1
        assert case.has("virtual pipeline") or not case.has("pipeline 2")
    together = {"combined 1F1B", "delayed weight gradients", "fused weight gradients"}
    assert any(together <= {*case.features} for case in CASES)
    for case in CASES:
        moves = case.has("combined 1F1B", "weight gradients behind the dispatch")
        plain, own = case.plain_schedule("data"), case.row.fsep_run("data")
        assert moves == (plain is not None)
        if plain is not None:
            left_out = {*own[1]} - {*plain[1]}
            assert left_out <= {*(COMBINED + DELAYED + BEHIND_DISPATCH).split()}
            assert left_out.isdisjoint(case.row.reference("data")[1])
            assert left_out <= {*case.stock_in_schedule("data")[1]}


def test_features_go_together_unless_the_rules_of_fsep_refuse_them() -> None:
    features = ("LoRA on experts", *IN_FP8, *GRAPHED, "router replay", "Megatron-FSDP, optim")
    found = {
        pair for case in CASES for pair in combinations(features, 2) if {*pair} <= {*case.features}
    }
    never = {*product(features[:4], features[:4]), *product(GRAPHED, GRAPHED)}
    never |= {(name, "router replay") for name in GRAPHED[1:]}
    never |= {(name, features[-1]) for name in (*features[:4], *GRAPHED)}
    assert {*combinations(features, 2)} - found - never == set()
    for name, given, instead, reason in (
        ("mxfp8", AT_HOME, " --fsep-sharding rows", "--fsep-allow-unproven fp8-experts with"),
        ("LoRA on experts", AT_HOME, " --fsep-sharding rows", "LoRA on linear_fc1"),
        ("Muon", AT_HOME, " --fsep-sharding rows", "--optimizer muon with --fsep-sharding rows"),
        ("Megatron-FSDP, optim", " optim", " optim --fp8-format e4m3", "fp8-format e4m3 with"),
    ):
        others = IN_FP8 if name not in IN_FP8 else ()
        row = case_with(name, but=("permuted homes", *others)).row
        assert refusals(row) == []
        flags, fsep = (part.replace(given, instead, 1) for part in (row.flags, row.fsep))
        changed = replace(row, flags=flags, fsep=fsep)
        assert any(reason in text for text in refusals(changed)), refusals(changed)


@dataclass
class Made:
    """Replacement of pools whose gradients are 1 for stock, and larger by a given gap elsewhere.

    `apart` has the gaps of FSEP by itself, given stock's choices, and with exact sums. `floor` is
    that of the other stock run, or None where it does not train. Commands with the word in `fails`
    do not train. `scheduled` is the gap that FSEP has besides in combined 1F1B.
    """

    apart: tuple[float, float, float] = (0.0, 0.0, 0.0)
    floor: float | None = 0.0
    fails: str = "never"
    scheduled: float = 0.0
    runs: int = 0

    def __call__(self, _size: int) -> Made:
        return self

    def close(self) -> None: ...

    def run_raw(self, *arguments: Any, **_: Any) -> list[Any]:
        _, flags, _, given, exact, *_ = arguments
        self.runs += 1
        if self.fails in flags:
            return [Raised("ValueError", "is\nnot possible", "")]
        if "fsep" in flags:
            apart = self.apart[2 if exact else 1 if given is not None else 0]
            apart += self.scheduled * (COMBINED.strip() in flags)
        elif self.runs == 1:
            apart = 0.0
        elif self.floor is None:
            return [Raised("ValueError", "has no such size", "")]
        else:
            apart = self.floor
        record = Record(
            losses=[1.0],
            grad_norms=[1.0],
            first_grads={"weight": torch.tensor([1.0 + apart], dtype=torch.float64)},
            weights={"weight": torch.ones(1)},
        )
        return [Outcome(record, np.array([[[0, 1]]], np.int16))]


def case_with(*names: str, but: tuple[str, ...] = ()) -> Case:
    return next(
        case
        for case in CASES
        if case.chooses
        and case.row.gradients
        and case.row.stock_parallel[0] != case.row.stock_parallel[1]
        and {*names} <= {*case.features}
        and not case.has(*but)
    )


PLAIN = case_with("fp32", "Adam", "no fp8")
BF16_NODES = case_with("bf16", "no fp8", "tokens by nodes")
IN_PARTS = case_with("combined 1F1B", "random layouts")
BF16_RANKS = case_with("bf16", "no fp8", but=("tokens by nodes",))


@pytest.mark.parametrize(
    ("case", "made", "verdict"),
    [
        (PLAIN, Made(), Verdict.EQUAL),
        (PLAIN, Made((9e-7, 0, 0), floor=3e-7), Verdict.EQUAL),
        (PLAIN, Made((2e-6, 2e-6, 0), floor=3e-7), Verdict.BEYOND),
        (PLAIN, Made((2e-6, 2e-7, 0), floor=3e-7), Verdict.NEAR_TIES),
        (PLAIN, Made((2e-5, 2e-5, 0), floor=9e-6), Verdict.UNSTEADY),
        (PLAIN, Made(fails="fsep"), Verdict.FAILED),
        (PLAIN, Made(fails="--seed"), Verdict.SKIPPED),
        (BF16_NODES, Made((1e-2, 0, 0), floor=5e-3), Verdict.WITHIN_FLOORS),
        (BF16_NODES, Made((1e-2, 0, 0), floor=None), Verdict.WITHIN_BOUND),
        (BF16_NODES, Made((1e-2, 1e-2, 1e-2), floor=5e-4), Verdict.BEYOND),
        (BF16_NODES, Made((5e-2, 1e-2, 1.0), floor=5e-3), Verdict.NEAR_TIES),
        (BF16_NODES, Made((5e-2, 4e-2, 1e-2), floor=5e-3), Verdict.ROUNDING),
        (BF16_NODES, Made((5e-2, 4e-2, 3e-2), floor=5e-3), Verdict.BEYOND),
        (BF16_RANKS, Made((5e-2, 4e-2, 0), floor=5e-3), Verdict.BEYOND),
        (IN_PARTS, Made((1e-3, 0, 0), floor=5e-3), Verdict.WITHIN_FLOORS),
        (IN_PARTS, Made((1e-3, 0, 0), floor=5e-3, scheduled=1e-6), Verdict.BEYOND),
        (IN_PARTS, Made(fails=COMBINED.strip()), Verdict.SKIPPED),
        (IN_PARTS, Made(fails="fsep"), Verdict.FAILED),
    ],
)
def test_a_verdict_follows_from_distances(case: Case, made: Made, verdict: Verdict) -> None:
    judgement = judge(case, made, "text")  # type: ignore[arg-type]
    assert judgement.verdict is verdict
    assert verdict.is_fault == (verdict in (Verdict.BEYOND, Verdict.FAILED))
    assert "\n" not in judgement.message
