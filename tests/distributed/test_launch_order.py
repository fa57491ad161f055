"""Ranks launch the same on every communicator, and in orders that cannot hang a device.

`tests/launch_order.py` states the checks and reasons; here Megatron's own loop is recorded.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu import weights
from megatron_laer.cpu.training import train
from tests.distributed.conftest import Trainings
from tests.launch_order import WITH_SPLITS, Launch, problems, recorded
from tests.parity.replay import train_row
from tests.parity.row import FSEP, HOMES
from tests.parity.rows import DELAYED, DIST_OPT, EXACT, FULL_RECOMPUTE, MOE_RECOMPUTE
from tests.probes import watching

PIPELINE = " --pipeline-model-parallel-size 2 --num-layers 4"
VIRTUAL = PIPELINE + " --num-layers-per-virtual-pipeline-stage 1"
COMBINED = " --bf16 --overlap-moe-expert-parallel-comm"
ADAPTIVE = " --fsep-set imbalance_tolerance=0.02 --fsep-late-plan wait"
NODES = " --fsep-node-size 2 --fsep-set restore_algorithm=node"
TOKENS = " --fsep-token-exchange node"

# Size of an FSEP group, and flags. Of 8 ranks, 4 are in each pipeline stage.
CASES = {
    "virtual pipeline, recompute, fresh layouts in four groups": (
        2,
        VIRTUAL + FULL_RECOMPUTE + DIST_OPT + EXACT,
    ),
    "pipeline, recompute of the experts, by nodes, tokens too": (
        4,
        PIPELINE + MOE_RECOMPUTE + NODES + ADAPTIVE + TOKENS,
    ),
    "experts at home, virtual pipeline, recompute, fresh layouts in four groups": (
        2,
        VIRTUAL
        + FULL_RECOMPUTE
        + DIST_OPT
        + ADAPTIVE
        + HOMES
        + " --fsep-set restore_algorithm=flat",
    ),
    "experts at home by relay, pipeline, recompute of the experts, tokens by nodes": (
        4,
        PIPELINE + MOE_RECOMPUTE + NODES + ADAPTIVE + TOKENS + HOMES,
    ),
    "combined 1F1B, delayed weight gradients, virtual pipeline, fresh layouts in four groups": (
        2,
        VIRTUAL + COMBINED + DELAYED + DIST_OPT + EXACT,
    ),
    "combined 1F1B, experts at home by relay, virtual pipeline, tokens by nodes": (
        4,
        VIRTUAL + COMBINED + NODES + ADAPTIVE + TOKENS + HOMES,
    ),
}


def launches_of(flags: list[str]) -> tuple[list[Launch], list[tuple[int, int]]]:
    """Return this rank's launches in a run, and (FSEP group, digest) of its fresh layouts."""
    from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner

    launches: list[Launch] = []
    fresh: list[tuple[int, int]] = []

    def note(planner: Any, _layer: Any, _counts_NE: Any, decision: Any, _s: float) -> None:
        if decision.replanned:
            fresh.append((planner.groups.index, decision.layout.digest))

    with (
        recorded(launches),
        watching((MicrobatchPlanner, "_note", note)),
        # Overlapping pipelines reduce parts of gradients, so whole ones cannot be compared.
        mock.patch.object(weights, "assemble", lambda _: {}),
    ):
        train_row(flags)
    return launches, fresh


@pytest.mark.parametrize("case", CASES)
def test_ranks_launch_in_orders_that_agree(trained: Trainings, case: str) -> None:
    group, extra = CASES[case]
    flags, options = f"{FSEP} --micro-batch-size 1{extra}", {"expert_parallel": group, "steps": 2}
    found = trained.each(flags, by=launches_of, size=8, **options)
    launches, fresh = map(list, zip(*found, strict=True))
    assert problems(launches) == []

    used = {launch.description for of_rank in launches for launch in of_rank}
    expected = {"FSEP_PARAMETERS", "FSEP_GRADIENTS"}
    if NODES in extra:
        expected = {
            f"{name}_{of}_NODE" for name in (*expected, "FSEP_TOKENS") for of in ("INTRA", "INTER")
        }
    assert expected <= used
    for of_rank in launches:
        check_connected_at_first(of_rank)
    layouts = [[digest for _, digest in of_rank] for of_rank in fresh]
    assert all(layouts)
    if group == 2:  # ranks 0 and 1 are a group, and so are 2 and 3; both are in the first stage
        assert layouts[0] == layouts[1] != layouts[2] == layouts[3]
    some_launches_swapped_are_found(launches, used & expected)


