"""Megatron-Bridge's ConfigContainer, read as the equivalent arguments of Megatron.

A recipe is read as its function returns it. Precision and communication, which Megatron-Bridge
applies to the model at start, are applied to the result; the container is not changed.
"""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from megatron_laer.config import Auto, FSEPConfig, Sharding
from megatron_laer.support import expert_adapters, muon
from megatron_laer.support.refusal import names_of
from megatron_laer.support.table import REFUSALS

_DECENTRALIZED = (
    "dist.use_decentralized_pg=True: Megatron-Bridge then makes its process groups without "
    "Megatron's parallel state, so that no FSEP group is created; set it to False"
)
_SAVES_HUGGING_FACE = (
    "checkpoint.also_save_hf_checkpoint=True: Megatron-Bridge then reads experts by stock's names, "
    "which an FSEP model has not while it trains; set it to False, and export from a checkpoint, "
    "or within megatron_laer.integrations.bridge_weights.stock_weights()"
)
_SHARDED = (
    "use_megatron_fsdp=True: no test proves it with FSEP in Megatron-Bridge; set it to False, or "
    "train by Megatron's own script"
)
_OVERLAPS = ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute")
# With CanonicalLoRA's names of the first one's halves.
_EXPERTS_LINEAR = ("linear_fc1", "linear_fc2", "linear_fc1_gate", "linear_fc1_up")
_OTHER_ADAPTERS = ("DoRA", "MultiLoRA")


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
    found["rank"] = int(os.environ.get("RANK", "0"))
    # A launcher may use another variable; Megatron-Bridge then checks the size.
    found["world_size"] = int(os.environ.get("WORLD_SIZE", found["expert_model_parallel_size"]))
    return Namespace(**found)


def problems_of(recipe: Any, settings: Namespace, config: FSEPConfig) -> list[str]:
    """Return refusals of settings that are no arguments of Megatron, and of adapters with these."""
    found = [_DECENTRALIZED] if recipe.dist.use_decentralized_pg else []
    if any(getattr(part, "use_megatron_fsdp", False) for part in (recipe.dist, recipe.ddp)):
        found.append(_SHARDED)
    # Only newer releases have it.
    if getattr(recipe.checkpoint, "also_save_hf_checkpoint", False):
        found.append(_SAVES_HUGGING_FACE)
    if not adapts_experts(recipe):
        return found
    dropout, kind = getattr(recipe.peft, "dropout", 0.0), type(recipe.peft).__name__
    if config.sharding == Sharding.ROWS:
        found.append(expert_adapters.with_rows())
    if dropout:
        found.append(expert_adapters.with_dropout(dropout))
    if kind in _OTHER_ADAPTERS:
        found.append(expert_adapters.of_kind(kind))
    return found + expert_adapters.problems(settings)


def with_homes(recipe: Any, config: FSEPConfig) -> FSEPConfig:
    """Return the settings with experts at home instead of `auto`, if the recipe needs them.

    Raises:
        ValueError: another setting needs rows.
    """
    if config.sharding == Auto.AUTO and adapts_experts(recipe):
        return replace(config, sharding=Sharding.EXPERTS)
    return muon.with_homes(recipe.optimizer, config)


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
