"""Megatron's flags of the recipe that all parts train with, as published ones have them.

Transformer Engine's layers where it is installed, experts by grouped products that add to main
gradients, the distributed optimizer, and both of its overlaps. A dry run has what the CPU can.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch.distributed as dist

from megatron_laer.config import FSEPConfig
from megatron_laer.device import CPU_FLAGS

OVERLAPS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
_WITH_TRANSFORMER_ENGINE = """
    --transformer-impl transformer_engine --moe-grouped-gemm --moe-permute-fusion
""".split()
# The gaps between Megatron's local layers and Transformer Engine's.
_WITHOUT = """
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion
""".split()
LOCAL = "Transformer Engine is not installed: layers are Megatron's local ones, without fusions"


def has_transformer_engine(*, dry: bool) -> bool:
    return not dry and find_spec("transformer_engine") is not None


def recipe_flags(*, dry: bool) -> list[str]:
    """Return the flags of the platform and of data parallelism; sizes and data are the caller's."""
    if dry:
        layers = [*CPU_FLAGS]
    else:
        layers = _WITH_TRANSFORMER_ENGINE if has_transformer_engine(dry=dry) else _WITHOUT
    return [*layers, "--distributed-backend", "nccl", "--bf16", *OVERLAPS]


def fsep_group(ranks: Sequence[int], group_desc: str) -> dist.ProcessGroup:
    """Create a communicator with the NCCL options that training gives the one of this name."""
    from megatron_laer.plugin.nccl_options import NcclOptions

    options = None
    if "nccl" in dist.get_backend():
        options = NcclOptions.read(None, FSEPConfig()).of(group_desc, ranks)
    return dist.new_group([*ranks], pg_options=options, group_desc=group_desc)
