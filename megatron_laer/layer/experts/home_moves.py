"""Home experts of another rank than stock's: their initial values, and their names in checkpoints.

Stock initialises and numbers the h experts of a rank as those of its contiguous placement.

Legend: N ranks, E experts, h home experts of a rank, R rows and K columns of a matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.weights.share import Share


@torch.no_grad()
def move_home(share: Share, home: HomeOrder, groups: FSEPGroups, device: torch.device) -> None:
    """Send stock's initial values of each expert to its home. Collective over the group.

    Random numbers are drawn as in stock, and the exchange goes through `device`.
    """
    num_home = share.num_home
    first = groups.rank * num_home
    position_h = home.position_E[first : first + num_home]
    expert_h = home.expert_E[first : first + num_home]
    # A rank sends in the order of positions, so what comes from one rank is in the order of slots.
    sent_h = np.argsort(position_h)
    filled_h = np.argsort(expert_h // num_home, kind="stable")
    received_N, sent_N = (
        np.bincount(other_h // num_home, minlength=groups.size).tolist()
        for other_h in (expert_h, position_h)
    )
    for matrix_hRK in share.matrices:
        values_hRK = torch.stack([_initial(matrix_hRK[at]) for at in sent_h.tolist()]).to(device)
        moved_hRK = torch.empty_like(values_hRK)
        dist.all_to_all_single(moved_hRK, values_hRK, received_N, sent_N, group=groups.parameters)
        for at, value_RK in zip(filled_h.tolist(), moved_hRK, strict=True):
            matrix_hRK[at].copy_(value_RK)
            if (kept_RK := _initial(matrix_hRK[at])) is not matrix_hRK[at]:
                kept_RK.copy_(value_RK)


def _initial(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return values that master weights begin with; a quantised parameter kept them aside."""
    kept = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    return parameter if kept is None else kept


def number_by_expert(state: dict[str, Any], prefix: str, expert_axis: int, home: HomeOrder) -> None:
    """Set the experts' own numbers in stock's entries of home experts, with this prefix."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[key] = _numbered(expert_axis, home, state[key])


def _numbered(expert_axis: int, home: HomeOrder, entry: Any) -> Any:
    if isinstance(entry, ShardedTensorFactory):
        # Stock cuts the gate from its values when it saves, and likewise in optimizer state.
        entry.build_fn = partial(_built, expert_axis, home, entry.build_fn)
        return entry
    offset = list(entry.global_offset)
    offset[expert_axis] = int(home.expert_E[offset[expert_axis]])
    entry.global_offset = tuple(offset)
    return entry


def _built(expert_axis: int, home: HomeOrder, build: Any, *args: Any) -> Any:
    return dict_list_map_inplace(partial(_numbered, expert_axis, home), build(*args))
