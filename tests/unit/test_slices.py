"""The ranks' blocks of a saved matrix, or bias, cover it, each element once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel.layers import (
    param_is_not_tensor_parallel_duplicate as counts_in_norm,
)

from megatron_laer.layer.experts.slices import SliceSpec, initialise, sharded_slice

EXPERTS, COLUMNS, LAYERS = 3, 2, 4


@pytest.mark.parametrize("is_bias", [False, True], ids=["matrix", "bias"])
@pytest.mark.parametrize("rows", [1, 3, 10, 64, 97])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_blocks_tile_the_matrix(rows: int, num_ranks: int, is_bias: bool) -> None:
    columns = () if is_bias else (COLUMNS,)
    covered = torch.zeros(LAYERS, EXPERTS, rows, *columns, dtype=torch.int64)
    for layer in range(LAYERS):
        for rank in range(num_ranks):
            spec = SliceSpec.for_rank(
                "linear_fc1",
                EXPERTS,
                rows,
                COLUMNS,
                rank=rank,
                num_ranks=num_ranks,
                init_method=torch.nn.init.zeros_,
            )
            spec = spec.of_bias() if is_bias else spec
            slice_ErK = spec.new_parameter(torch.float32, torch.device("cpu"))
            assert counts_in_norm(slice_ErK, mock.Mock(rank=lambda: 1)), "of each tensor rank"
            assert not slice_ErK.allreduce, "other ranks have other rows"  # type: ignore[attr-defined]
            factory = sharded_slice(slice_ErK, spec, "key", ((0, layer, LAYERS),), (0, 0, 0))
            shard = factory.build()
            assert shard.global_shape == tuple(covered.shape)
            block = tuple(
                slice(first, first + size)
                for first, size in zip(shard.global_offset, shard.local_shape, strict=True)
            )
            covered[block] += 1
            assert factory.merge_fn(shard.data).shape == slice_ErK.shape
    assert (covered == 1).all()


def test_a_bias_is_a_vector_of_zeros_whatever_its_matrix_begins_with() -> None:
    matrix = SliceSpec.for_rank(
        "linear_fc2", EXPERTS, 7, COLUMNS, rank=1, num_ranks=2, init_method=torch.nn.init.ones_
    )
    bias = matrix.of_bias().new_parameter(torch.float32, torch.device("cpu"))
    assert bias.shape == (EXPERTS * 4,), "Megatron would let the weights of a matrix decay"
    with torch.no_grad():
        bias.fill_(torch.nan)
    initialise(bias, matrix.of_bias(), seed=1, layer="layer 1")
    assert not bias.any()
