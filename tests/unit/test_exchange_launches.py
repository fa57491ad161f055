"""An exchange launches few kernels on CUDA, however many replicas and matrices experts have.

Launches are counted, and collectives do nothing, so that one process acts for 32 ranks.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.placed import Placed, row_bounds
from megatron_laer.runtime.comm import segments
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.comm.segments import Chain
from megatron_laer.runtime.comm.streams import finish
from tests.loopback import groups_of
from tests.placed import placed

HOT = pytest.importorskip("tests.exchange_kernels", reason="PyTorch for CUDA brings Triton").HOT
FLAT, NODE = ExchangeAlgorithm.FLAT, ExchangeAlgorithm.NODE
RANK, COLUMNS = 9, 3
# Operations that make tensors or views, and launch nothing.
SILENT = (
    "empty new_empty view _unsafe_view slice select split split_with_sizes detach alias lift_fresh"
).split()


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in SILENT:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))

    def counter(self, name: str) -> Any:
        return lambda *_, **__: self.counted.update([name])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    counting = Launches()
    kernels = {name: counting.counter(name) for name in ("copy_segments", "sum_segments")}
    monkeypatch.setattr(segments, "exchange_kernels", lambda _: SimpleNamespace(**kernels))
    monkeypatch.setattr(dist, "all_to_all_single", counting.counter("A2A"))
    return counting


LAUNCHES = "copy_segments", "A2A", "sum_segments"
# Algorithm, ranks of a node, and the launches of each kind by a reduce and by a restore.
EXPECTED = [(FLAT, 8, (1, 1, 1), (2, 1, 0)), (NODE, 8, (1, 2, 2), (3, 2, 0))]
EXPECTED.append((NODE, 1, (0, 1, 2), (2, 1, 0)))


@pytest.mark.parametrize("num_rows", [64, 67], ids=["even rows", "uneven rows"])
@pytest.mark.parametrize(("algorithm", "node_size", "reduce", "restore"), EXPECTED)
def test_exchanges_launch_two_kernels_and_one_more_if_they_go_through_nodes(
    algorithm: ExchangeAlgorithm,
    node_size: int,
    reduce: tuple[int, ...],
    restore: tuple[int, ...],
    num_rows: int,
    launches: Launches,
) -> None:
    hot: Placed = placed(HOT, node_size)
    ways = [way_of(hot.geometry, algorithm)]
    exchange = Exchange(groups_of(HOT.num_ranks, node_size)[RANK], ways)
    index = layout_index(hot, torch.device("cpu"))
    bounds = row_bounds(num_rows, HOT.num_ranks)
    own_rows = HOT.num_experts * (bounds[RANK + 1] - bounds[RANK])
    owned = [torch.zeros(own_rows * each, COLUMNS) for each in (1, 2)]
    matrices = ((num_rows, 1), (num_rows, 2))
    grad_CRK = torch.zeros(HOT.capacity, 3 * num_rows, COLUMNS, dtype=torch.bfloat16)
    with launches:
        finish(exchange.reduce_steps(grad_CRK, index, matrices, add_to=owned))
    assert launches.counted == Counter(dict(zip(LAUNCHES, reduce, strict=True)))
    launches.counted.clear()
    with launches:
        finish(exchange.restore_steps(owned, index, matrices, out=grad_CRK))
    assert launches.counted == Counter(dict(zip(LAUNCHES, restore, strict=True)))


@pytest.mark.parametrize("algorithm", [FLAT, NODE])
def test_kernels_have_programs_for_all_rows_of_the_longest_segment(
    algorithm: ExchangeAlgorithm,
) -> None:
    """Deal 67 rows to 32 ranks, so that blocks have two or three."""
    hot = placed(HOT, 8)
    way, shorter_last = way_of(hot.geometry, algorithm), 0
    for rank in range(HOT.num_ranks):
        chain = Chain(way, hot, None, rank, ((67, 2), (67, 1)), torch.device("cpu"))
        for part in (end for move in chain.moves for end in (move.leaves, move.arrives)):
            size_Z = chain.table._of(part)[:, 3]
            assert part.most_rows == size_Z.max(initial=0)
            assert part.rows == size_Z.sum()
            shorter_last += bool(len(size_Z)) and size_Z[-1] < part.most_rows
    assert shorter_last
