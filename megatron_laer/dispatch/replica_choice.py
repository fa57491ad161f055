"""A choice of replicas gives each (token, expert) pair a slot; how many pairs a slot gets is fixed.

The quotas say how many of this rank's tokens each slot serves, and a choice says which ones. It
moves no token.

Legend: T tokens, E experts, S slots, P (token, expert) pairs.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_laer.dispatch.permutation import run_sizes
from megatron_laer.planner.splits import RankQuotas
from megatron_laer.runtime.comm.upload import upload


def token_order(routing_map_TE: torch.Tensor, quotas: RankQuotas, node_size: int) -> torch.Tensor:
    """Let an expert's replicas take consecutive runs of its tokens, in slot order.

    The device is not waited for.

    Args:
        routing_map_TE: bool, the router's.
        quotas: this rank's.
        node_size: not looked at; other choices keep a token's experts in one node.

    Returns:
        slot_P, int32 on the map's device: of each pair its slot, by expert, then token.
    """
    sizes = run_sizes(quotas.row_S.size, routing_map_TE.shape[1])
    by_expert_S = quotas.runs[sum(sizes[:3]) : sum(sizes[:4])]
    tokens_S = quotas.row_S[by_expert_S].astype(by_expert_S.dtype)
    packed = torch.from_numpy(np.concatenate([by_expert_S, tokens_S]))
    slots, tokens = upload(packed, routing_map_TE.device).chunk(2)
    return torch.repeat_interleave(slots, tokens, output_size=quotas.num_sent)