def check_connected_at_first(launches: list[Launch]) -> None:
    """Check that each rank sends to all others before a communicator of FSEP's is used."""
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(launch.group, launch)
    for launch in first.values():
        if launch.description.startswith("FSEP_"):
            assert launch.operation in WITH_SPLITS, launch
            assert launch.sizes == ((1,) * len(launch.members),) * 2, launch


def some_launches_swapped_are_found(launches: list[list[Launch]], of_fsep: set[str]) -> None:
    """Swap consecutive launches on one rank; the check must find each swap."""
    mine, swaps = launches[0], {"one communicator": 0, "two communicators": 0}
    for number, (first, second) in enumerate(pairwise(mine)):
        if not {first.description, second.description} & of_fsep:
            continue
        if first.group == second.group and first.sizes != second.sizes:
            kind = "one communicator"
        elif first.group != second.group and len({*first.members} & {*second.members}) > 1:
            kind = "two communicators"
        else:
            continue
        if swaps[kind] == 3:
            continue
        swaps[kind] += 1
        swapped = [*mine]
        swapped[number] = replace(second, batch=first.batch)
        swapped[number + 1] = replace(first, batch=second.batch)
        (problem,) = problems([swapped, *launches[1:]])[:1]
        assert problem.startswith("collective" if kind == "one communicator" else "a circle")
    assert swaps["two communicators"] > 0


def exchanges_of(flags: list[str]) -> tuple[int, int]:
    """Return the number of token All-to-Alls that this rank launched, and of those priced."""
    from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner

    launches: list[Launch] = []
    priced: list[int] = []

    def note(planner: Any, *_: Any) -> None:
        priced.append(planner.pass_layouts.guard.costs.token_passes)

    with recorded(launches), watching((MicrobatchPlanner, "_note", note)):
        train(flags)
    of_tokens = [of for of in launches if of.description == "EXPERT_MODEL_PARALLEL_GROUP"]
    return sum(of.operation in WITH_SPLITS for of in of_tokens), sum(priced)


@pytest.mark.parametrize(
    "extra",
    ["", FULL_RECOMPUTE, MOE_RECOMPUTE, HOMES],
    ids=["none", "full", "selective", "experts at home"],
)
def test_a_layer_exchanges_tokens_as_often_as_it_is_priced(trained: Trainings, extra: str) -> None:
    for launched, priced in trained.each(FSEP + extra, by=exchanges_of, experts=4, steps=2):
        # Hidden states are dispatched with their probabilities, and combined without.
        assert launched == priced * 3 // 2 > 0


def launch(group: str, members: tuple[int, ...], batch: int, **changes: Any) -> Launch:
    made = Launch(group, group, members, "allreduce", (1,), None, batch)
    return replace(made, **changes)


def test_operations_sizes_and_messages_that_do_not_fit_are_found() -> None:
    pair = (0, 1)
    sizes = [((1, 2), (1, 3)), ((3, 4), (2, 4))]  # received from each, sent to each
    exchange = [
        [launch("a", pair, 0, operation="all_to_all_single", sizes=of_rank)] for of_rank in sizes
    ]
    assert problems(exchange) == []
    assert "sent" in problems([exchange[0], exchange[0]])[0]
    assert "sizes" in problems([[launch("a", pair, 0)], [launch("a", pair, 0, sizes=(2,))]])[0]
    assert "operations" in problems([[launch("a", pair, 0)], exchange[0]])[0]
    assert "not launched by [1]" in problems([[launch("a", pair, 0)], []])[0]
    message = launch("p", pair, 0, operation="send", peer=1)
    assert problems([[message], []]) == ["messages from 0 to 1, 0: not launched by ['recv']"]
