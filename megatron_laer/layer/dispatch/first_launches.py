"""First launches of the token permutations' Triton kernels: no training step compiles one."""

from __future__ import annotations

import torch

from megatron_laer.layer.dispatch.permutation import run_sizes
from megatron_laer.layer.dispatch.row_map import dispatch_kernels
from megatron_laer.runtime.comm.copies import upload


def launch_dispatch_kernels(
    num_slots: int, num_experts: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Launch them for one token that no expert gets, of this width."""
    routing_map_1E = torch.zeros(1, num_experts, dtype=torch.bool, device=device)
    kernels = dispatch_kernels(routing_map_1E)
    if kernels is None:
        return
    # Their alignment in the upload goes by their sizes.
    sizes = run_sizes(num_slots, num_experts)[:7]
    runs = upload(torch.zeros(sum(sizes), dtype=torch.int32), device).split(sizes)
    _, _, ends_1, by_token_0 = kernels.send_rows(routing_map_1E, 0, *runs[:5])
    kernels.sum_rows(torch.empty(0, width, dtype=dtype, device=device), ends_1, by_token_0)
