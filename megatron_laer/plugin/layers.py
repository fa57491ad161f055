"""Patches that make Megatron build FSEP layers, and FSEP groups next to its own."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_laer import session
from megatron_laer.plugin.patching import Patch, around
from megatron_laer.session import Session

_HYBRID_SPECS = "megatron.core.models.hybrid.hybrid_layer_specs"


def _fsep_layer(_original: Any) -> Any:
    from megatron_laer.layer.moe_layer import FSEPMoELayer

    return FSEPMoELayer


@around(
    "megatron.core.transformer.multi_token_prediction",
    "MultiTokenPredictionLayer.__init__",
    "marks MTP layers, which hybrid models do not mark themselves",
)
def _mark_layers(original: Any, *args: Any, **kwargs: Any) -> None:
    from megatron_laer.layer.moe_layer import for_multi_token_prediction

    with for_multi_token_prediction():
        original(*args, **kwargs)


def repoint_hybrid_specs() -> None:
    """Make imported layer specs of hybrid models follow the switch; later imports do anyway."""
    module = sys.modules.get(_HYBRID_SPECS)
    if module is None:
        return
    from megatron.core.models.gpt import moe_module_specs

    spec = module.hybrid_stack_spec.submodules.moe_layer.submodules
    if spec.mlp.func is not moe_module_specs.MoELayer:
        spec.mlp = functools.partial(moe_module_specs.MoELayer, *spec.mlp.args, **spec.mlp.keywords)


def create_groups(
    current: Session, timeout: timedelta | None = None, nccl_settings: str | None = None
) -> None:
    """Create the session's FSEP groups. Collective over the world.

    `nccl_settings` is the file of Megatron's `--nccl-communicator-config-path`.
    """
    from megatron.core import parallel_state

    from megatron_laer.plugin.nccl_options import NcclOptions

    options = NcclOptions.read(nccl_settings, current.config) if _uses_nccl() else None

    def create_group(ranks: Sequence[int], group_desc: str) -> Any:
        return parallel_state.create_group(
            ranks,
            timeout=timeout,
            pg_options=None if options is None else options.of(group_desc, ranks),
            group_desc=group_desc,
        )

    current.create_groups(parallel_state.get_expert_model_parallel_group(), create_group)
    if options is not None:
        options.refuse_unused()


def _uses_nccl() -> bool:
    return "nccl" in dist.get_backend()


@around(
    "megatron.core.parallel_state",
    "initialize_model_parallel",
    "creates the FSEP groups",
    also=('its argument high_priority_stream_groups: gets "ep" with NCCL',),
)
def _create_groups(original: Any, *args: Any, **kwargs: Any) -> Any:
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if _uses_nccl():
        # Tokens precede weights and gradients, whose streams have a lower priority.
        given["high_priority_stream_groups"] = [
            *(given["high_priority_stream_groups"] or ()),
            "ep",
        ]
    result = original(*call.args, **call.kwargs)
    current = session.current()
    assert current is not None
    create_groups(
        current,
        timedelta(minutes=given["distributed_timeout_minutes"]),
        given["nccl_communicator_config_path"],
    )
    return result


@around("megatron.core.parallel_state", "destroy_model_parallel", "destroys the FSEP groups")
def _destroy_groups(original: Any, *args: Any, **kwargs: Any) -> Any:
    if (current := session.current()) is not None:
        current.close()
    return original(*args, **kwargs)


@around(
    "megatron.core.process_groups_config",
    "ProcessGroupCollection.use_mpu_process_groups",
    "gives pg_collection.fsep to others",
)
def _give_field(original: Any, *args: Any, **kwargs: Any) -> Any:
    collection = original(*args, **kwargs)
    current = session.current()
    if current is not None and current.has_groups:
        collection.fsep = current.groups.tokens
    return collection


LAYER_PATCHES = (
    Patch(
        "megatron.core.models.gpt.moe_module_specs",
        "MoELayer",
        _fsep_layer,
        "MoE layers of GPT and Hybrid models are FSEP layers",
        also=(f"{_HYBRID_SPECS}.hybrid_stack_spec: its MoE layer follows, if it was built before",),
    ),
    _mark_layers,
    _create_groups,
    _destroy_groups,
    _give_field,
)
