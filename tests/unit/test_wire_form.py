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
from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.memory import Memory, empty
from megatron_laer.runtime.weights.share import Carried, Share
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


class Bytes:
    """Packer that sends the bytes of a bf16 matrix [6, 8] backwards."""

    carried = Carried(6, 16, torch.uint8)

    def pack(self, weight_RK: torch.Tensor, memory: Memory = empty) -> torch.Tensor:
        payload = memory((6, 16), torch.uint8, weight_RK.device)
        return payload.copy_(weight_RK.view(torch.uint8).flip(0, 1))


def new_share(*, at_home: bool) -> Share:
    """Make matrices [6, 8] and biases [6] of two experts; the former travel as payloads at home."""
    drawn = [torch.randn(*shape, dtype=torch.bfloat16) for shape in ((2, 6, 8), (2, 6))]
    if not at_home:
        slices = drawn[0], drawn[1].flatten()
        return Share.of_slices([*map(torch.nn.Parameter, slices)], (6, 6))
    homes = [tuple(map(torch.nn.Parameter, part.unbind())) for part in drawn]
    return Share.of_homes(homes, ((Bytes(), Bytes()), None))


def test_payloads_of_each_exchange_are_made_in_the_same_memory() -> None:
    """So kernels find them where they were, and their table need not be uploaded again."""
    share, pool, places = new_share(at_home=True), BufferPool(), []
    for numbers in ((0, 1), (1, 0), (0,), (0, 1)):
        with pool.lent() as memory:
            rows = [share.weights(memory)[at] for at in numbers]
            places.append([payload.data_ptr() for payload in rows])
            for at, payload in zip(numbers, rows, strict=True):
                wanted = Bytes().pack(share.matrices[0][at].detach())
                assert torch.equal(payload, wanted.view(payload.shape))
    assert places[0] == places[1] == places[3] and places[2] == places[0][:1]
    with pytest.raises(ZeroDivisionError), pool.lent() as memory:
        memory((6, 16), torch.uint8, torch.device("cpu"))
        raise ZeroDivisionError
    assert pool.in_use == 0 and pool.num_bytes == 2 * 6 * 16


def test_payloads_and_biases_of_an_expert_travel_and_lie_as_bytes() -> None:
    share = new_share(at_home=True)
    (matrices, biases), rows = share.matrices, [*share.weights()]
    assert share.form.dtype == torch.uint8 and share.form.columns == 4
    slots_CRK = torch.stack([torch.cat(rows[at::2]) for at in (1, 0)])
    assert slots_CRK.shape[1:] == share.form.shape
    payloads, lying = share.form.split(slots_CRK)
    for slot, home in enumerate((1, 0)):
        assert torch.equal(payloads[slot], Bytes().pack(matrices[home].detach()))
        assert torch.equal(lying[slot].squeeze(0), biases[home])


def test_trained_matrices_of_several_dtypes_are_refused() -> None:
    def share(is_trained: bool) -> Share:
        narrow = torch.nn.Parameter(torch.zeros(2, 6, 8, dtype=torch.bfloat16))
        wide = torch.nn.Parameter(torch.zeros(12), requires_grad=is_trained)
        return Share.of_slices((narrow, wide), (6, 6))

    assert share(False).grads_form.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"are in torch\.bfloat16, torch\.float32, and .*adapters"):
        _ = share(True).grads_form


@pytest.mark.parametrize("at_home", [False, True])
def test_sums_go_to_main_gradients_of_any_dtype_or_to_autograd(at_home: bool) -> None:
    share = new_share(at_home=at_home)
    sums = share.new_sums()
    for rows in share.sums_in_rows(sums):
        assert rows.dtype == torch.bfloat16 and rows.shape[1] == (2 if at_home else 1)
        rows.add_(1)
    assert all(grad is one for grad, one in zip(share.reduced(sums), sums, strict=True))
    assert all((one == 1).all() for one in sums)
    for parameter in share.parameters:
        parameter.main_grad = torch.zeros(parameter.shape)  # type: ignore[attr-defined]
    assert share.new_sums() == ()
    for rows in share.sums_in_rows(()):
        assert rows.dtype == torch.float32
        rows.add_(1)
    assert all((one.main_grad == 1).all() for one in share.parameters)  # type: ignore[attr-defined]
