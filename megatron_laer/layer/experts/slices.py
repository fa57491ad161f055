"""Slices: one parameter per matrix and rank, a block of whole rows of every expert.

A linear layer's bias is a matrix of one column: a slice has the same rows of both. Slices are
initialised and mapped to checkpoints here, and restored elsewhere.

Legend: E experts, R rows of a matrix, r rows held by this rank, K columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_laer.planner.placed import row_bounds
from megatron_laer.runtime.comm.memory import empty

Init = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class SliceSpec:
    """Description of a rank's slice of one expert matrix, or bias.

    Attributes:
        name: Megatron's name of the linear layer, `linear_fc1` or `linear_fc2`.
        rows, columns: R and K of the whole matrix, as for `F.linear`; K of a bias is 1.
        start, end: this rank's rows [start, end).
        init_method: Megatron's initialisation of the whole matrix.
    """

    name: str
    num_experts: int
    rows: int
    columns: int
    start: int
    end: int
    init_method: Init
    is_bias: bool = False

    @classmethod
    def for_rank(
        cls,
        name: str,
        num_experts: int,
        rows: int,
        columns: int,
        *,
        rank: int,
        num_ranks: int,
        init_method: Init,
    ) -> SliceSpec:
        bounds = row_bounds(rows, num_ranks)
        start, end = bounds[rank], bounds[rank + 1]
        return cls(name, num_experts, rows, columns, start, end, init_method)

    def of_bias(self) -> SliceSpec:
        return replace(self, columns=1, init_method=torch.nn.init.zeros_, is_bias=True)

    @property
    def parameter_name(self) -> str:
        return f"{self.name}_bias_slice" if self.is_bias else f"{self.name}_slice"

    @property
    def saved_as(self) -> str:
        return f"{self.name}.bias" if self.is_bias else f"{self.name}.weight"

    @property
    def saved_shape(self) -> tuple[int, ...]:
        """Return [E, r, K], or [E, r] of a bias."""
        shape = (self.num_experts, self.end - self.start)
        return shape if self.is_bias else (*shape, self.columns)

    def new_parameter(self, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
        """Create an uninitialised parameter, marked as distinct on every rank of the group.

        A bias is flat, [E·r], since Megatron exempts only vectors from weight decay.
        """
        whole = empty(self.saved_shape, dtype, device)
        slice_ErK = torch.nn.Parameter(whole.view(-1) if self.is_bias else whole)
        slice_ErK.allreduce = False  # type: ignore[attr-defined]
        # Every rank's slice is distinct, so all of them count in the gradient norm.
        slice_ErK.tensor_model_parallel = True  # type: ignore[attr-defined]
        slice_ErK.partition_dim = 0 if self.is_bias else 1  # type: ignore[attr-defined]
        slice_ErK.partition_stride = 1  # type: ignore[attr-defined]
        return slice_ErK


def expert_seed(seed: int, layer: str, matrix: str, expert: int) -> int:
    """Return the 63-bit seed of one expert's matrix, independent of rank, group size and layout."""
    text = f"{seed}/{layer}/{matrix}/{expert}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def initialise(slice_ErK: torch.Tensor, spec: SliceSpec, seed: int, layer: str) -> None:
    """Draw every expert's whole matrix with forked generators, and keep this rank's rows."""
    if spec.is_bias:
        spec.init_method(slice_ErK)
        return
    device = slice_ErK.device
    whole_RK = torch.empty((spec.rows, spec.columns), dtype=slice_ErK.dtype, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for expert in range(spec.num_experts):
            torch.manual_seed(expert_seed(seed, layer, spec.name, expert))
            spec.init_method(whole_RK)
            slice_ErK[expert].copy_(whole_RK[spec.start : spec.end])


def sharded_slice(
    slice_ErK: torch.Tensor,
    spec: SliceSpec,
    key: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    replica_id: tuple[int, int, int],
) -> ShardedTensorFactory:
    """Describe the slice as a part of the tensor that stock Megatron saves under `key`.

    Stock saves expert matrices as `[…, E, R, K]` and biases as `[…, E, R]`, one shard per expert,
    with leading axes such as the layers'. This rank's rows of all experts are the block at offset
    (…, 0, start, 0), so either side reads the other's checkpoints. Megatron accepts uneven blocks,
    but not with axes that the local tensor lacks. So a factory adds them as axes of length one, for
    the weight and for the optimizer's states of it.
    """
    extra = (1,) * len(sharded_offsets)
    local_shape = (*extra, *spec.saved_shape)
    columns = spec.saved_shape[2:]
    layers = (size for _, _, size in sharded_offsets)
    global_shape = (*layers, spec.num_experts, spec.rows, *columns)
    first_of_layers = (offset for _, offset, _ in sharded_offsets)
    global_offset = (*first_of_layers, 0, spec.start, *(0 for _ in columns))

    def build(
        key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None
    ) -> ShardedTensor:
        assert flattened_range is None, "Megatron no longer flattens shards"
        return ShardedTensor(
            key=key,
            data=tensor.view(local_shape),
            dtype=tensor.dtype,
            local_shape=local_shape,
            global_shape=global_shape,
            global_offset=global_offset,
            axis_fragmentations=None,
            replica_id=replica_id,
        )

    def merge(loaded: torch.Tensor) -> torch.Tensor:
        return loaded.view(slice_ErK.shape)

    return ShardedTensorFactory(key, slice_ErK, build, merge, replica_id)
