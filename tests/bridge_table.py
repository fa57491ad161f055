"""Megatron-Bridge's recipes, exported as rows of a table, as Megatron's arguments.

docs/support.md counts their verdicts. A row has the columns in `COLUMNS`, whose values are here;
`bridge_families` has the settings that no column states. `check-recipe --bridge-recipe` asks
an installed Megatron-Bridge instead.
"""

from __future__ import annotations

import csv
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from megatron_laer.rules import REFUSALS, WITH_ADAPTERS, problems_by
from megatron_laer.tools.recipes.containers import no_megatron_builds
from megatron_laer.tools.recipes.verdict import Judgement, judge
from tests.bridge_families import adapts_experts, implied_by


def _words(text: str, empty: object = None) -> dict[str, object]:
    return {"": empty} | {word: word for word in text.split()}


# An empty text means Megatron-Bridge's default, which comes first.
_SWITCH: dict[str, object] = {"": False, "False": False, "True": True}
# Columns of arguments, with the values of their words.
_WORDS = {
    "moe_token_dispatcher_type": ("dispatcher", _words("alltoall allgather flex", "alltoall")),
    "moe_flex_dispatcher_backend": ("flex_backend", _words("deepep hybridep ncclep")),
    "cuda_graph_impl": (
        "cuda_graph_impl",
        _words("none local transformer_engine full_iteration", "none"),
    ),
    "recompute_granularity": ("recompute", _words("selective full")),
    "overlap_moe_expert_parallel_comm": ("ep_overlap", _SWITCH),
    "delay_wgrad_compute": ("delay_wgrad", _SWITCH),
    "moe_router_force_load_balancing": ("force_balance", _SWITCH),
}
_SIZES = {
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
    "tensor_model_parallel_size": "TP",
}
_LISTS = {"cuda_graph_modules": "cuda_graph_scope", "recompute_modules": "recompute_modules"}
# fp8, its recipe and fp4.
_PRECISIONS = {
    **dict.fromkeys(("bf16", "bf16_mixed", "MixedPrecisionConfig", "mp"), (None, None, None)),
    **dict.fromkeys(("fp8_mx", "bf16_with_mxfp8_mixed"), ("e4m3", "mxfp8", None)),
    **dict.fromkeys(
        ("fp8_sc", "bf16_with_fp8_subchannel_scaling_mixed"), ("e4m3", "blockwise", None)
    ),
    **dict.fromkeys(
        ("fp8_cs", "bf16_with_fp8_current_scaling_mixed"), ("hybrid", "tensorwise", None)
    ),
    **dict.fromkeys(("fp8_ds", "bf16_with_fp8_delayed_scaling_mixed"), ("hybrid", "delayed", None)),
    **dict.fromkeys(("nvfp4", "bf16_with_nvfp4_mixed"), (None, None, "e2m1")),
}
_COLUMNS_OF_WORDS = [column for column, _ in _WORDS.values()]
COLUMNS = (
    *("recipe", "pool", "precision", "optimizer"),
    *(*_COLUMNS_OF_WORDS, *_SIZES.values(), *_LISTS.values()),
)

# These need no column: the first two are old names of --cuda-graph-impl, the next two configure a
# backend that is refused, the last is Megatron-Bridge's default, and the others are no settings of
# a recipe.
_WITHOUT_COLUMN: dict[str, object] = {
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "moe_dispatch_fwd_dtype": "bf16",
    "moe_combine_bwd_dtype": "bf16",
    "moe_use_upcycling": False,
    "transformer_impl": "transformer_engine",
    "overlap_grad_reduce": True,
}
_READ = (*_WORDS, *_SIZES, *_LISTS, "num_experts", "fp8", "fp4", "optimizer")
# Other deciding settings, by the names of Megatron's arguments.
_DECIDING = (
    *(row.argument for row in REFUSALS if row.argument not in ("", *_READ, *_WITHOUT_COLUMN)),
    "use_megatron_fsdp",  # with partners that no column has
    "overlap_grad_reduce",
)
_OFF = ("", "None", "False")
_NUMBER = re.compile(r"[0-9]+\.[0-9]+")
_OPTIMIZERS = re.compile(r"(?:opt:)?(distributed_)?(?:fused_)?(adam|sgd|muon|lion)(?:_\w+)?")


def read_recipes(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def judge_recipe(row: Mapping[str, str]) -> Judgement:
    settings, name = _settings(row), row["recipe"]
    for one in implied_by(name):
        vars(settings).update(one.settings)
    # Columns that a table may have or omit.
    given = {column: _setting(row[column]) for column in _DECIDING if column in row}
    vars(settings).update(given)
    settings.adapts_experts = settings.is_lora and adapts_experts(name)
    refused = no_megatron_builds(name)
    refused += problems_by(WITH_ADAPTERS, settings)
    return judge(settings, also_refused=refused)


def _settings(row: Mapping[str, str]) -> Namespace:
    fp8, recipe, fp4 = _PRECISIONS[row["precision"]]
    optimizer = _OPTIMIZERS.fullmatch(row["optimizer"])
    assert optimizer is not None, row["optimizer"]
    return Namespace(
        num_experts=1,  # no column has the number, and all that matters here is that there are some
        **{argument: words[row[column]] for argument, (column, words) in _WORDS.items()},
        **{argument: int(row[column] or 1) for argument, column in _SIZES.items()},
        **{argument: re.findall(r"\w+", row[column]) for argument, column in _LISTS.items()},
        fp8=fp8,
        fp8_recipe=recipe,
        fp4=fp4,
        optimizer=optimizer[2],
        use_distributed_optimizer=bool(optimizer[1]),
        bf16=True,
        pipeline_model_parallel_size=int(row.get("PP") or 1),
        # The pool of performance recipes has recipes of all kinds.
        is_lora=row["pool"] == "peft" or "_peft_" in row["recipe"],
        **_WITHOUT_COLUMN,
    )


def _setting(text: str) -> object:
    if text in _OFF:
        return None
    return True if text == "True" else float(text) if _NUMBER.fullmatch(text) else int(text)
