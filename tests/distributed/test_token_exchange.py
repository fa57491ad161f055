"""Tokens that go through nodes bring experts the same bits, and send as many bytes as the formulas.

Functions with a Case run on a rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.token_traffic import dispatch_rows, metadata_bytes, metadata_bytes_backward
from megatron_laer.choices import TokenExchange
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.distributed.conftest import Trainings
from tests.parity.row import FSEP
from tests.parity.rows import TOKENS
from tests.probes import watching
from tests.token_exchange import (
    HIDDEN,
    Case,
    Outcome,
    Sent,
    gloo_groups,
    make_dispatcher,
    plan_of,
    routing_maps,
    routing_of,
    run,
)

EVEN = Case((24, 24, 24, 24), 2)
CASES = {
    "nodes of 1": replace(EVEN, node_size=1),
    "nodes of 2": EVEN,
    "one node": replace(EVEN, node_size=4),
    "tokens on some ranks, top-1": Case((7, 0, 0, 19), 2, top_k=1),
    "empty nodes": Case((9, 5, 11, 1), 2, capacity=8, top_k=1, crowded=True),
    "no tokens": Case((0, 0, 0, 0), 2),
    "a slot per rank": Case((13, 8, 5, 30), 2, capacity=1, experts=4, top_k=3),
    "all experts": Case((16, 3, 4, 8), 2, capacity=6, top_k=8),
}


def both(case: Case, dtype_name: str) -> tuple[Outcome, Outcome, Outcome]:
    """Dispatch by Megatron's rows, through nodes, and so again as under a checkpoint."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype_name), "with_shared": True}
    with gloo_groups(case.node_size) as groups:
        by_rank = run(case, groups, "own", **options)
        nodes = run(case, groups, "nodes", **options)
        return by_rank, nodes, run(case, groups, "nodes", rerun=True, **options)


