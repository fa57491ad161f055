"""Weights of models that Megatron-FSDP shards, to and from checkpoints in `torch_dist`.

Its own format, `fsdp_dtensor`, is for runs with Megatron-FSDP alone. `torch_dist` is that of all
other runs, of stock and of FSEP. Optimizer state is not carried over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_laer.plugin.sharded_models import is_sharded, unwrapped

# Form of saved experts, for readers of the checkpoint, as Megatron itself states it.
_CONTENT = {"singleton_local_shards": False}


def save_whole(model: Sequence[Any], directory: str) -> None:
    """Save the weights in `torch_dist`, for a run without Megatron-FSDP. Collective.

    Load them with `--no-load-optim --no-load-rng --finetune`.

    Args:
        model: Megatron's list of model chunks, between steps.
        directory: an empty folder of one iteration, such as `RUN/iter_0000100`.

    Raises:
        ValueError: a model that Megatron-FSDP does not shard.
    """
    from megatron.core import dist_checkpointing

    with _gathered(model) as chunks:
        state = {**_described(chunks, _CONTENT), "checkpoint_version": 3.0}
        dist_checkpointing.save(state, directory, content_metadata=_CONTENT)


def load_whole(model: Sequence[Any], directory: str) -> None:
    """Load weights from `torch_dist`, of stock or FSEP without Megatron-FSDP. Collective.

    Args:
        model: Megatron's list of model chunks, before the first step.
        directory: the folder of one iteration.

    Raises:
        ValueError: a model that Megatron-FSDP does not shard, or that has weights which it does not
            describe to checkpoints.
    """
    from megatron.core import dist_checkpointing

    with _gathered(model) as chunks:
        metadata = dist_checkpointing.load_content_metadata(directory)
        loaded = dist_checkpointing.load(_described(chunks, metadata), directory)
        for chunk, key in zip(chunks, _keys(chunks), strict=True):
            weights = _weights(chunk)
            if missing := weights.keys() - loaded[key].keys():
                raise ValueError(
                    f"the model's sharded_state_dict has no {', '.join(sorted(missing))}, so a "
                    "checkpoint in torch_dist has not either; describe these weights there"
                )
            # Not by `load_state_dict`, whose hook would bring back the weights of the optimizer.
            for name, mine in weights.items():
                mine.detach().copy_(loaded[key][name])
        for wrapped in model:
            _keep_shards(wrapped)


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
