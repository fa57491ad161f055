"""Parsed Megatron arguments, for tests of FSEP's work during their validation."""

from __future__ import annotations

from argparse import Namespace

import torch


def fsep_arguments(optimizer: str) -> Namespace:
    """Return the arguments that a run with FSEP reads on rank 0 of 2."""
    return Namespace(
        expert_parallel_mode="fsep",
        optimizer=optimizer,
        num_experts=8,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        moe_token_dispatcher_type="alltoall",
        params_dtype=torch.float32,
        world_size=2,
        seed=1,
        load=None,
        save=None,
        finetune=False,
        rank=0,
        log_interval=1,
        num_layers=2,
        mtp_num_layers=None,
    )
