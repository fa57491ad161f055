"""Sets of experts: the experts of each token, and the pairs that they make.

A file of sets has a line per token: its K different experts, as numbers with blanks between them.
It may be compressed by gzip. Its first half of tokens is read as one step, and the second as
another: so plans from the first are counted on the second. It has one layer, named like the file,
and one source rank. Of many tokens evenly chosen ones stay as sets.

Legend: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.files.checks import open_input, quoted, read_bytes
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.tools.traces.records import PairRecords, Trace, assemble

GZIP = b"\x1f\x8b"

# Some million tokens.
_MAX_BYTES = 2**26
_TOKENS_AT_ONCE = 2**14
# Bytes of a step's sets, of a byte per token and expert.
_MOST_SET_BYTES = 2**26


def count_pairs(expert_TK: Int64, num_experts: int) -> Int64:
    """Count the tokens that chose both of two experts, int64 [E, E]; an expert twice is once."""
    pairs_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
    for begin in range(0, len(expert_TK), _TOKENS_AT_ONCE):
        part_TK = expert_TK[begin : begin + _TOKENS_AT_ONCE]
        chosen_TE = np.zeros((len(part_TK), num_experts), dtype=np.float32)
        chosen_TE[np.arange(len(part_TK))[:, None], part_TK] = 1
        # Exact in float32, since a part has far fewer than 2**24 tokens.
        pairs_EE += (chosen_TE.T @ chosen_TE).astype(np.int64)
    return pairs_EE


def is_set(line: bytes) -> bool:
    """Return whether a line is a token's set of experts: several numbers and blanks alone."""
    words = line.split()
    return len(words) > 1 and all(word.isdigit() for word in words)


def read_sets(path: Path, num_experts: int | None = None) -> Int64:
    """Read the experts of each token, int64 [T, K]; raise ValueError for another file."""
    most = num_experts or MAX_EXPERTS
    sets: list[list[int]] = []
    for number, line in enumerate(_content(path).splitlines(), start=1):
        try:
            if not is_set(line):
                raise ValueError(
                    f"expected numbers of experts, got {quoted(line[:60].decode(errors='replace'))}"
                )
            experts = [int(word[:9]) for word in line.split()]
            if max(experts) >= most:
                raise ValueError(f"expert {max(experts)} must be in 0..{most - 1}")
            if len(set(experts)) < len(experts):
                text = quoted(line[:60].decode(errors="replace"))
                raise ValueError(f"a token must have an expert once: {text}")
            if sets and len(experts) != len(sets[0]):
                raise ValueError(f"{len(experts)} experts; expected {len(sets[0])} as in line 1")
            sets.append(experts)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if len(sets) < 2:
        raise ValueError(f"{path} has {len(sets)} tokens; give at least two")
    return np.array(sets)


def read_file_of_sets(path: Path, num_experts: int | None = None) -> Trace:
    expert_TK = read_sets(path, num_experts)
    experts = num_experts or int(expert_TK.max()) + 1
    half = len(expert_TK) // 2
    parts = [expert_TK[:half], expert_TK[half:]]
    step_I, expert_I = np.indices((2, experts)).reshape(2, -1)
    zero_I = np.zeros_like(step_I)
    pairs = {(step, 0): count_pairs(part_TK, experts) for step, part_TK in enumerate(parts)}
    tokens_I = np.concatenate([pairs_EE.diagonal() for pairs_EE in pairs.values()])
    trace = assemble(
        [path.name.partition(".")[0]],
        np.stack([step_I, zero_I, zero_I], axis=1),
        zero_I,
        expert_I,
        tokens_I,
        num_ranks=1,
        num_experts=experts,
        file_bytes=expert_TK.nbytes,
        pairs=PairRecords.of_tables(pairs, experts),
    )
    return replace(trace, sets={(at, 0): _sets(part, experts) for at, part in enumerate(parts)})


def _sets(expert_TK: Int64, num_experts: int) -> Bool:
    """Return the experts of evenly chosen tokens, bool [T, E]."""
    chosen_TK = expert_TK[:: 1 + len(expert_TK) * num_experts // _MOST_SET_BYTES]
    sets_TE = np.zeros((len(chosen_TK), num_experts), dtype=np.bool_)
    np.put_along_axis(sets_TE, chosen_TK, True, axis=1)
    return sets_TE


def _content(path: Path) -> bytes:
    with open_input(path) as file:
        if file.read(len(GZIP)) != GZIP:
            return read_bytes(path, _MAX_BYTES)
        file.seek(0)
        try:
            with gzip.open(file) as unpacked:
                content = unpacked.read(_MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}; give a whole file") from error
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path} holds more than {_MAX_BYTES:,} bytes; give a part of it")
    return content
