"""Traffic formulas: elements that exchanges of parameters and gradients put on the links.

Two algorithms move the same values. `flat` is one All-to-All over all ranks. `node` sends each
distinct expert of a node across nodes once, and spreads it inside the node. Across nodes, rank g of
each node ("place" g) exchanges with rank g of the others. The runtime's exchanges count their
traffic; tests compare it with these formulas.

With experts at home, only replica slots are fetched. `flat` sends whole experts from their homes
(*direct*). `node` has one hop more (*relay*). Homes spread the rows of each fetched expert over all
ranks, which go on as with rows of all experts.

Legend: N ranks, E experts, C slots per rank that can be fetched, S = N·C such slots, G ranks per
node, M = N/G nodes. A matrix has R rows and K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.planner.placed import Placed, node_sources, row_bounds


@dataclass(frozen=True, eq=False)
class Traffic:
    """Elements of one exchange per rank and link class, int64 [N], without those that stay.

    Elements received (`intra_N`, `inter_N`) and sent are separate because their maxima differ.
    Ranks of a node with many distinct experts receive more than others send; with few changed
    slots, nearly all ranks send while few receive. Links are full duplex, so the larger of the two
    counts.
    """

    intra_N: Int64
    inter_N: Int64
    sent_intra_N: Int64
    sent_inter_N: Int64

    def seconds(
        self,
        algorithm: ExchangeAlgorithm,
        bytes_per_element: float,
        intra_bytes_per_s: float,
        inter_bytes_per_s: float,
        inter_bytes_per_element: float | None = None,
    ) -> float:
        """Predict the duration of an exchange from each rank's own link rates, without latency.

        `flat` drives both link classes at once: the slower class of the slowest rank counts. `node`
        runs one collective after the other, so their times add up.
        """
        inter_bytes = inter_bytes_per_element or bytes_per_element
        intra_s_N = np.maximum(self.intra_N, self.sent_intra_N) * (
            bytes_per_element / intra_bytes_per_s
        )
        inter_s_N = np.maximum(self.inter_N, self.sent_inter_N) * (inter_bytes / inter_bytes_per_s)
        if algorithm == ExchangeAlgorithm.FLAT:
            return float(np.maximum(intra_s_N, inter_s_N).max())
        return float(intra_s_N.max() + inter_s_N.max())

    def reversed(self) -> Traffic:
        return Traffic(self.sent_intra_N, self.sent_inter_N, self.intra_N, self.inter_N)

    def times(self, factor: int) -> Traffic:
        return Traffic(
            intra_N=self.intra_N * factor,
            inter_N=self.inter_N * factor,
            sent_intra_N=self.sent_intra_N * factor,
            sent_inter_N=self.sent_inter_N * factor,
        )


def restore_traffic(
    placed: Placed,
    matrices: Sequence[tuple[int, int]],
    algorithm: ExchangeAlgorithm,
    changed_S: Bool | None = None,
    *,
    before: Placed | None = None,
) -> Traffic:
    """Count the elements that one restore moves.

    Rank n, place g of node J, has c_n slots to fetch and r_n rows; node J fetches F_J distinct
    experts. Per matrix, and times K, rank n receives

        flat  c_n · (rows of its node - r_n) intra   c_n · (R - rows of its node) inter
        node  c_n · (R - rows of its place) intra    F_J · (rows of its place - r_n) inter

    A place's rows are those of rank g of every node. F_J excludes experts that node J still has
    from the layout before: one of its ranks with the expert gives each place its rows. So rank n
    also receives (H_J - h_n) · (rows of its place) intra, with H_J such experts in the node, h_n
    given by n.

    Since F_J is at most the sum of c_n over the node, `node` never lets a node receive more from
    other nodes than `flat`. The same holds for each rank if N divides R and all ranks of the node
    fetch equally many slots.

    With home slots, c_n and F_J are of replica slots. Let d_n be the fetches of experts from home
    n, each by each slot, and x_n the different experts among them. Then, times K,

        flat  n receives c_n · R and sends d_n · R, from and to their ranks
        node  n also receives (x of all others) · r_n and sends x_n · (R - r_n), in front

    Args:
        changed_S: replica slots to fetch, by ranks that keep nothing else; all by default. Empty
            slots are not fetched.
        before: instead of `changed_S`, the layout under which all ranks keep restored experts.
    """
    assert changed_S is None or before is None, "changed_S follows from the layout before"
    if changed_S is None:
        changed_S = placed.changed_S(before)
    if changed_S.shape != placed.filled_S.shape:
        raise ValueError(f"changed_S has shape {changed_S.shape}, expected {placed.filled_S.shape}")
    changed_S = changed_S & placed.filled_S
    geometry = placed.geometry
    num_ranks, num_nodes, node_size = geometry.num_ranks, geometry.num_nodes, geometry.node_size
    at_home = geometry.sharding == Sharding.EXPERTS
    if at_home and algorithm == ExchangeAlgorithm.FLAT:
        return _direct_traffic(placed, matrices, changed_S)

    node_N = np.arange(num_ranks) // node_size
    fetched_N = changed_S.reshape(num_ranks, -1).sum(axis=1, dtype=np.int64)
    fetched_J = fetched_N.reshape(-1, node_size).sum(axis=1)
    # A group on one node has every expert's rows there anyway.
    kept = None if num_nodes == 1 else before
    sources = node_sources(placed, node_size, changed_S, kept)
    far_J = np.bincount(sources.fetched_pairs // geometry.num_experts, minlength=num_nodes)
    given_N = np.bincount(sources.shared_slots // geometry.replica_slots, minlength=num_ranks)
    given_J = given_N.reshape(-1, node_size).sum(axis=1)
    spread_N = np.zeros(num_ranks, dtype=np.int64)
    if at_home:
        homes_X = np.unique(placed.replica_expert_S[changed_S]) // geometry.home_slots
        spread_N = np.bincount(homes_X, minlength=num_ranks)
    spread_J = spread_N.reshape(-1, node_size).sum(axis=1)

    received_intra_N, received_inter_N, sent_intra_N, sent_inter_N = np.zeros(
        (4, num_ranks), dtype=np.int64
    )
    for rows, columns in matrices:
        bounds = np.asarray(row_bounds(rows, num_ranks), dtype=np.int64)
        rows_N = bounds[1:] - bounds[:-1]
        rows_JG = rows_N.reshape(-1, node_size)
        place_rows_N = np.tile(rows_JG.sum(axis=0), num_nodes)
        node_rows_N = rows_JG.sum(axis=1)[node_N]
        received_intra_N += (spread_J[node_N] - spread_N) * rows_N * columns
        received_inter_N += (spread_N.sum() - spread_J[node_N]) * rows_N * columns
        sent_intra_N += spread_N * (node_rows_N - rows_N) * columns
        sent_inter_N += spread_N * (rows - node_rows_N) * columns
        if algorithm == ExchangeAlgorithm.FLAT:
            received_intra_N += fetched_N * (node_rows_N - rows_N) * columns
            received_inter_N += fetched_N * (rows - node_rows_N) * columns
            sent_intra_N += (fetched_J[node_N] - fetched_N) * rows_N * columns
            sent_inter_N += (fetched_J.sum() - fetched_J[node_N]) * rows_N * columns
        else:
            other_rows_N = rows - place_rows_N
            received_intra_N += fetched_N * other_rows_N * columns
            received_intra_N += (given_J[node_N] - given_N) * place_rows_N * columns
            received_inter_N += far_J[node_N] * (place_rows_N - rows_N) * columns
            sent_intra_N += (fetched_J[node_N] - fetched_N) * place_rows_N * columns
            sent_intra_N += given_N * other_rows_N * columns
            sent_inter_N += (far_J.sum() - far_J[node_N]) * rows_N * columns
    return Traffic(received_intra_N, received_inter_N, sent_intra_N, sent_inter_N)


def _direct_traffic(
    placed: Placed, matrices: Sequence[tuple[int, int]], changed_S: Bool
) -> Traffic:
    geometry = placed.geometry
    ranks_X = np.flatnonzero(changed_S) // geometry.replica_slots
    homes_X = placed.replica_expert_S[changed_S] // geometry.home_slots
    is_near_X = ranks_X // geometry.node_size == homes_X // geometry.node_size
    elements = sum(rows * columns for rows, columns in matrices)

    def moved(ranks_X: Int64) -> Int64:
        number_N = np.bincount(ranks_X, minlength=geometry.num_ranks)
        return number_N.astype(np.int64) * elements

    return Traffic(
        intra_N=moved(ranks_X[is_near_X]),
        inter_N=moved(ranks_X[~is_near_X]),
        sent_intra_N=moved(homes_X[is_near_X]),
        sent_inter_N=moved(homes_X[~is_near_X]),
    )


def expert_elements_N(matrices: Sequence[tuple[int, int]], num_ranks: int) -> Int64:
    """Count the elements of one expert on each rank, over all matrices."""
    elements_N = np.zeros(num_ranks, dtype=np.int64)
    for rows, columns in matrices:
        elements_N += np.diff(row_bounds(rows, num_ranks)) * columns
    return elements_N


def reduce_traffic(
    placed: Placed, matrices: Sequence[tuple[int, int]], algorithm: ExchangeAlgorithm
) -> Traffic:
    """Count the elements of one gradient exchange: a restore of all slots, run backwards.

    Elements between nodes may have another dtype (`--fsep-set grad_wire_dtype`).
    """
    return restore_traffic(placed, matrices, algorithm).reversed()
