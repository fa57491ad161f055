"""MoE layers and process groups: what makes Megatron build FSEP layers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from megatron_laer import activation
from megatron_laer.plugin.patching import Patch
from megatron_laer.runtime import process_groups

_HYBRID_SPECS = "megatron.core.models.hybrid.hybrid_layer_specs"


def _fsep_layer(_original: Any) -> Any:
    from megatron_laer.moe_layer import FSEPMoELayer

    return FSEPMoELayer


def repoint_hybrid_specs() -> None:
    """Make the hybrid model's layer specs, built when their module was imported, follow the switch.

    Does nothing while that module is not imported: it will then be built with the right layer.
    """
    module = sys.modules.get(_HYBRID_SPECS)
    if module is None:
        return
    from megatron.core.models.gpt import moe_module_specs

    spec = module.hybrid_stack_spec.submodules.moe_layer.submodules
    if spec.mlp.func is not moe_module_specs.MoELayer:
        spec.mlp = functools.partial(moe_module_specs.MoELayer, *spec.mlp.args, **spec.mlp.keywords)


def create_groups() -> None:
    """Create the FSEP groups. Collective over the world."""
    from megatron.core import parallel_state

    active = activation.active()
    assert active is not None
    process_groups.create_groups(
        parallel_state.get_expert_model_parallel_group(),
        active.config.node_size,
        parallel_state.create_group,
    )


def _with_fsep_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        create_groups()
        return result

    return initialize_model_parallel


def _with_fsep_teardown(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_model_parallel(*args: Any, **kwargs: Any) -> Any:
        activation.forget_model()
        process_groups.destroy_groups()
        return original(*args, **kwargs)

    return destroy_model_parallel


def _with_fsep_field(original: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
    def use_mpu_process_groups(cls: Any, *args: Any, **kwargs: Any) -> Any:
        collection = original.__func__(cls, *args, **kwargs)
        if process_groups.initialized():
            collection.fsep = process_groups.get_fsep_group()
        return collection

    return classmethod(functools.wraps(original.__func__)(use_mpu_process_groups))


LAYER_PATCHES = (
    Patch(
        "megatron.core.models.gpt.moe_module_specs",
        "MoELayer",
        _fsep_layer,
        "MoE layers of GPT and Hybrid models are FSEP layers",
    ),
    Patch(
        "megatron.core.parallel_state",
        "initialize_model_parallel",
        _with_fsep_groups,
        "creates the FSEP groups",
    ),
    Patch(
        "megatron.core.parallel_state",
        "destroy_model_parallel",
        _with_fsep_teardown,
        "destroys the FSEP groups",
    ),
    Patch(
        "megatron.core.process_groups_config",
        "ProcessGroupCollection.use_mpu_process_groups",
        _with_fsep_field,
        "gives pg_collection.fsep to others",
    ),
)
