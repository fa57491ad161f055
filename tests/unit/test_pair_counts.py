"""Pairs of experts that tokens choose together: exact counts, and sums of a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_laer.runtime import pair_counts
from megatron_laer.runtime.pair_counts import PairCounts, count_pairs


def routing_map(seed: int, tokens: int, experts: int = 6, topk: int = 3) -> torch.Tensor:
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    chosen_TK = scores_TE.topk(topk, dim=1).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen_TK, value=True)


def slow_pairs(map_TE: torch.Tensor) -> list[list[int]]:
    experts = range(map_TE.shape[1])
    return [[int((map_TE[:, a] & map_TE[:, b]).sum()) for b in experts] for a in experts]


def test_pairs_are_exact_far_above_what_half_precision_holds() -> None:
    map_TE = routing_map(0, tokens=70_001)
    map_TE[:, 0] = True
    pairs_EE = count_pairs(map_TE)
    assert pairs_EE.dtype == torch.int64 and pairs_EE.tolist() == slow_pairs(map_TE)
    assert pairs_EE[0, 0] == 70_001


def counter(rank: int = 0, interval: int | None = 2, sampled: int = 0) -> PairCounts:
    groups: Any = SimpleNamespace(rank=rank, size=2, planner_rank=0, tokens=None)
    return PairCounts(groups, torch.device("cpu"), 6, interval, sampled)


def test_a_step_has_the_sum_of_its_microbatches_and_no_others() -> None:
    counted, maps = counter(), [routing_map(seed, 40) for seed in range(4)]
    with mock.patch.object(pair_counts.dist, "reduce") as reduce:
        for step in range(3):
            counted.begin_step(step, num_layers=2)
            counted.add(1, maps[0], begins=True)  # the step is repeated
            for number, map_TE in enumerate(maps):
                counted.add(1, map_TE, begins=number == 0)
            counted.end_step()
            found = counted.take()
            if step == 1:
                assert found is None
                continue
            assert found is not None
            pairs_LEE, chosen_LTE = found
            assert not pairs_LEE[0].any() and not chosen_LTE.size
            assert pairs_LEE[1].tolist() == slow_pairs(torch.cat(maps))
            assert counted.take() is None
        assert reduce.call_count == 2
    assert counted.sent_bytes == 0


def test_other_ranks_send_eight_bytes_for_each_pair_of_experts() -> None:
    counted = counter(rank=1, interval=1)
    counted.begin_step(5, num_layers=3)
    with mock.patch.object(pair_counts.dist, "reduce"):
        counted.end_step()
    assert counted.take() is None
    assert counted.sent_bytes == 8 * 3 * 6 * 6


def test_without_an_interval_nothing_is_counted_or_exchanged() -> None:
    counted = counter(interval=None)
    counted.begin_step(0, num_layers=2)
    with mock.patch.object(pair_counts, "count_pairs") as count:
        counted.add(0, routing_map(0, 5), begins=True)
        counted.end_step()
        assert counted.take() is None and not count.called


def test_sets_are_of_tokens_spread_over_the_first_microbatch() -> None:
    counted, map_TE = counter(rank=1, interval=1, sampled=4), routing_map(2, tokens=11)
    counted.begin_step(0, num_layers=1)
    counted.add(0, routing_map(3, tokens=11), begins=True)  # the step is repeated
    counted.add(0, map_TE, begins=True)
    counted.add(0, routing_map(4, tokens=11), begins=False)
    _, sets_LTE = counted._tables
    assert sets_LTE[0, 4:].bool().tolist() == map_TE[[0, 3, 6, 9]].tolist()
    assert not sets_LTE[0, :4].any(), "rows of the other rank"
    counted.add(0, map_TE[:3], begins=True)
    assert sets_LTE[0, 4:7].bool().tolist() == map_TE[:3].tolist() and not sets_LTE[0, 7].any()
