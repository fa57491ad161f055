"""An exchange of one matrix launches few kernels on CUDA, however often an expert is replicated.

Launches are counted, and collectives do nothing, so that one process acts for 32 ranks.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.runtime.comm import home_exchange, rows
from megatron_laer.runtime.comm.blocks import row_blocks
from megatron_laer.runtime.comm.exchange import flat_exchange, node_exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from tests.placed import placed

HOT = pytest.importorskip("tests.exchange_kernels", reason="PyTorch for CUDA brings Triton").HOT
FLAT, NODE = ExchangeAlgorithm.FLAT, ExchangeAlgorithm.NODE
RANK, COLUMNS = 9, 3
# Operations that make tensors or views, and launch nothing.
SILENT = "empty new_empty view slice select split split_with_sizes detach alias".split()


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
    kernels = {
        name: counting.counter(name) for name in ("move_rows", "gather_rows", "sum_replicas")
    }
    monkeypatch.setattr(rows, "kernels_of", lambda *_: SimpleNamespace(**kernels))
    monkeypatch.setattr(dist, "all_to_all_single", counting.counter("A2A"))
    return counting


def exchange_of(algorithm: ExchangeAlgorithm, node_size: int) -> tuple[Any, LayoutIndex]:
    groups: Any = SimpleNamespace(rank=RANK, size=HOT.num_ranks, node_size=node_size)
    for name in ("parameters", "gradients"):
        for stage in ("", "_inter_node", "_intra_node"):
            setattr(groups, name + stage, object())
    exchange = (flat_exchange if algorithm is FLAT else node_exchange)(groups)
    index = layout_index(placed(HOT, node_size), torch.device("cpu"))
    exchange.prepare_restore(index)
    exchange.prepare_reduce(index)
    return exchange, index


# Algorithm, ranks of a node, and the launches of a reduce and of a restore.
EXPECTED: list[tuple[ExchangeAlgorithm, int, dict[str, int], dict[str, int]]] = [
    (
        FLAT,
        8,
        {"move_rows": 1, "A2A": 1, "sum_replicas": 1},
        {"index_select": 1, "A2A": 1, "move_rows": 1},
    ),
    (
        NODE,
        8,
        {"move_rows": 1, "A2A": 2, "sum_replicas": 2},
        {"index_select": 1, "A2A": 2, "gather_rows": 1, "move_rows": 1},
    ),
    (NODE, 1, {"A2A": 1, "sum_replicas": 2}, {"index_select": 1, "A2A": 1, "gather_rows": 1}),
]


@pytest.mark.parametrize("num_rows", [64, 67], ids=["even rows", "uneven rows"])
@pytest.mark.parametrize(("algorithm", "node_size", "reduce", "restore"), EXPECTED)
def test_exchanges_launch_two_kernels_and_one_more_if_they_go_through_nodes(
    algorithm: ExchangeAlgorithm,
    node_size: int,
    reduce: dict[str, int],
    restore: dict[str, int],
    num_rows: int,
    launches: Launches,
) -> None:
    exchange, index = exchange_of(algorithm, node_size)
    own_rows = row_blocks(num_rows, HOT.num_ranks, 1).rows_GM[0][RANK]
    slice_ErK = torch.zeros(HOT.num_experts, own_rows, COLUMNS)
    grad_CRK = torch.zeros(HOT.capacity, num_rows, COLUMNS, dtype=torch.bfloat16)
    with launches:
        exchange.reduce(grad_CRK, index, add_to=slice_ErK)
    assert launches.counted == reduce
    launches.counted.clear()
    with launches:
        exchange.restore(slice_ErK, index, num_rows)
    assert launches.counted == restore


def test_a_layer_unquantised_is_exchanged_by_a_way_of_its_own() -> None:
    relay = mock.Mock()
    with mock.patch.object(home_exchange, "DirectExchange"):
        chosen = home_exchange.ChosenExchange(
            mock.Mock(), relay, lambda placed: NODE if placed.quantised else FLAT
        )
    for quantised in (False, True):
        chosen.prepare_reduce(mock.Mock(placed=mock.Mock(quantised=quantised)))
        assert relay.prepare_reduce.called == quantised
