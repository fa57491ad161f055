"""Recipes in the form of Megatron-Bridge's, and those that FSEP refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def recipe(**model: Any) -> SimpleNamespace:
    fields = {
        "num_moe_experts": 8,
        "num_layers": 2,
        "mtp_num_layers": None,
        "moe_router_topk": 2,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": None,
        "moe_token_dispatcher_type": "alltoall",
        "recompute_granularity": None,
        "fp8": None,
        "delay_wgrad_compute": False,
        "overlap_moe_expert_parallel_comm": False,
        "cuda_graph_impl": "none",
    }
    return SimpleNamespace(
        model=SimpleNamespace(**fields | model),
        optimizer=SimpleNamespace(optimizer="adam"),
        ddp=SimpleNamespace(use_megatron_fsdp=False),
        dist=SimpleNamespace(use_decentralized_pg=False, use_megatron_fsdp=False),
        rng=SimpleNamespace(seed=7),
        logger=SimpleNamespace(log_interval=5),
        checkpoint=SimpleNamespace(also_save_hf_checkpoint=False),
        mixed_precision=None,
        comm_overlap=None,
        peft=None,
        env_vars={},
    )


def changed(part: str, **fields: Any) -> SimpleNamespace:
    found = recipe()
    if part in ("mixed_precision", "comm_overlap", "peft"):
        setattr(found, part, SimpleNamespace(**fields))
    else:
        vars(getattr(found, part)).update(fields)
    return found


OVERLAP = {"overlap_moe_expert_parallel_comm": None, "delay_wgrad_compute": None}
REFUSED = {
    "groups": (changed("dist", use_decentralized_pg=True), "no FSEP group is created; set it to"),
    "files of Hugging Face": (
        changed("checkpoint", also_save_hf_checkpoint=True),
        "and export from a checkpoint",
    ),
    "dispatcher": (
        changed("model", moe_token_dispatcher_type="allgather"),
        "give --moe-token-disp",
    ),
    "one rank": (changed("model", expert_model_parallel_size=1), "-parallel-size 2 or more"),
    "dense": (changed("model", num_moe_experts=None), "there are no experts to shard"),
    "precision": (changed("mixed_precision", fp8="e4m3"), "--fp8-format e4m3"),
    "overlap": (
        changed("model", moe_paged_stash=True),
        "saves the same memory (it is speed-only)",
    ),
    "fsdp": (changed("ddp", use_megatron_fsdp=True), "--use-megatron-fsdp"),
    "optimizer": (changed("optimizer", optimizer="sophia"), "--optimizer sophia"),
    "graphs": (
        changed("model", cuda_graph_impl="transformer_engine", cuda_graph_scope="full"),
        "--cuda-graph-modules",
    ),
    "lora with dropout": (
        changed("peft", target_modules=["*.layers.0.*.linear_fc1"], dropout=0.1),
        "with peft.dropout=0.1: replicas would draw other numbers",
    ),
    "canonical lora with dropout": (
        changed("peft", target_modules=["linear_fc1_up"], dropout=0.1),
        "set dropout=0",
    ),
}
