"""Models that Megatron-FSDP shards, to and from checkpoints in `torch_dist`.

Its own format, `fsdp_dtensor`, is for runs with Megatron-FSDP alone. `torch_dist` is that of all
other runs, of stock and of FSEP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_laer.integrations import sharded_optimizer
from megatron_laer.plugin.sharded_models import is_sharded, unwrapped

# Form of saved experts, for readers of the checkpoint, as Megatron itself states it.
_CONTENT = {"singleton_local_shards": False}


def save_whole(model: Sequence[Any], directory: str, optimizer: Any = None, **more: Any) -> None:
    """Save weights in `torch_dist`, for a run without Megatron-FSDP. Collective.

    Without optimizer, load them with `--no-load-optim --no-load-rng --finetune`.

    Args:
        model: Megatron's list of model chunks, between steps.
        directory: an empty folder of one iteration, such as `RUN/iter_0000100`.
        optimizer: Megatron's, whose state is saved as with `--dist-ckpt-optim-fully-reshardable`.
        more: other items of Megatron's checkpoints: `args`, `iteration`, `opt_param_scheduler` and
            `num_floating_point_operations_so_far`, to resume with `--no-load-rng`.

    Raises:
        ValueError: a model that Megatron-FSDP does not shard.
    """
    from megatron.core import dist_checkpointing

    with _gathered(model) as chunks:
        state, form = _described(chunks, _CONTENT), _CONTENT
        if optimizer is not None:
            state["optimizer"], of_optimizer = sharded_optimizer.saved(model, optimizer, state)
            form = form | of_optimizer
        state |= {**more, "checkpoint_version": 3.0}
        dist_checkpointing.save(state, directory, content_metadata=form)


def load_whole(model: Sequence[Any], directory: str, optimizer: Any = None) -> dict[str, Any]:
    """Load weights from `torch_dist`, of stock or FSEP without Megatron-FSDP. Collective.

    Args:
        model: Megatron's list of model chunks, before the first step.
        directory: the folder of one iteration.
        optimizer: Megatron's, whose state is loaded too.

    Returns:
        Other items of the checkpoint, such as `iteration` and `opt_param_scheduler`.

    Raises:
        ValueError: a model that Megatron-FSDP does not shard. Weights that the model does not
            describe to checkpoints. Optimizer state that fits its own run alone.
    """
    from megatron.core import dist_checkpointing

    metadata = dist_checkpointing.load_content_metadata(directory)
    if optimizer is not None:
        _check_fits(metadata, directory)
    with _gathered(model) as chunks:
        asked = _described(chunks, metadata)
        if optimizer is not None:
            asked["states"] = sharded_optimizer.asked_for(model, optimizer, asked)
        loaded: dict[str, Any] = dist_checkpointing.load(asked, directory)
        for chunk, key in zip(chunks, _keys(chunks), strict=True):
            found, weights = loaded.pop(key), _weights(chunk)
            if missing := weights.keys() - found.keys():
                raise ValueError(
                    f"the model's sharded_state_dict has no {', '.join(sorted(missing))}, so a "
                    "checkpoint in torch_dist has not either; describe these weights there"
                )
            # Not by `load_state_dict`, whose hook would bring back the weights of the optimizer.
            for name, mine in weights.items():
                mine.detach().copy_(found[name])
        for wrapped in model:
            _keep_shards(wrapped)
    if optimizer is not None:
        sharded_optimizer.keep(model, optimizer, loaded.pop("states"), loaded["optimizer"])
    loaded.pop("optimizer", None)
    return loaded


def _check_fits(metadata: dict[str, Any] | None, directory: str) -> None:
    form = (metadata or {}).get("distrib_optim_sharding_type")
    if form != sharded_optimizer.FORM:
        raise ValueError(
            f"{directory} has optimizer state of the form {form}, which fits its own run alone; "
            "save it with --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable, or "
            "leave the optimizer out"
        )


@contextmanager
def _gathered(model: Sequence[Any]) -> Iterator[list[torch.nn.Module]]:
    """Put whole weights into the model's parameters, in the block alone."""
    if not all(map(is_sharded, model)):
        raise ValueError(
            "the model is not sharded by Megatron-FSDP, so Megatron itself reads and writes its "
            "checkpoints in torch_dist; give a run with --use-megatron-fsdp"
        )
    for wrapped in model:
        fsdp = wrapped.module
        fsdp.synchronize_param_gather()  # forget weights from before the last step
        fsdp._replace_param_with_raw_if_needed()
        fsdp.all_gather_and_wait_parameters_ready(list(fsdp.module.parameters()), prefetch=False)
        # Else a hook of `state_dict` would put the shards back.
        fsdp.is_param_fsdp_distributed = True
    try:
        yield [unwrapped(wrapped) for wrapped in model]
    finally:
        for wrapped in model:
            wrapped.module.is_param_fsdp_distributed = False
            wrapped.module.synchronize_param_gather()


def _weights(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, without buffers that no checkpoint holds."""
    unsaved = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in chunk.named_modules()
        for name in module._non_persistent_buffers_set
    }
    found = {**dict(chunk.named_parameters()), **dict(chunk.named_buffers())}
    return {name: tensor for name, tensor in found.items() if name not in unsaved}


def _keep_shards(wrapped: Any) -> None:
    """Cut the loaded weights into the shards that compute and optimizer have."""
    for group in wrapped.module.param_and_grad_buffer.parameter_groups:
        for buffer in (group.model_weight_buffer, group.main_weight_buffer):
            for item, parameter in enumerate(group.params if buffer is not None else ()):
                buffer.set_item(item, parameter.detach())


def _described(chunks: Sequence[Any], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**(metadata or {}), "dp_cp_group": group}
    pairs = zip(_keys(chunks), chunks, strict=True)
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in pairs}


def _keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Return Megatron's keys of a run's chunks."""
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
