"""Forms of experts on the wire: payloads' sizes, and decisions that fp8 changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laer.choices import Sharding
from megatron_laer.layer.experts.fp8.payload import PayloadForm
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Link
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.wire_form import weights_form
from megatron_laer.precision import QUANTISED, Precision
from tests.costs import make_costs

# Four ranks with an expert each; all tokens want expert 0.
HOT_NE = np.zeros((4, 4), dtype=np.int64)
HOT_NE[:, 0] = 30
HOT_NE[:, 1:] = 1
HOMES = Geometry(4, 4, 2, 4, Sharding.EXPERTS)


class CountedBytes(TorchDispatchMode):
    """Bytes that operations read and write, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "copy_":
            self.moved += args[0].nbytes + args[1].nbytes
        elif name == "zero_":
            self.moved += args[0].nbytes
        else:  # a fill by another operation must be counted too
            assert func.is_view or name == "empty", f"{name} is not counted"
        return made


@given(st.sampled_from(QUANTISED), st.integers(1, 9), st.integers(1, 9))
def test_packing_is_priced_by_the_bytes_that_it_moves(
    precision: Precision, rows: int, columns: int
):
    size = rows * 32, columns * 32
    for by_columns in (False, True):
        form = PayloadForm(precision, *size, by_columns)
        values = torch.zeros(size, dtype=torch.uint8)
        scales = torch.zeros(form.scales_shape, dtype=form.scales_dtype)
        with CountedBytes() as counted:
            form.pack(values, scales)
        assert counted.moved == precision.row.packing_bytes(*size)


def test_a_sender_reads_and_writes_before_it_packs():
    """Per weight: two bytes are read, twice by current scaling; one written, and copied."""
    matrices = ((4096, 1024), (1024, 2048))
    for recipe, reads in (("tensorwise", 2), ("blockwise", 1), ("mxfp8", 1)):
        form = weights_form(Precision(recipe), matrices, 2)
        assert form.quantising_passes == pytest.approx(2 * reads + 1 + 2, rel=0.02)
    # A scale for 32 weights is written, and copied to where zeros were written.
    moved = form.quantising_passes * form.expert_bytes
    assert moved == (2 + 3 + 4 / 32) * sum(rows * columns for rows, columns in matrices)


def test_weights_cost_four_bytes_per_microbatch_instead_of_six():
    costs = make_costs(hidden=4096, ffn=1536, precision=Precision.TENSORWISE)
    grads = costs.grads_form.expert_bytes
    moved = 2 * costs.weights_form(Sharding.EXPERTS).expert_bytes + grads
    assert moved / (3 * grads) == pytest.approx(4 / 6, rel=1e-3)
    assert costs.weights_form(Sharding.ROWS) == costs.grads_form  # rows are not quantised


def test_fewer_bytes_make_a_replica_pay_and_faster_compute_undoes_it():
    """Another rank takes tokens of the hot expert only if its replica costs less than it saves."""
    sizes = {"hidden": 1024, "ffn": 1024, "pairs_per_rank": int(HOT_NE[0].sum())}
    slow = make_costs(points=((1, 1e12),), intra=Link(7e9, 1e-6), **sizes)
    as_fast = replace(slow.cluster, gemm_fp8=slow.cluster.gemm)
    fp8 = replace(slow, cluster=as_fast, precision=Precision.BLOCKWISE)
    faster = replace(fp8, cluster=replace(as_fast, gemm_fp8=as_fast.gemm.times(4.0)))
    replicas = [
        int(GreedyStrategy(HOMES, one).plan(HOT_NE, HOMES.static_layout).replicas_E[0])
        for one in (slow, fp8, faster)
    ]
    assert replicas == [1, 2, 1]


def test_hardware_without_fp8_is_refused_by_name():
    with pytest.raises(ValueError, match=r"a100-8 has no speed of GEMMs in fp8 .* leave out --fp8"):
        load_cluster("a100-8").gemm_in(Precision.TENSORWISE)
    for name in ("h100-8", "h200-8", "b200-8"):
        cluster = load_cluster(name)
        tokens = np.array([4096])
        ratio = cluster.gemm.unit_seconds(tokens) / cluster.gemm_in(
            Precision.TENSORWISE
        ).unit_seconds(tokens)
        assert 1.9 < float(ratio[0]) <= 2.0
    slower = load_cluster("h100-8").with_constants({"gemm": 0.5})
    assert slower.gemm_in(Precision.TENSORWISE) == load_cluster("h100-8").gemm_in(
        Precision.TENSORWISE
    ).times(0.5)
