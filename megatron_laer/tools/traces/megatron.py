"""Reader of Megatron's `--moe-routing-trace-path`: JSON lines, one file per rank.

Each line is one call of one router: step, block, layer, rank and the experts of every token. The
lines of one step and layer are its microbatches, in order. A router that runs again under recompute
counts as one more; calls of an evaluation count towards the step after it. Megatron numbers layers
within a pipeline stage, and its ranks are global: with several stages or FSEP groups, choose the
ranks of one group.

Files do not state the number of experts; without `num_experts` it is the largest one seen + 1.

Legend: I cells (a record, a rank and an expert), T tokens, K top-k.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.files.checks import lines, open_input
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.telemetry.trace_file import MAX_INDEX
from megatron_laer.tools.traces.records import PairRecords, Trace, assemble
from megatron_laer.tools.traces.sets import count_pairs

FILE_NAME = re.compile(r"router_trace_rank([0-9]{1,7})\.jsonl")

# Decoder layers come before those of multi-token prediction heads: (is MTP, head, layer).
_Layer = tuple[bool, int, int]


@dataclass
class _RankCalls:
    """One rank's router calls: (step, layer, microbatch) → tokens of each expert.

    `pairs` are the sums of a step's calls, by step and layer, where they are asked for.
    """

    tokens: dict[tuple[int, _Layer, int], Int64] = field(default_factory=dict)
    pairs: dict[tuple[int, _Layer], Int64] = field(default_factory=dict)

    def steps(self) -> set[int]:
        return {step for step, _, _ in self.tokens}


def read_megatron(
    path: Path,
    ranks: Sequence[int] | None = None,
    num_experts: int | None = None,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
    *,
    pairs: bool = False,
) -> Trace:
    """Read a folder of `router_trace_rank*.jsonl`, or one such file; `ranks` in their new order.

    A truncated last line, and steps that some rank has not reached, are omitted.
    """
    files = _files(path, ranks)
    calls = [_read_rank(file, num_experts, pairs=pairs) for file in progress(files)]
    # The ranks of a killed run stopped at different steps.
    last_step = min(max(rank_calls.steps(), default=-1) for rank_calls in calls)
    for rank_calls in calls:
        rank_calls.tokens = {
            key: value for key, value in rank_calls.tokens.items() if key[0] <= last_step
        }
    _check_same_calls(files, calls)

    layers = sorted({layer for _, layer, _ in calls[0].tokens})
    number = {layer: index for index, layer in enumerate(layers)}
    cells: list[tuple[int, int, int, int]] = []
    experts: list[Int64] = []
    tokens: list[Int64] = []
    for rank, rank_calls in enumerate(calls):
        for (step, layer, microbatch), tokens_E in rank_calls.tokens.items():
            # Keep one cell even without tokens, or the record would be lost.
            expert_I = np.flatnonzero(tokens_E) if tokens_E.any() else np.zeros(1, dtype=np.int64)
            cells += [(step, number[layer], microbatch, rank)] * expert_I.size
            experts.append(expert_I)
            tokens.append(tokens_E[expert_I])
    if not cells:
        raise ValueError(f"{path} holds no complete step of all ranks; trace at least two steps")
    cell_I4 = np.array(cells, dtype=np.int64)
    expert_I = np.concatenate(experts)
    num_experts = num_experts or int(expert_I.max()) + 1
    of_pairs: dict[tuple[int, int], Int64] = {}
    for rank_calls in calls:
        for (step, layer), pairs_EE in rank_calls.pairs.items():
            if step <= last_step:
                key = step, number[layer]
                of_pairs[key] = _sum(of_pairs.get(key), pairs_EE)
    try:
        return assemble(
            [_layer_name(layer) for layer in layers],
            cell_I4[:, :3],
            cell_I4[:, 3],
            expert_I,
            np.concatenate(tokens),
            num_ranks=len(files),
            num_experts=num_experts,
            file_bytes=sum(file.stat().st_size for file in files),
            pairs=PairRecords.of_tables(of_pairs, num_experts),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _files(path: Path, ranks: Sequence[int] | None) -> list[Path]:
    if not path.is_dir():
        if ranks is not None:
            raise ValueError(f"{path} is the file of one rank; give its folder to choose ranks")
        return [path]
    found: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        match = FILE_NAME.fullmatch(file.name)
        if match and int(match[1]) in found:
            raise ValueError(f"{file} and {found[int(match[1])]} are of one rank; move one away")
        if match:
            found[int(match[1])] = file
    wanted = sorted(found) if ranks is None else list(ranks)
    missing = [rank for rank in wanted if rank not in found]
    if missing or not wanted:
        raise ValueError(
            f"{path} has no router_trace_rank*.jsonl of ranks {missing}; it has {sorted(found)}"
        )
    return [found[rank] for rank in wanted]


def _read_rank(path: Path, num_experts: int | None, *, pairs: bool) -> _RankCalls:
    calls = _RankCalls()
    seen: Counter[tuple[int, _Layer]] = Counter()
    step = -1
    with open_input(path) as file:
        for number, line in enumerate(lines(file, path), start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    # A truncated line, so its step is incomplete too.
                    calls.tokens = {k: value for k, value in calls.tokens.items() if k[0] < step}
                    break
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            try:
                step, layer, index_TK = _parse(record, num_experts)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            calls.tokens[step, layer, seen[step, layer]] = np.bincount(index_TK.reshape(-1))
            if pairs and index_TK.size:
                pairs_EE = count_pairs(index_TK, int(index_TK.max()) + 1)
                calls.pairs[step, layer] = _sum(calls.pairs.get((step, layer)), pairs_EE)
            seen[step, layer] += 1
    return calls


def _parse(record: object, num_experts: int | None) -> tuple[int, _Layer, Int64]:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {str(record)[:100]}")
    step, layer = _integer(record, "step"), _integer(record, "layer")
    block = record.get("block")
    if block not in ("decoder", "mtp"):
        raise ValueError(f"block must be 'decoder' or 'mtp', got {str(block)[:100]!r}")
    head = _integer(record, "mtp_idx") if "mtp_idx" in record else 0
    shape = (_integer(record, "num_tokens"), _integer(record, "topk"))
    given = record.get("top_indices")
    if not isinstance(given, list):
        raise ValueError("top_indices must be a list of lists of expert numbers")
    # Megatron writes [] for no tokens, which says nothing about K.
    index_TK = np.array(given) if given else np.zeros((0, min(shape[1], 1)), dtype=np.int64)
    if not given and shape[0] == 0:
        shape = (0, index_TK.shape[1])
    if index_TK.shape != shape or index_TK.dtype.kind not in "iu":
        raise ValueError(
            f"top_indices have shape {index_TK.shape} of {index_TK.dtype}, but num_tokens and topk "
            f"are {shape}"
        )
    most = num_experts or MAX_EXPERTS
    if index_TK.size > 0 and not 0 <= int(index_TK.min()) <= int(index_TK.max()) < most:
        wrong = int(index_TK.min()) if int(index_TK.min()) < 0 else int(index_TK.max())
        raise ValueError(f"expert {wrong} is not in 0..{most - 1}")
    return step, (block == "mtp", head, layer), index_TK.astype(np.int64)


def _sum(before_EE: Int64 | None, pairs_EE: Int64) -> Int64:
    """Add tables of which one may lack the last experts."""
    if before_EE is None:
        return pairs_EE
    small_EE, large_EE = sorted((before_EE, pairs_EE), key=len)
    summed_EE = large_EE.copy()
    summed_EE[: len(small_EE), : len(small_EE)] += small_EE
    return summed_EE


def _integer(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INDEX:
        raise ValueError(f"{key} must be an integer of at least 0, got {str(value)[:100]}")
    return value


def _check_same_calls(files: Sequence[Path], calls: Sequence[_RankCalls]) -> None:
    first = set(calls[0].tokens)
    for file, rank in zip(files, calls, strict=True):
        for key in first.symmetric_difference(rank.tokens):
            step, layer, microbatch = key
            has, lacks = (files[0], file) if key in first else (file, files[0])
            raise ValueError(
                f"{has} has step {step}, layer {_layer_name(layer)}, microbatch {microbatch}, "
                f"{lacks} does not; choose the ranks of one pipeline stage and one FSEP group"
            )


def _layer_name(layer: _Layer) -> str:
    is_mtp, head, number = layer
    return f"mtp.{head}.{number}" if is_mtp else f"decoder.{number}"
