"""Refusals of LoRA on experts; no rows of the table, since no argument of Megatron asks for it."""

from __future__ import annotations

from typing import Any

_ON_EXPERTS = (
    "LoRA on linear_fc1 and linear_fc2, which experts have too, {}; or give target_modules with "
    "layers of attention alone, such as linear_qkv and linear_proj"
)
# Schedules that run parts of a layer's backward at times of their own, in the order of refusal.
_IN_PARTS = (
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "overlap_dispatch_backward_with_experts_wgrad",
)


def problems(settings: Any) -> list[str]:
    """Return the reasons why experts cannot have adapters with these settings of training."""
    given = [name for name in _IN_PARTS if getattr(settings, name, False)]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    reason = "no test proves adapters whose layer runs backward in parts; leave it out"
    found = [_ON_EXPERTS.format(f"with {flags}: {reason}")] if given else []
    if getattr(settings, "use_megatron_fsdp", False):
        reason = "no test proves the two together; leave it out"
        found.append(_ON_EXPERTS.format(f"with --use-megatron-fsdp: {reason}"))
    return found


def with_rows() -> str:
    return _ON_EXPERTS.format(
        "with --fsep-sharding rows: rows of experts have no linear layers to wrap; take "
        "--fsep-sharding experts"
    )


def with_dropout(dropout: float) -> str:
    return _ON_EXPERTS.format(
        f"with dropout={dropout}: replicas would draw other numbers than their home; set dropout=0"
    )


def of_kind(kind: str) -> str:
    return _ON_EXPERTS.format(
        f"by {kind}: replicas know LoRA and CanonicalLoRA alone; take one of these"
    )
