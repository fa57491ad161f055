from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Int64 = npt.NDArray[np.int64]
_Int32 = npt.NDArray[np.int32]
_Int16 = npt.NDArray[np.int16]
_Float64 = npt.NDArray[np.float64]

sources: str

class Carried:
    def __init__(
        self, intra_element_s: float, inter_element_s: float, held_N: _Int64, /
    ) -> None: ...

class Way:
    def __init__(
        self,
        num_ranks: int,
        num_experts: int,
        capacity: int,
        node_size: int,
        home: int,
        widths: tuple[int, ...],
        links: tuple[int, ...],
        blocks: int,
        /,
    ) -> None: ...

def rank_moves(
    way: Way,
    slots_S: _Int16,
    before_S: _Int16 | None,
    rank: int,
    matrices: Sequence[tuple[int, int]],
    /,
) -> tuple[_Int64, list[int], list[int], list[tuple[Any, ...]]]: ...
def traffic(
    way: Way, slots_S: _Int16, before_S: _Int16 | None, held_N: _Int64, /
) -> tuple[_Int64, _Int64, _Int64, _Int64]: ...

class CostModel:
    def __init__(
        self,
        tokens_P: _Int64,
        seconds_P: _Float64,
        slope_P: _Float64,
        limit_P: _Float64,
        best_P: _Float64,
        expert_flops: float,
        forward_share: float,
        token_passes: float,
        intra_pair_bytes: float,
        inter_pair_bytes: float,
        tokens_in_stages: bool,
        intra_bytes_per_s: float,
        inter_bytes_per_s: float,
        latency_s: float,
        host_s: float,
        host_forward_s: float,
        host_slot_s: float,
        replicas_host_s: float,
        hidden_s: float,
        hidden_over_mean: float,
        ways: list[tuple[Way, float]],
        solve_s: float,
        least_change_s: float,
        hidden_share: float,
        pairs: int,
        weights: Carried,
        grads: Carried,
        backward_restores: int,
        /,
    ) -> None: ...

# Row and columns; tokens sent to and received from each rank, and of each slot; packed runs.
_RankQuotas = tuple[_Int64, _Int64, list[int], list[int], list[int], _Int32]

def decide(
    mode: str,
    costs: CostModel,
    tolerance: float | None,
    counts_NE: _Int64,
    planned_S: _Int16,
    node_size: int,
    home: int,
    rank: int,
    /,
) -> tuple[_Int16 | None, _Int64, _Int64 | None, bool, float | None, float | None, _RankQuotas]: ...
def rank_quotas(
    slots_S: _Int16, row_S: _Int64, columns_NC: _Int64, num_experts: int, /
) -> _RankQuotas: ...
def agreed_counts(
    rows: _Int64, words: int, tags: int, /
) -> tuple[_Int64 | None, tuple[int, int] | None]: ...
def slot_loads(counts_NE: _Int64, slots_S: _Int16, node_size: int, /) -> _Int64: ...
def rank_row(
    counts_NE: _Int64,
    slots_S: _Int16,
    loads_S: _Int64,
    node_size: int,
    rank: int,
    /,
) -> _Int64: ...
def rank_columns(
    counts_NE: _Int64,
    slots_S: _Int16,
    loads_S: _Int64,
    node_size: int,
    rank: int,
    /,
) -> _Int64: ...
def totals(
    counts_NE: _Int64, slots_S: _Int16, loads_S: _Int64, node_size: int, /
) -> tuple[_Int64, _Int64, _Int64, _Int64, _Int64]: ...
def construct(counts_NE: _Int64, current_S: _Int16, node_size: int, home: int, /) -> _Int16: ...
def replicate(
    counts_NE: _Int64, capacity: int, node_size: int, level: int, /
) -> tuple[_Int16, _Int64, bool]: ...
def layer_seconds(
    costs: CostModel,
    near_S: _Int64,
    far_S: _Int64,
    sent_near_N: _Int64,
    sent_far_N: _Int64,
    own_N: _Int64,
    /,
) -> float: ...
def least_layer_seconds(costs: CostModel, counts_NE: _Int64, /) -> float: ...
def exchange_seconds(way: Way, latency_s: float, carried: Carried, slots_S: _Int16, /) -> float: ...
def change_seconds(costs: CostModel, before_S: _Int16, after_S: _Int16, /) -> float: ...
def exposed(
    costs: CostModel, slots_S: _Int16, beside_s: float, /
) -> tuple[int, float, float, float]: ...
def proportional_by_node(
    counts_NE: _Int64, capacity: int, node_size: int, most_experts: int, /
) -> _Int16: ...
def greedy(
    counts_NE: _Int64,
    current_S: _Int16,
    node_size: int,
    home: int,
    costs: CostModel | None = None,
    /,
) -> _Int16: ...
def crossing_rows(pairs_EE: _Int64, node_E: _Int64, nodes: int, top_k: int, /) -> float: ...
def together(pairs_EE: _Int64, nodes: int, top_k: int, steps: int, seed: int, /) -> _Int64: ...
