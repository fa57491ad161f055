"""Optimizer state of models that Megatron-FSDP shards, as `torch_dist` has it for all other runs.

The form is that of `--dist-ckpt-optim-fully-reshardable`: three whole tensors of a parameter, the
main weight and Adam's moments. Every rank holds all of them meanwhile, as Megatron does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

FORM = "fully_reshardable"
_MAIN = "param"


@dataclass(frozen=True)
class _Sharded:
    """One trained parameter, and this rank's elements of it in its optimizer."""

    parameter: torch.nn.Parameter
    main: Any
    elements: slice
    group: dist.ProcessGroup

    @property
    def is_of_expert(self) -> bool:
        return not getattr(self.parameter, "allreduce", True)

    def local(self, optimizer: Any) -> dict[str, torch.Tensor | None]:
        """Return this rank's flat tensors by name; None where a rank without elements has none."""
        state = optimizer.optimizer.state.get(self.main, {})
        tensors = {_MAIN: self.main} | {
            name: state.get(name) for name in optimizer.optimizer_state_keys
        }
        return {
            name: None if found is None else found._local_tensor.detach().view(-1)
            for name, found in tensors.items()
        }

    def whole(self, local: torch.Tensor | None) -> torch.Tensor:
        """Gather a tensor from the ranks that share it."""
        whole = torch.zeros_like(self.parameter, dtype=torch.float32)
        flat = whole.view(-1)
        if local is not None:
            flat[self.elements] = local
        # All but one rank have zeros, so that sums of integers keep every bit.
        dist.all_reduce(flat.view(torch.int32), group=self.group)
        return whole


def saved(
    model: Sequence[Any], optimizer: Any, described: dict[str, Any]
) -> tuple[dict[int, Any], dict[str, Any]]:
    """Return the optimizer's entry of a checkpoint, and its part of the checkpoint's metadata.

    Args:
        described: the sharded state dict of the model's weights.
    """
    step = _step(optimizer.optimizer)
    entry = dict[int, Any]()
    # Elsewhere experts have an optimizer of their own.
    for number, of_experts in enumerate((False, True)):
        parts = [part for part in _parts(model) if part.is_of_expert == of_experts]
        mains = {id(part.main) for part in parts}
        own = {"is_expert_parallel": of_experts, "step": step}
        groups = [
            {key: value for key, value in group.items() if key != "params"} | own
            for group in optimizer.optimizer.param_groups
            if mains & {*map(id, group["params"])}
        ]
        tensors = (
            {name: part.whole(local) for name, local in part.local(optimizer).items()}
            for part in parts
        )
        entry[number] = {
            "optimizer": {"param_groups": groups},
            "param_state": _entries(parts, tensors, described),
            "param_state_sharding_type": FORM,
        }
    return entry, {"distrib_optim_sharding_type": FORM, "chained_optim_avoid_prefix": True}


def asked_for(
    model: Sequence[Any], optimizer: Any, described: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Return the sharded tensors to load for `keep`."""
    names = (_MAIN, *optimizer.optimizer_state_keys)
    parts = list(_parts(model))
    tensors = (
        {name: torch.empty_like(part.parameter, dtype=torch.float32) for name in names}
        for part in parts
    )
    return _entries(parts, tensors, described)


def keep(
    model: Sequence[Any], optimizer: Any, loaded: dict[int, dict[str, Any]], common: dict[str, Any]
) -> None:
    """Cut loaded tensors into the shards that the optimizer has, and set its number of steps."""
    optimizer._init_optimizer_states_with_dummy_values()
    for number, part in enumerate(_parts(model)):
        for name, local in part.local(optimizer).items():
            if local is not None:
                local.copy_(loaded[number][name].view(-1)[part.elements])
    step = max(
        group["step"]
        for of_kind in common.values()
        for group in of_kind["optimizer"]["param_groups"]
    )
    for group in optimizer.optimizer.param_groups:
        if "step" in group:
            group["step"] = step
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def _parts(model: Sequence[Any]) -> Iterator[_Sharded]:
    """Yield the trained parameters in one order on all ranks."""
    for wrapped in model:
        buffers = wrapped.module.param_and_grad_buffer
        for _, main in buffers.optimizer_named_parameters:
            parameter = main.orig_param
            group = buffers.parameter_groups[buffers.param_to_param_group[parameter]]
            if not group.requires_grad:
                continue
            buffer = group.main_weight_buffer
            if buffer is None:  # the weights themselves, in fp32
                buffer = group.model_weight_buffer
            elements = slice(*buffer._get_item_slice_in_shard(buffer.param_idx[parameter]))
            yield _Sharded(parameter, main, elements, buffer.data_parallel_group)


def _entries(
    parts: Sequence[_Sharded],
    tensors: Iterable[dict[str, torch.Tensor]],
    described: dict[str, Any],
) -> dict[int, dict[str, Any]]:
    """Return tensors as the weights' own entries describe them, under Megatron's names."""
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        make_sharded_optimizer_tensor,
    )

    of = get_param_id_to_sharded_param_map(described, (part.parameter for part in parts))
    return {
        number: {
            name: make_sharded_optimizer_tensor(of[number], tensor, f"optimizer.state.{name}")
            for name, tensor in by_name.items()
        }
        for number, by_name in enumerate(tensors)
    }


def _step(inner: Any) -> int:
    steps = [group["step"] for group in inner.param_groups if "step" in group]
    steps += [state["step"] for state in inner.state.values() if "step" in state]
    return max(map(int, steps), default=0)
