"""Patches of Megatron-FSDP, which shards dense layers next to experts at home.

Home experts are stock's parameters, so that its optimizer and its checkpoints have them. Their
weights and gradients stay whole between steps: replicas are sent from the ones, and their gradients
are added to the others. So weights are gathered once a step, and gradients reduced once.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megatron_laer import session
from megatron_laer.layer.experts.adapters import has_adapters
from megatron_laer.plugin.patching import around, original_of
from megatron_laer.rules import WITH_ADAPTERS, WITH_FSDP, problems_by
from megatron_laer.support.model import refuse

_BUFFERS = "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer"


def is_sharded(wrapped: Any) -> bool:
    """Return whether Megatron-FSDP wraps this model chunk."""
    return bool(getattr(getattr(wrapped, "ddp_config", None), "use_megatron_fsdp", False))


def unwrapped(wrapped: Any) -> torch.nn.Module:
    """Return a chunk's own module; Megatron's function leaves the inner wrapper of its FSDP."""
    from megatron.core.utils import unwrap_model

    module: torch.nn.Module = unwrap_model(wrapped)
    return unwrap_model(module.module) if is_sharded(wrapped) else module


def await_weights(wrapped: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Gather a step's weights of home experts over their replicas, before an early read."""
    wrapped.module.all_gather_and_wait_parameters_ready(list(parameters), prefetch=False)


def _are_of_experts(parameters: Sequence[torch.nn.Parameter]) -> bool:
    return not getattr(parameters[0], "allreduce", True)


@around(
    "megatron.core.distributed.fsdp.mcore_fsdp_adapter",
    "FullyShardedDataParallel.__init__",
    "Megatron-FSDP is refused with settings that no test proves next to FSEP",
)
def _judge_model(
    original: Any, self: Any, config: Any, ddp_config: Any, module: Any, *args: Any, **kwargs: Any
) -> None:
    _judge(config, ddp_config, module=module)
    original(self, config, ddp_config, module, *args, **kwargs)


@around(
    "megatron.core.optimizer",
    "_get_param_groups",
    "so are settings of its optimizer",
)
def _judge_optimizer(
    original: Any, model_chunks: Any, config: Any, *args: Any, **kwargs: Any
) -> Any:
    wrapped = model_chunks[0]
    if is_sharded(wrapped):
        _judge(wrapped.config, wrapped.ddp_config, config)
    return original(model_chunks, config, *args, **kwargs)


def _judge(
    config: Any, ddp_config: Any, optimizer: Any = None, module: torch.nn.Module | None = None
) -> None:
    """Refuse what training by Megatron's arguments refuses, also in a loop without these.

    Configurations are alike on all ranks, and so is the refusal.
    """
    current = session.current()
    if current is None or not config.num_moe_experts:
        return
    given = {} if optimizer is None else vars(optimizer)
    named = vars(ddp_config) | given | vars(config) | {"use_megatron_fsdp": True}
    named["ddp_average_in_collective"] = ddp_config.average_in_collective
    named["fsep_sharding"] = current.sharding
    named["adapts_experts"] = module is not None and has_adapters(module)
    refuse(problems_by((*WITH_FSDP, *WITH_ADAPTERS), SimpleNamespace(**named)))


@around(_BUFFERS, "DataParallelBuffer.__init__", "Megatron-FSDP leaves home experts whole")
def _keep_whole(
    original: Any, buffer: Any, config: Any, params: Any, is_data_distributed: bool, **kwargs: Any
) -> None:
    # Buffers of main weights alone have no allocator, since they are never gathered.
    if "temporary_bucket_allocator" in kwargs and _are_of_experts(params):
        is_data_distributed = False
    original(buffer, config, params, is_data_distributed, **kwargs)


@around(_BUFFERS, "_get_parameter_groups", "Megatron-FSDP has home experts in no unit")
def _take_from_units(original: Any, *args: Any, **kwargs: Any) -> Any:
    groups, *maps = original(*args, **kwargs)
    for group in groups:
        if _are_of_experts(group.params):
            group.fsdp_unit_id = None
    return groups, *maps


@around(
    _BUFFERS, "AllGatherPipeline.release_bucket", "Megatron-FSDP gathers home experts once a step"
)
def _keep_gathered(original: Any, pipeline: Any, bucket_id: int, *args: Any, **kwargs: Any) -> None:
    # A unit's module releases all of its parameters.
    if not _are_of_experts(pipeline.buffer.parameter_groups[bucket_id].params):
        original(pipeline, bucket_id, *args, **kwargs)


@around(
    _BUFFERS,
    "GradReducePipeline.reduce_gradients",
    "Megatron-FSDP reduces no home expert at each microbatch",
)
def _reduce_others(original: Any, self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
    original(self, [part for part in params if not _are_of_experts([part])], *args, **kwargs)


@around(
    "megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp",
    "MegatronFSDP.synchronize_gradient_reduce",
    "Megatron-FSDP reduces home experts after all others",
)
def _reduce_at_end(original: Any, sharded: Any) -> None:
    # Earlier, a reduce would scale what earlier microbatches have added once more. And layouts
    # decide when experts' gradients are complete, so that replicas would differ in their order.
    if sharded.ddp_config.overlap_grad_reduce:
        groups = sharded.param_and_grad_buffer.parameter_groups
        trained = [group.params for group in groups if group.requires_grad]
        experts = [part for params in trained if _are_of_experts(params) for part in params]
        original_of(_reduce_others)(sharded.grad_reduce_pipeline, experts)
    original(sharded)


SHARDING_PATCHES = (
    _judge_model,
    _judge_optimizer,
    _keep_whole,
    _take_from_units,
    _keep_gathered,
    _reduce_others,
    _reduce_at_end,
)
