"""Patches for step boundaries, where layouts change and the scheduler gets the model chunks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_laer import session
from megatron_laer.config import write_in_force
from megatron_laer.plugin.patching import around
from megatron_laer.plugin.sharded_models import await_weights, is_sharded, unwrapped
from megatron_laer.runtime.scheduler import Chunk


@around("megatron.training.training", "train_step", "layouts change at step boundaries")
def _bound_step(
    original: Any, forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any
) -> Any:
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    optimizer = args[0] if args else kwargs["optimizer"]
    with training_step(get_args().curr_iteration, get_num_microbatches(), model):
        if (current := session.current()) is None:
            return original(forward_step_func, data_iterator, model, *args, **kwargs)
        write_in_force(get_args(), current.in_force)  # on ranks without MoE layers too
        with _skipping(optimizer, current):
            return original(forward_step_func, data_iterator, model, *args, **kwargs)


@contextmanager
def _skipping(optimizer: Any, current: session.Session) -> Iterator[None]:
    """Leave the optimizer's step out where the session says so, as for a loss that overflows."""
    if not current.config.verification.warns:
        yield
        return
    step, current.can_skip = optimizer.step, True
    optimizer.step = lambda: (False, None, None) if current.skips_step else step()
    try:
        yield
    finally:
        current.can_skip = False
        del optimizer.step


@around(
    "megatron.core.models.common.model_chunk_schedule_plan",
    "TransformerModelChunkSchedulePlan.run",
    "restores start with the forward and backward passes that it runs together",
)
def _report_chunks(
    original: Any, f_schedule_plan: Any, b_schedule_plan: Any, *args: Any, **kwargs: Any
) -> Any:
    """Report the chunks of a combined schedule to the scheduler, since it calls no module."""
    coordinator = session.current_coordinator()
    if coordinator is None:
        return original(f_schedule_plan, b_schedule_plan, *args, **kwargs)
    scheduler = coordinator.scheduler
    if b_schedule_plan is not None:
        scheduler.begin_backward(b_schedule_plan.fsep_forward)
    if f_schedule_plan is not None:
        f_schedule_plan.fsep_forward = scheduler.begin_forward(f_schedule_plan.state.model)
    try:
        return original(f_schedule_plan, b_schedule_plan, *args, **kwargs)
    finally:
        scheduler.end_forward()


@around(
    "megatron.core.distributed.finalize_model_grads",
    "_allreduce_conditional_embedding_grads",
    "exchanges are verified once all gradients of a step are complete",
)
def _verify(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Verify where every loop of Megatron's comes by between the last backward and the optimizer.

    `finalize_model_grads` itself is imported by name into loops.
    """
    if (current := session.current()) is not None:
        current.before_optimizer()
    return original(*args, **kwargs)


@contextmanager
def training_step(
    step: int, num_microbatches: int | None = None, model: Sequence[torch.nn.Module] = ()
) -> Iterator[None]:
    """Mark a training step, at whose start layouts change. Collective: every rank must enter it.

    The plugin wraps Megatron's own loop; another loop enters it like this:

        with megatron_laer.training_step(iteration, num_microbatches, model):
            ...  # forward and backward of all microbatches, optimizer

    Args:
        step: counted over the whole run, resumed runs included.
        num_microbatches: of this step; if None, planning starts only when the step is over.
        model: Megatron's list of model chunks, the same at every step. Without it, restores are
            scheduled within each layer only.

    Raises:
        ValueError: at the first step, on every rank of the world: a recording that cannot be
            written. With `--fsep-restore step`: no `num_microbatches`.
        RuntimeError: a plan that no backward pass used.
    """
    current = session.current()
    if current is None:
        yield
        return
    current.begin_step(step, num_microbatches, lambda: [_chunk(wrapped) for wrapped in model])
    yield
    current.end_step()


def _chunk(wrapped: Any) -> Chunk:
    """Describe a model chunk for the scheduler, from inside Megatron's data-parallel wrapper."""
    from megatron_laer.layer.moe_layer import FSEPMoELayer

    module = unwrapped(wrapped)
    found = [
        (part, block)
        for block in module.modules()
        for part in block.children()
        if isinstance(part, FSEPMoELayer)
    ]
    # Megatron repeats only the layers of multi-token prediction, a chunk's last ones.
    repeated = [pair for pair in found if pair[0].state.passes > 1]
    if repeated:
        found += repeated * (repeated[0][0].state.passes - 1)
    # Transformer Engine captures no module that has hooks, and its replay runs none.
    is_graphed = any(part.config.cuda_graph_impl != "none" for part, _ in found)
    routers = [part.router for part, _ in found]
    # Older releases have no router replay.
    can_replay = any(getattr(router, "router_replay", None) is not None for router in routers)
    return Chunk(
        module,
        layers=[part.state for part, _ in found],
        blocks=[] if is_graphed else [block for _, block in found],
        await_weights=functools.partial(_await_weights, wrapped),
        gathers_weights=functools.partial(_gathers_weights, wrapped),
        replayed=functools.partial(_replayed, routers) if can_replay else None,
        grads_ready=functools.partial(_grads_ready, wrapped),
    )


def _replayed(routers: Sequence[Any]) -> list[torch.Tensor] | None:
    """Return Megatron's replayed experts of the next pass, int [T, K] per router, or None."""
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    replays = [router.router_replay for router in routers]
    is_told = all(
        replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD
        and replay.target_topk_idx is not None
        for replay in replays
    )
    return [replay.target_topk_idx for replay in replays] if is_told else None


def _grads_ready(wrapped: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Report main gradients to Megatron once more; it counts reports before it reduces them."""
    if is_sharded(wrapped) or not wrapped.ddp_config.overlap_grad_reduce:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            group = wrapped.param_to_bucket_group[parameter]
            group.register_grad_ready(parameter, wrapped.force_all_reduce)


def _gathers_weights(wrapped: Any) -> bool:
    """Return False if Megatron gathers nothing in forward, or has synchronised all weights."""
    return is_sharded(wrapped) or bool(getattr(wrapped, "remove_forward_pre_hook_handles", None))


def _await_weights(wrapped: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Wait for weights before an early read, as Megatron's hook does before their module's call.

    With `--overlap-param-gather`, weights may not have arrived yet from other replicas.
    """
    if is_sharded(wrapped):
        await_weights(wrapped, parameters)
        return
    if not _gathers_weights(wrapped):
        return
    is_dispatched_elsewhere = (
        wrapped.ddp_config.align_param_gather or wrapped.overlap_param_gather_with_optimizer_step
    )
    for parameter in parameters:
        if not parameter.requires_grad:  # Megatron keeps no buffer of frozen parameters
            continue
        wrapped.param_to_bucket_group[parameter].finish_param_sync(
            skip_next_bucket_dispatch=is_dispatched_elsewhere
        )


STEP_PATCHES = (_bound_step, _report_chunks, _verify)
