"""Conversion of Megatron-Bridge recipes, exported as rows of a table, to Megatron's arguments.

A row has the columns in `COLUMNS` and may have those in `MORE_COLUMNS`; others are ignored. This
module defines the columns' values; `families` has the settings that no column states.
"""

from __future__ import annotations

import csv
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import quoted, read_text
from megatron_laer.files.yaml_text import Content
from megatron_laer.support import expert_adapters, fp8_experts
from megatron_laer.support.table import REFUSALS
from megatron_laer.tools.recipes.families import (
    UNKNOWN_FAMILY,
    adapts_experts,
    implied_by,
    is_known,
)
from megatron_laer.tools.recipes.verdict import Judgement, judge

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
# Other deciding settings, by the names of Megatron's arguments; those that refuse a run come first.
_DECIDING = (
    *(
        row.argument
        for row in sorted(REFUSALS, key=lambda row: row.left_out is not None)
        if row.argument and row.argument not in (*_READ, *_WITHOUT_COLUMN)
    ),
    "use_megatron_fsdp",  # with partners that no column has
    "overlap_grad_reduce",
)
MORE_COLUMNS = ("PP", *_DECIDING)
_OFF = ("", "None", "False")
_NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")

_LIST = re.compile(r"\w*|\[('\w+'(, *'\w+')*)?\]", re.ASCII)
_OPTIMIZERS = re.compile(r"(?:opt:)?(distributed_)?(?:fused_)?(adam|sgd|muon|lion)(?:_\w+)?")


def read_recipes(path: Path) -> list[dict[str, str]]:
    rows = csv.reader(read_text(path).splitlines(keepends=True), strict=True)
    try:
        names = next(rows, [])
        _check_columns(names, str(path))
        found = []
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(
                    f"{path}, line {rows.line_num}: {len(row)} cells, and the first line names "
                    f"{len(names)}"
                )
            found += [dict(zip(names, row, strict=True))] if row else []  # a line may be empty
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: no CSV: {error}") from error
    if not found:
        raise ValueError(f"{path}: no recipe follows the names of the columns; give one or more")
    return found


def recipe_of(content: Mapping[str, Content], where: str) -> dict[str, str]:
    _check_columns(list(content), where)
    found = {}
    for name in [*COLUMNS, *(name for name in MORE_COLUMNS if name in content)]:
        value = content[name]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = f"[{', '.join(repr(item) for item in value)}]"
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is {quoted(value)}; give a text or a list of texts")
        found[name] = value
    return found


def judge_recipe(row: Mapping[str, str]) -> Judgement:
    try:
        settings, implied = _settings(row), implied_by(row["recipe"])
        for one in implied:
            vars(settings).update(one.settings)
        refused = [one.refused for one in implied if one.refused]
        # Columns that a table may have or omit.
        given = {name: _setting(name, row[name]) for name in _DECIDING if name in row}
        vars(settings).update(given)
        settings.adapts_experts = settings.is_lora and adapts_experts(row["recipe"])
        refused += expert_adapters.problems(settings) if settings.adapts_experts else []
        doubts = [] if is_known(row["recipe"]) else [UNKNOWN_FAMILY]
        judgement = judge(settings, also_refused=refused, doubts=doubts)
    except ValueError as error:
        raise ValueError(f"recipe {quoted(row['recipe'])}: {error}") from error
    allow = judgement.allow
    fits = {
        row.argument
        for row in REFUSALS
        if row.fits in allow
        and not fp8_experts.problems(Namespace(**vars(settings) | {row.argument: True}), allow)
    }
    unsaid = tuple(name for name in _DECIDING if not (hasattr(settings, name) or name in fits))
    return replace(judgement, if_none_of=unsaid) if judgement.runs else judgement


def _check_columns(names: list[str], where: str) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{where}: no field {', '.join(missing)}; got {quoted(', '.join(names))}, and a recipe "
            f"has {', '.join(COLUMNS)}"
        )
    if repeated := [name for name in COLUMNS if names.count(name) > 1]:
        raise ValueError(f"{where}: {', '.join(repeated)} comes twice; remove one of them")


def _settings(row: Mapping[str, str]) -> Namespace:
    word: dict[str, Any] = {name: _word(row, name) for name in _WORDS}
    in_fp8 = isinstance(word["precision"], tuple)
    fp8, recipe = word["precision"] if in_fp8 else (None, None)
    optimizer = _OPTIMIZERS.fullmatch(row[_OPTIMIZER])
    if not optimizer:
        raise ValueError(
            f"optimizer {quoted(row[_OPTIMIZER])}: no known one; give adam, sgd, muon or lion, as "
            "in distributed_fused_adam_with_cosine_annealing"
        )
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


def _setting(name: str, text: str) -> object:
    if text in _OFF:
        return None
    if text != "True" and not _NUMBER.fullmatch(text):
        raise ValueError(f"{name} {quoted(text)}: give True, False, a number, or nothing")
    return True if text == "True" else float(text) if "." in text else int(text)


def _word(row: Mapping[str, str], name: str) -> object:
    known = _WORDS[name]
    if row[name] not in known:
        listed = ", ".join(text or "an empty text" for text in known)
        raise ValueError(f"{name} {quoted(row[name])}: unknown; known are {listed}")
    return known[row[name]]


def _size(row: Mapping[str, str], name: str) -> int:
    text = row[name]
    if not text:
        return 1
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise ValueError(f"{name} {quoted(text)}: give a number of ranks from 1, or nothing for 1")
    return int(text)


def _list(row: Mapping[str, str], name: str) -> list[str]:
    if not _LIST.fullmatch(row[name]):
        raise ValueError(f"{name} {quoted(row[name])}: give a list such as ['moe', 'layernorm']")
    return re.findall(r"\w+", row[name])
