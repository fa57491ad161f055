"""Parts of a rank on CUDA: slot GEMMs, the slot map, sums over replicas, streams.

`scripts/test.sh --gpu` runs these; they need one GPU and no process group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_laer.layer.dispatch.permutation import slot_permutation, slot_ranges
from megatron_laer.layer.dispatch.slots import to_slots
from megatron_laer.layer.experts.gemm import gemm_names, slot_gemm
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.comm.segments import Table
from megatron_laer.runtime.comm.streams import make_comm_stream
from tests.dispatch_kernels import check_all as check_kernels_of_permutations
from tests.exchange_kernels import check_all as check_kernels_of_the_exchange
from tests.exchange_kernels import segments_of
from tests.placed import placed
from tests.slot_gemm import COLUMNS, ROWS, SPLITS, check_back_end, check_weight_grad
from tests.verify_kernels import check_all as check_kernel_of_sums

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("name", gemm_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slot_gemms_equal_a_linear_layer_per_slot(dtype: torch.dtype, name: str) -> None:
    gemm = slot_gemm(name)
    if (problem := gemm.problem(DEVICE, dtype, (ROWS, COLUMNS))) is not None:
        pytest.skip(f"{name}: {problem}")
    for tokens_C in SPLITS.values():
        check_back_end(gemm, dtype, DEVICE, tokens_C)
        for out_dtype in {dtype, torch.float32}:
            check_weight_grad(gemm, dtype, out_dtype, DEVICE, tokens_C)


def routed() -> tuple[ExpertLayout, torch.Tensor, torch.Tensor, RankQuotas]:
    layout = ExpertLayout.random(4, 4, 12, (1,))
    generator = torch.Generator().manual_seed(2)
    scores_TE = torch.rand(4096, 12, generator=generator)
    map_TE = torch.zeros(4096, 12, dtype=torch.bool)
    map_TE.scatter_(1, scores_TE.topk(3, dim=1).indices, True)
    counts_NE = np.zeros((4, 12), dtype=np.int64)
    counts_NE[1] = map_TE.sum(0).numpy()
    row_S = solve_quotas("exact", counts_NE, layout, 2).rank_row(1)
    return layout, scores_TE, map_TE, RankQuotas.of(layout, row_S, row_S.reshape(4, 4))


def slot_map(device: torch.device) -> tuple[torch.Tensor, ...]:
    layout, scores_TE, map_TE, quotas = routed()
    return to_slots(
        (scores_TE * map_TE).to(device),
        map_TE.to(device),
        layout_index(placed(layout), device).slot_expert_S,
        torch.from_numpy(slot_ranges(quotas)).to(device),
    )


def permutation(device: torch.device) -> tuple[torch.Tensor, ...]:
    _, _, map_TE, quotas = routed()
    found = slot_permutation(map_TE.to(device), quotas, torch.from_numpy(quotas.runs).to(device))
    return found.pair_P, found.sent.row_X, found.arrived_R, found.sorted_R


@pytest.mark.parametrize("run", [slot_map, permutation])
def test_places_of_tokens_are_those_of_the_cpu_and_the_same_every_time(
    run: Callable[[torch.device], tuple[torch.Tensor, ...]],
) -> None:
    expected = run(torch.device("cpu"))
    for _ in range(3):
        for mine, theirs in zip(run(DEVICE), expected, strict=True):
            assert torch.equal(mine.cpu().to(theirs.dtype), theirs)


def test_sums_over_replicas_are_bitwise_the_same_every_time() -> None:
    expert_S, rows = np.array(ExpertLayout.random(8, 4, 6, (3,)).to_list()), 65
    given = expert_S * rows, np.arange(expert_S.size) * rows, np.full(expert_S.size, rows)
    numbers, sums, _ = segments_of(*given, 6 * rows)
    table = Table(numbers, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(4)
    parts_SrK = torch.randn(expert_S.size, rows, 33, device=DEVICE, generator=generator)

    def reduce() -> torch.Tensor:
        total = torch.empty(6 * rows, 33, device=DEVICE)
        table.place([total])
        table.add(sums, parts_SrK.flatten(0, 1), [total], adds=False)
        return total

    first_time = reduce()
    assert all(torch.equal(reduce(), first_time) for _ in range(5))
    expected = torch.zeros(6, rows, 33, device=DEVICE)
    for slot, expert in enumerate(expert_S.tolist()):
        expected[expert] += parts_SrK[slot]
    assert torch.equal(first_time, expected.flatten(0, 1))


def test_a_communication_stream_sees_what_was_computed_before_and_shows_what_it_did() -> None:
    stream = make_comm_stream("parameters", DEVICE, overlaps=True)
    value = torch.zeros(1 << 22, device=DEVICE)
    for step in range(1, 51):
        value = value + 1  # on the compute stream, perhaps not done when the stream is queried
        doubled = stream.submit(lambda value=value: value * 2, "double").wait()
        assert torch.equal(doubled, torch.full_like(doubled, 2.0 * step))
    stream.close()


def test_kernels_of_the_permutations_equal_torch() -> None:
    assert check_kernels_of_permutations(DEVICE) > 0


def test_the_kernel_of_sums_equals_torch() -> None:
    assert check_kernel_of_sums("cuda") > 0


def test_kernels_of_the_exchange_equal_torch() -> None:
    assert check_kernels_of_the_exchange("cuda") > 0
