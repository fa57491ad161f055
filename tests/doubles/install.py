"""`install` gives the doubles to Megatron."""

from __future__ import annotations

from tests.doubles import deep_ep, fusions, megatron_fsdp, optimizer_offload


def install() -> None:
    """Provide the doubles to Megatron for the rest of the process, once CUDA is replaced.

    Those of fp8 are for single runs (`te_fp8.replaced_on_cpu`).
    """
    deep_ep.give_to_megatron()
    fusions.give_to_megatron()
    megatron_fsdp.fix()
    optimizer_offload.fix()
