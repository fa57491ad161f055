"""Megatron-Bridge's recipes, exported as rows of a table, as Megatron's arguments.

docs/recipes.md counts their verdicts. A row has the columns in `COLUMNS`, whose values are here;
`bridge_families` has the settings that no column states. `check-recipe --bridge-recipe` asks
an installed Megatron-Bridge instead.
"""

from __future__ import annotations

import csv
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_laer.rules import REFUSALS, WITH_ADAPTERS, problems_by
from megatron_laer.tools.recipes.containers import no_megatron_builds
from megatron_laer.tools.recipes.verdict import Judgement, judge
from tests.bridge_families import UNKNOWN_FAMILY, adapts_experts, implied_by, is_known

_FP4 = "e2m1"


def _words(text: str, empty: object = None) -> dict[str, object]:
    return {"": empty} | {word: word for word in text.split()}


# An empty text means Megatron-Bridge's default, which comes first.
_SWITCH: dict[str, object] = {"": False, "False": False, "True": True}
_WORDS: dict[str, dict[str, object]] = {
    "pool": {word: word for word in ("pretrain", "sft", "peft", "perf")},
    "dispatcher": _words("alltoall allgather flex", "alltoall"),
    "flex_backend": _words("deepep hybridep ncclep"),
    "precision": {
        **dict.fromkeys(("bf16", "bf16_mixed", "MixedPrecisionConfig", "mp"), None),
        **dict.fromkeys(("fp8_mx", "bf16_with_mxfp8_mixed"), ("e4m3", "mxfp8")),
        **dict.fromkeys(
            ("fp8_sc", "bf16_with_fp8_subchannel_scaling_mixed"), ("e4m3", "blockwise")
        ),
        **dict.fromkeys(
            ("fp8_cs", "bf16_with_fp8_current_scaling_mixed"), ("hybrid", "tensorwise")
        ),
        **dict.fromkeys(("fp8_ds", "bf16_with_fp8_delayed_scaling_mixed"), ("hybrid", "delayed")),
        **dict.fromkeys(("nvfp4", "bf16_with_nvfp4_mixed"), _FP4),
    },
    "cuda_graph_impl": _words("none local transformer_engine full_iteration", "none"),
    "recompute": _words("selective full"),
    "ep_overlap": _SWITCH,
    "delay_wgrad": _SWITCH,
    "force_balance": _SWITCH,
}
_SIZES = ("EP", "ETP", "TP")
_LISTS = ("cuda_graph_scope", "recompute_modules")
_OPTIMIZER = "optimizer"
COLUMNS = ("recipe", *_WORDS, *_SIZES, *_LISTS, _OPTIMIZER)

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
_READ = (
    "num_experts expert_model_parallel_size expert_tensor_parallel_size moe_token_dispatcher_type "
    "moe_flex_dispatcher_backend fp8 fp4 cuda_graph_impl cuda_graph_modules recompute_modules "
    "overlap_moe_expert_parallel_comm delay_wgrad_compute optimizer"
).split()
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
    doubts = [] if is_known(name) else [UNKNOWN_FAMILY]
    return judge(settings, also_refused=refused, doubts=doubts)


def _settings(row: Mapping[str, str]) -> Namespace:
    word: dict[str, Any] = {name: words[row[name]] for name, words in _WORDS.items()}
    in_fp8 = isinstance(word["precision"], tuple)
    fp8, recipe = word["precision"] if in_fp8 else (None, None)
    optimizer = _OPTIMIZERS.fullmatch(row[_OPTIMIZER])
    assert optimizer is not None, row[_OPTIMIZER]
    return Namespace(
        num_experts=1,  # no column has the number, and all that matters here is that there are some
        expert_model_parallel_size=_size(row, "EP"),
        expert_tensor_parallel_size=_size(row, "ETP"),
        tensor_model_parallel_size=_size(row, "TP"),
        moe_token_dispatcher_type=word["dispatcher"],
        moe_flex_dispatcher_backend=word["flex_backend"],
        fp8=fp8,
        fp8_recipe=recipe,
        fp4=_FP4 if word["precision"] == _FP4 else None,
        cuda_graph_impl=word["cuda_graph_impl"],
        cuda_graph_modules=_list(row, "cuda_graph_scope"),
        recompute_granularity=word["recompute"],
        recompute_modules=_list(row, "recompute_modules"),
        overlap_moe_expert_parallel_comm=word["ep_overlap"],
        delay_wgrad_compute=word["delay_wgrad"],
        moe_router_force_load_balancing=word["force_balance"],
        optimizer=optimizer[2],
        use_distributed_optimizer=bool(optimizer[1]),
        bf16=True,
        pipeline_model_parallel_size=_size(row, "PP") if "PP" in row else 1,
        # The pool of performance recipes has recipes of all kinds.
        is_lora=row["pool"] == "peft" or "_peft_" in row["recipe"],
        **_WITHOUT_COLUMN,
    )


def _setting(text: str) -> object:
    if text in _OFF:
        return None
    return True if text == "True" else float(text) if _NUMBER.fullmatch(text) else int(text)


def _size(row: Mapping[str, str], name: str) -> int:
    return int(row[name] or 1)


def _list(row: Mapping[str, str], name: str) -> list[str]:
    return re.findall(r"\w+", row[name])
