"""Megatron-Bridge's ConfigContainer, read as the equivalent arguments of Megatron.

A recipe is read as its function returns it. Precision and communication, which Megatron-Bridge
applies to the model at start, are applied to the result; the container is not changed.
"""

from __future__ import annotations

import os
from argparse import Namespace
from fnmatch import fnmatchcase
from typing import Any

from megatron_laer.rules import REFUSALS, names_of

_OVERLAPS = ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute")
# With CanonicalLoRA's names of the first one's halves.
_EXPERTS_LINEAR = ("linear_fc1", "linear_fc2", "linear_fc1_gate", "linear_fc1_up")


def settings_of(recipe: Any) -> Namespace:
    """Return Megatron's arguments, by their names in the table of refusals."""
    model = recipe.model
    found: dict[str, Any] = {"num_moe_experts": None, "expert_model_parallel_size": 1}
    # Newer models have the fields of TransformerConfig in a part of their own.
    for part in (recipe.dist, recipe.ddp, recipe.optimizer, getattr(model, "transformer", model)):
        found |= vars(part)
    found |= vars(model)
    found |= {name: value for name, value in vars(_precision(recipe)).items() if name in found}
    if recipe.comm_overlap is not None:
        # Megatron-Bridge reads these only here; unset means off.
        found |= {name: bool(getattr(recipe.comm_overlap, name)) for name in _OVERLAPS}
        if found.get("use_distributed_optimizer"):  # unset means on
            overlaps = getattr(recipe.comm_overlap, "overlap_grad_reduce", None)
            found["overlap_grad_reduce"] = overlaps is not False
    found["cuda_graph_modules"] = _graphed(
        found.get("cuda_graph_modules") or found.get("cuda_graph_scope")
    )
    found["use_megatron_fsdp"] = any(
        getattr(part, "use_megatron_fsdp", False) for part in (recipe.dist, recipe.ddp)
    )
    for row in REFUSALS:
        if row.argument and row.field in found:
            found[row.argument] = found.get(row.argument) or found[row.field]
    if not found.get("cpu_offloading", True):  # the number of layers alone offloads nothing
        found["cpu_offloading_num_layers"] = 0
    found["num_experts"] = found["num_moe_experts"]
    # No arguments of Megatron; only newer releases have the last one.
    saves = getattr(recipe.checkpoint, "also_save_hf_checkpoint", False)
    found |= {
        "Megatron_Bridge": True,
        "dist.use_decentralized_pg": recipe.dist.use_decentralized_pg,
        "ddp.use_megatron_fsdp": found["use_megatron_fsdp"],
        "checkpoint.also_save_hf_checkpoint": saves,
        "adapts_experts": adapts_experts(recipe),
        "peft": type(recipe.peft).__name__,
        "peft.dropout": getattr(recipe.peft, "dropout", 0.0),
    }
    found["rank"] = int(os.environ.get("RANK", "0"))
    # A launcher may use another variable; Megatron-Bridge then checks the size.
    found["world_size"] = int(os.environ.get("WORLD_SIZE", found["expert_model_parallel_size"]))
    return Namespace(**found)


def adapts_experts(recipe: Any) -> bool:
    targets = getattr(recipe.peft, "target_modules", None) or ()
    names = {target.split(".")[-1] for target in targets} - {"*"}  # in any parent module
    return any(fnmatchcase(linear, name) for linear in _EXPERTS_LINEAR for name in names)


def _precision(recipe: Any) -> Any:
    given = recipe.mixed_precision
    if isinstance(given, str):
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        return get_mixed_precision_config(given)
    return given or Namespace()


def _graphed(given: Any) -> list[str]:
    """Return the modules that a graph captures; empty for whole layers."""
    words = given.split(",") if isinstance(given, str) else names_of(given or ())
    return [word for word in words if word != "full"]
