"""Ranks that would decide otherwise than the rest of their group are found and named.

They run Megatron's own loop, whose ranks are given other files, versions or decisions.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from megatron_laer.cpu.training import rank_of_environment, train
from megatron_laer.planner.cluster_files import cluster_text, load_cluster
from megatron_laer.planner.layout import ExpertLayout
from tests.distributed.conftest import Trainings
from tests.faults.injected import current_step
from tests.parity.row import FSEP

OTHER_NUMPY = f"{np.__version__}+other"


def train_with_other_rank(
    flags: list[str], rank: int, others: str, numpy_version: str | None = None
) -> None:
    mine = rank_of_environment() == rank
    with contextlib.ExitStack() as stack:
        if mine and numpy_version is not None:
            stack.enter_context(mock.patch.object(np, "__version__", numpy_version))
        train([*flags, *others.split()] if mine else flags)


def test_a_rank_with_another_solve_time_is_named_on_every_rank_of_the_world(
    trained: Trainings, tmp_path: Path
) -> None:
    shipped = load_cluster("cpu-gloo")
    base_s = shipped.solve.base_s
    solve = replace(shipped.solve, base_s=base_s * 10)
    other = tmp_path / "cluster.yaml"
    other.write_text(cluster_text(replace(shipped, solve=solve)))
    # Two groups of two ranks: the first has no rank that differs, and must not wait for the other.
    given = FSEP, 3, f"--fsep-set cluster={other}"
    message = trained.refused(*given, by=train_with_other_rank, size=4)
    assert message.startswith("rank 2: the ranks of its FSEP group differ: cluster.solve.base_s ")
    assert f"{base_s * 10!r} on rank 3" in message and f"{base_s!r} on rank 2" in message


def test_a_rank_with_another_numpy_or_other_flags_is_named(trained: Trainings) -> None:
    message = trained.refused(FSEP, 1, "", OTHER_NUMPY, by=train_with_other_rank)
    assert f"NumPy is {OTHER_NUMPY} on rank 1 and {np.__version__} on rank 0." in message
    message = trained.refused(FSEP, 0, "--fsep-set plan_lag=3", by=train_with_other_rank)
    assert "--fsep-set plan_lag is " in message and "3 on rank 0" in message


def train_with_other_decision(flags: list[str], rank: int, step: int) -> None:
    """Train; one rank's first decision of a step swaps experts between two slots of rank 0.

    Sizes stay the same, so that the exchanges before the next one of counts complete.
    """
    from megatron_laer.planner.guard import Decision, Guard

    decide, decided = Guard.decide, 0

    def decide_otherwise(self: Any, *args: Any) -> Decision:
        nonlocal decided
        decision = decide(self, *args)
        if rank_of_environment() != rank or current_step() != step:
            return decision
        decided += 1
        if decided > 1:
            return decision
        layout = decision.layout
        slots = layout.to_list()
        slots[: layout.capacity] = slots[: layout.capacity][::-1]
        swapped = ExpertLayout.from_slots(
            layout.num_ranks, layout.capacity, layout.num_experts, slots
        )
        assert swapped != layout
        return replace(decision, layout=swapped)

    with mock.patch.object(Guard, "decide", decide_otherwise):
        train(flags)


def test_a_rank_that_decides_otherwise_is_named_at_the_next_exchange(trained: Trainings) -> None:
    exact, kind = FSEP + " --fsep-plan-mode exact", "LayoutMismatchError"
    options = {"size": 4, "expert_parallel": 4, "steps": 4}
    message = trained.refused(exact, 2, 2, by=train_with_other_decision, kind=kind, **options)
    # The other decision was on layer 1.
    assert message.startswith("FSEP layer 2: rank 2 (place 2 in the group) holds version 0, ")
    assert "ranks decided differently from the same counts" in message
    assert "step boundaries" not in message, "the planned layouts are the same"
