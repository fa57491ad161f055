"""Random cases of the parity check are repeatable by seed, cover every feature, and are legal."""

from __future__ import annotations

import pytest

from tests.parity.compare import Distance
from tests.parity.random import report
from tests.parity.random.draft import Draft
from tests.parity.random.generator import FEATURES, Case, draw
from tests.parity.random.judge import Judgement, Verdict
from tests.parity.random.settings import BALANCING, MODES, PLANNERS

FIRST = [134, 847, 763, 255]
CASES = [draw(seed) for seed in range(600)]
FAR = Distance(*(1.0,) * 5)


def values(case: Case) -> dict[str, list[str]]:
    """Return the values of FSEP's flags, none of which may occur twice."""
    found: dict[str, list[str]] = {}
    words = (case.row.flags + case.row.fsep).split()
    for word in words:
        if word.startswith("--"):
            assert word not in found, f"{case.seed}: {word} is given twice"
            found[word] = []
        else:
            found[[*found][-1]].append(word)
    return found


def test_a_seed_gives_the_same_case_again() -> None:
    assert [draw(case.seed) for case in CASES] == CASES
    assert len({str(case.row) for case in CASES}) == len(CASES)


def test_luck_is_the_same_everywhere() -> None:
    draft = Draft(1)
    assert [draft.pick(range(1000)) for _ in range(4)] == FIRST, "no seed gives what it gave"


def test_every_feature_is_drawn() -> None:
    assert {name for case in CASES for name in case.features} == FEATURES


def test_sizes_divide() -> None:
    for case in CASES:
        row, given = case.row, values(case)
        pipeline = int(given.get("--pipeline-model-parallel-size", ["1"])[0])
        assert row.ranks % case.model_parallel == 0
        for size in (row.expert_parallel, *row.stock_parallel):
            assert row.ranks // pipeline % size == 0
        assert all(row.experts % size == 0 for size in row.stock_parallel)
        assert row.accumulation % pipeline == 0
        assert int(given["--moe-router-topk"][0]) < row.experts
        if "--fsep-node-size" in given:
            assert row.expert_parallel % int(given["--fsep-node-size"][0]) == 0
        if row.capacity is not None:
            assert row.experts <= row.capacity * row.expert_parallel
            assert row.capacity <= row.experts
        if case.has("HybridEP"):
            assert row.capacity is not None and row.capacity * row.expert_parallel % 4 == 0


NEEDS = {
    "virtual pipeline": ("pipeline 2",),
    "gradients in bf16": ("bf16",),
    "shared experts' gate": ("shared experts",),
    "overlapped shared experts": ("shared experts",),
    "shared_experts": ("shared experts",),
    "probabilities on input": ("top-1",),
    "mla_up_proj": ("latent attention",),
    "expert bias": ("sigmoid", "square-root softplus"),
    "older counts": ("forecast", "adaptive"),
    "late plans waited for": ("forecast", "adaptive"),
    "restored once per step": ("random layouts, forecast", "forecast"),
    "fp32 gradients between nodes": ("restore by nodes",),
    "default tolerance": ("adaptive",),
    **dict.fromkeys(PLANNERS, ("forecast", "adaptive")),
    "sinkhorn": ("softmax",),
}
EXCLUDES = {
    "tokens by nodes": ("DeepEP", "HybridEP", "fused permutation"),
    "restore by nodes": ("flat restore",),
    "shared experts": ("linear bias",),
    "announced": ("sinkhorn", "quantile balancing", "fused router", "evaluation"),
    "SGD": ("distributed optimizer", "distributed optimizer, both overlaps"),
    "groups of experts": ("sinkhorn", "quantile balancing", "top-1"),
}


def test_a_feature_has_those_that_it_needs_and_none_that_it_excludes() -> None:
    for case in CASES:
        for name, needed in NEEDS.items():
            assert not case.has(name) or case.has(*needed), f"{case.seed}: {name}"
        for name, excluded in EXCLUDES.items():
            assert not (case.has(name) and case.has(*excluded)), f"{case.seed}: {name}"


@pytest.mark.parametrize("table", [BALANCING, MODES])
def test_one_setting_of_a_choice_is_drawn(table: dict[str, object]) -> None:
    assert all(sum(name in case.features for name in table) == 1 for case in CASES)


def test_a_fault_says_how_to_repeat_it() -> None:
    case = draw(7)
    beyond = Judgement(case, Verdict.BEYOND, distance=FAR)
    assert "python -m tests.parity.random --only 7" in report.line(beyond)
    assert "--only" not in report.line(Judgement(case, Verdict.EQUAL, distance=FAR))
