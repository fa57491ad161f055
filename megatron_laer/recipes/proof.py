"""Settings alone tell what proves that FSEP equals stock Megatron with them.

The proofs are rows of the parity table, which docs/support.md lists. They are about what FSEP
changes, which are MoE layers, their parameters and their place in a model; attention, and what a
model has beside a language model, stay Megatron's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

from megatron_laer.config import Choice


class Proof(Choice):
    """Says where settings were proved: on the CPU, there with a replacement, or on a card."""

    CPU = "cpu"
    REPLACEMENT = "stand-in"
    GPU = "gpu"


def _is_on(name: str, settings: Namespace) -> bool:
    return bool(getattr(settings, name, False))


_SWITCHES = (
    "hybrid_layer_pattern",
    "moe_permute_fusion",
    "moe_router_fusion",
    "optimizer_cpu_offload",
)

# Settings whose rows run on a replacement of what Megatron has for GPUs alone, by their flag, its
# value, or their module of selective recompute.
REPLACED: dict[str, Callable[[Namespace], bool]] = {
    "--context-parallel-size": lambda settings: _above_one(settings, "context_parallel_size"),
    "--moe-latent-size": lambda settings: bool(getattr(settings, "moe_latent_size", None)),
    "--multi-latent-attention": lambda settings: (
        bool(getattr(settings, "multi_latent_attention", False))
        or "mla_up_proj" in _recomputed(settings)
    ),
    "--experimental-attention-variant": lambda settings: (
        getattr(settings, "experimental_attention_variant", None) == "gated_delta_net"
        or "gdn_norm_out" in _recomputed(settings)
    ),
    "layernorm": lambda settings: "layernorm" in _recomputed(settings),
    **{f"--{name.replace('_', '-')}": partial(_is_on, name) for name in _SWITCHES},
    # Megatron demands it of MoE layers under tensor parallelism, and turns it off without.
    "--sequence-parallel": lambda settings: _above_one(settings, "tensor_model_parallel_size"),
    "--moe-flex-dispatcher-backend": lambda settings: settings.moe_token_dispatcher_type == "flex",
    "dist_muon": lambda settings: _is_dist_muon(settings),
}


def proof_of(settings: Namespace) -> Proof:
    """Say what proves settings that training accepts."""
    is_replaced = any(is_used(settings) for is_used in REPLACED.values())
    return Proof.REPLACEMENT if is_replaced else Proof.CPU


def _is_dist_muon(settings: Namespace) -> bool:
    is_shared = bool(getattr(settings, "use_distributed_optimizer", False))
    return settings.optimizer == "dist_muon" or (settings.optimizer == "muon" and is_shared)


def _recomputed(settings: Namespace) -> set[str]:
    if settings.recompute_granularity != "selective":
        return set()
    return set(settings.recompute_modules or ())


def _above_one(settings: Namespace, name: str) -> bool:
    return int(getattr(settings, name, None) or 1) > 1