# Both stages, forward and backward.
TIMED = ["dispatch layer 1", "dispatch layer 1, inside node"]
TIMED += ["combine layer 1, inside node", "combine layer 1"]
TIMED += [f"{name}, backward" for name in TIMED[::-1]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_experts_get_the_same_bits_and_sums_differ_by_rounding(
    ranks: RankPools, case: str, dtype: str
) -> None:
    for by_rank, nodes, again in ranks(CASES[case].ranks).run(both, CASES[case], dtype):
        for mine, stocks in zip(nodes.experts, by_rank.experts, strict=True):
            assert torch.equal(mine, stocks)
        # One bf16 rounding per sum: over a rank's pairs, a node's ranks, and nodes.
        bound = {} if dtype == "float32" else {"rtol": 5e-2, "atol": 5e-2}
        for mine, stocks in zip(
            (nodes.combined, *nodes.grads), (by_rank.combined, *by_rank.grads), strict=True
        ):
            torch.testing.assert_close(mine, stocks, **bound)
        assert torch.equal(nodes.grads[1], by_rank.grads[1]) or dtype == "bfloat16"
        for mine, repeated in zip(
            (nodes.combined, *nodes.grads), (again.combined, *again.grads), strict=True
        ):
            assert torch.equal(mine, repeated)
        assert nodes.calls == by_rank.calls and len(by_rank.calls) == 7, "of shared experts"
        assert [event for event, _ in nodes.timed] == ["begin", "end"] * (len(nodes.timed) // 2)
        if CASES[case] is EVEN:
            assert [name for event, name in nodes.timed if event == "begin"] == TIMED


def exchanges_of_sizes(case: Case) -> list[int]:
    """Return the exchanges of sizes after a first pass, and after its re-run."""
    import torch.distributed as dist

    counts = []
    with gloo_groups(case.node_size) as groups:
        plan, map_TE = plan_of(case, groups.rank), routing_maps(case)[groups.rank]
        hidden, probs = torch.zeros(len(map_TE), HIDDEN), map_TE.float()
        exchange = mock.Mock(side_effect=dist.all_to_all_single)
        with mock.patch.object(dist, "all_to_all_single", exchange):
            for of_pass, of_router in ((plan, map_TE), (plan.for_rerun(map_TE), ~map_TE)):
                dispatcher = make_dispatcher(of_pass, case.top_k, "nodes", groups)
                dispatcher.dispatch_preprocess(hidden, of_router, probs)
                counts.append(exchange.call_count)
    return counts


def test_a_rerun_under_a_checkpoint_exchanges_no_sizes(ranks: RankPools) -> None:
    assert ranks(4).run(exchanges_of_sizes, EVEN) == [[1, 1]] * 4


# Top-4 of 12 experts, so that tokens share nodes and ranks; one rank has no token.
BYTES = Case((20, 9, 31, 0, 14, 25, 7, 18), 1, capacity=3, experts=12, top_k=4)


def sent_by(case: Case) -> dict[bool, Outcome]:
    with gloo_groups(case.node_size) as groups:
        return {nodes: run(case, groups, "nodes" if nodes else "own") for nodes in (False, True)}


def received_by_link(sent: list[Sent], rank: int, node_size: int) -> tuple[list[int], list[int]]:
    """Return rows of hidden states that a rank received, and other bytes: intra, inter."""
    hidden, other = [0, 0], [0, 0]
    for collective in sent:
        for source, rows in enumerate(collective.received_N):
            between = source // node_size != rank // node_size
            if source == rank:
                continue
            if collective.is_hidden:
                assert collective.row_bytes == 4 * HIDDEN
                hidden[between] += rows
            else:
                other[between] += rows * collective.row_bytes
    return hidden, other


@pytest.mark.parametrize("node_size", [1, 2, 4, 8])
def test_rows_and_bytes_of_real_collectives_equal_the_formulas(
    ranks: RankPools, node_size: int
) -> None:
    case = replace(BYTES, node_size=node_size)
    found = ranks(8).run(sent_by, case)
    routing = routing_of(case)
    for nodes, exchange in ((False, TokenExchange.RANK), (True, TokenExchange.NODE)):
        rows = dispatch_rows(routing, exchange)
        # Probabilities and, through nodes, the numbers of rows, their bits, and the sizes.
        more = metadata_bytes(routing, exchange)
        of_grads = metadata_bytes_backward(routing)
        for rank, outcomes in enumerate(found):
            sent = outcomes[nodes].sent
            dispatch, beside = received_by_link(sent["dispatch"], rank, node_size)
            combine, none = received_by_link(sent["combine"], rank, node_size)
            backward, grads = received_by_link(sent["backward"], rank, node_size)
            assert dispatch == [rows.intra_N[rank], rows.inter_N[rank]]
            # A rank receives in combine as much as it sends in dispatch.
            assert combine == [rows.sent_intra_N[rank], rows.sent_inter_N[rank]]
            assert none == [0, 0]
            assert backward == [sum(pair) for pair in zip(dispatch, combine, strict=True)]
            assert beside == [more.intra_N[rank], more.inter_N[rank]]
            assert grads == [of_grads.intra_N[rank], of_grads.inter_N[rank]]
    by_rank, through_nodes = (dispatch_rows(routing, exchange) for exchange in TokenExchange)
    assert through_nodes.inter_N.sum() < by_rank.inter_N.sum() or node_size == 8
    check_that_backward_keeps_rows(case, found)


def check_that_backward_keeps_rows(case: Case, found: list[dict[bool, Outcome]]) -> None:
    # By receiving rank and collective, from each rank: the last one brings rows where experts are.
    came = [
        [one.received_N for one in outcomes[True].sent["dispatch"] if one.is_hidden]
        for outcomes in found
    ]
    for rank, outcomes in enumerate(found):
        by_rank, nodes = (outcomes[nodes] for nodes in (False, True))
        received, row_bytes = len(nodes.experts[0]), 4 * HIDDEN
        routed = int(routing_maps(case)[rank].sum())
        # The order of received rows, and the experts' own weights, are the same in both.
        of_pairs = (8 + 4) * received
        assert by_rank.kept_bytes == row_bytes * received + of_pairs + 16 * routed
        rows = sum(came[rank][-1])
        sent = sum(received_N[rank] for of_rank in came for received_N in of_rank)
        of_maps = 4 * received + 4 * sent + 8 * routed
        assert nodes.kept_bytes == row_bytes * rows + of_pairs + of_maps
        assert rows < received


def refills(flags: list[str]) -> int:
    """Return how often a run's backward passes spread rows that were kept."""
    from megatron_laer.layer.dispatch import row_map

    refilled = 0

    def count(*_: Any) -> None:
        nonlocal refilled
        refilled += 1

    with watching((row_map, "_refill", count)):
        train(flags)
    return refilled


@pytest.mark.parametrize(
    "flags", ["", " --moe-apply-probs-on-input --moe-router-topk 1 --moe-router-pre-softmax"]
)
def test_experts_in_megatrons_loop_keep_rows(trained: Trainings, flags: str) -> None:
    flags += FSEP + TOKENS.format(1)
    assert trained.each(flags, by=refills, global_batch=4) == [3 * 2] * 2
