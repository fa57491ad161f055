"""Plain loops that define the fast code's results, for tests only. They are slow.

Legend: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import check_node_size
from megatron_laer.planner.layout import ExpertLayout


def quota_NS(counts_NE: Int64, layout: ExpertLayout, node_size: int) -> Int64:
    """Return the even split as a matrix: tokens from each source to each slot, int64 [N, S]."""
    check_node_size(layout.num_ranks, node_size)
    experts = layout.to_list()
    quota = np.zeros((layout.num_ranks, layout.num_slots), dtype=np.int64)
    for source in range(layout.num_ranks):
        for expert in range(layout.num_experts):
            replicas = [slot for slot, held in enumerate(experts) if held == expert]
            in_node = [
                slot
                for slot in replicas
                if slot // layout.capacity // node_size == source // node_size
            ]
            chosen = in_node or replicas
            share, left = divmod(int(counts_NE[source, expert]), len(chosen))
            for slot in chosen:
                quota[source, slot] = share
            for extra in range(left):
                quota[source, chosen[(source + extra) % len(chosen)]] += 1
    return quota


def token_runs(layout: ExpertLayout, row_S: Int64, columns_NC: Int64) -> dict[str, list[int]]:
    """Return the runs of rows between which one rank's tokens move, in the order they are packed.

    By slot: the start and end of its places among its expert's tokens, and its first row in the
    send buffer. Then the slots by expert, and each expert's first. By arrival, in order of slot and
    then of rank: the shift between a row's places in both orders, and each run's rows. By source:
    the shift from a row of the send buffer to its pair by expert, and the rows of each run.
    """
    experts, slots = layout.to_list(), range(layout.num_slots)
    ranks, places = range(layout.num_ranks), range(layout.capacity)
    by_expert = sorted(slots, key=lambda slot: (experts[slot], slot))

    def before(order: list[int], slot: int) -> int:
        return sum(int(row_S[other]) for other in order[: order.index(slot)])

    starts = [
        sum(int(row_S[other]) for other in range(slot) if experts[other] == experts[slot])
        for slot in slots
    ]
    arrived = [(rank, slot) for rank in ranks for slot in places]
    sorted_ = [(rank, slot) for slot in places for rank in ranks]

    def first(order: list[tuple[int, int]], run: tuple[int, int]) -> int:
        return sum(int(columns_NC[other]) for other in order[: order.index(run)])

    received = int(columns_NC.sum())
    return {
        "starts_S": starts,
        "ends_S": [start + int(row_S[slot]) for slot, start in enumerate(starts)],
        "first_row_S": [before(list(slots), slot) for slot in slots],
        "by_expert_S": by_expert,
        "first_E1": [
            sum(held < expert for held in experts) for expert in range(layout.num_experts + 1)
        ],
        "arrival_shifts": [
            *(first(arrived, run) - first(sorted_, run) for run in sorted_),
            *(first(sorted_, run) - first(arrived, run) - received for run in arrived),
        ],
        "arrival_counts": [int(columns_NC[run]) for run in (*sorted_, *arrived)],
        "source_shifts_S": [before(by_expert, slot) - before(list(slots), slot) for slot in slots],
        "source_counts_S": row_S.tolist(),
    }
