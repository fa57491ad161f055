"""`read_table` reads counts from CSV, with a line of column names, in one of two forms.

Long:  step,layer,microbatch,source_rank,expert,tokens
       one line per count; what is left out is 0, but every source rank has a line somewhere.
Wide:  step,layer,microbatch,source_rank,expert_0,expert_1,...
       one line per source rank, which must all be there.

All are whole numbers of at least 0, except that layers may be names.

Legend: I lines, E experts.
"""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.files import memory
from megatron_laer.files.checks import lines, open_input, quoted
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.telemetry.trace_records import MAX_COUNT, MAX_INDEX, MAX_RANKS, Trace, assemble

KEYS = ("step", "layer", "microbatch", "source_rank")

_WHOLE = re.compile(r"[0-9]{1,18}")
_EXPERT = re.compile(r"expert_([0-9]{1,6})")
# Measured: a line of 15 bytes takes 56 in its columns, and five times that while it is sorted.
_BYTES_PER_FILE_BYTE = 16


def read_table(path: Path, num_experts: int | None = None) -> Trace:
    """Read a table of counts.

    Args:
        num_experts: E; by default as many as there are columns, or the largest number + 1.

    Raises:
        ValueError: unknown columns, a malformed line, or one that is there twice.
        OSError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            memory.check_enough(
                _BYTES_PER_FILE_BYTE * path.stat().st_size, f"{path}", "give a part of the table"
            )
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            rows = csv.reader(lines(text, path), strict=True)
            names = [name.strip() for name in next(rows, [])]
            columns = {name: index for index, name in enumerate(names)}
            _check_columns(names)
            if "expert" in columns:
                return _read_long(path, rows, columns, num_experts)
            return _read_wide(path, rows, columns, num_experts)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not CSV: {error}") from error
    except ValueError as error:
        is_named = str(path) in str(error)
        raise ValueError(str(error) if is_named else f"{path}: {error}") from error


def _check_columns(names: Sequence[str]) -> None:
    experts = [name for name in names if _EXPERT.fullmatch(name)]
    is_long = set(names) == {*KEYS, "expert", "tokens"}
    is_wide = set(names) == {*KEYS, *experts} and set(experts) == {
        f"expert_{number}" for number in range(len(experts))
    }
    if len(set(names)) != len(names) or not (is_long or (is_wide and experts)):
        raise ValueError(
            f"line 1: the columns are {quoted(','.join(names))}, expected {','.join(KEYS)} and "
            "either expert,tokens or expert_0,expert_1,... each once"
        )


def _read_long(
    path: Path, rows: Iterator[list[str]], columns: Mapping[str, int], num_experts: int | None
) -> Trace:
    keys = _Keys()
    experts, tokens = array("q"), array("q")
    for number, row in _lines(path, rows, len(columns)):
        try:
            keys.add(row, columns)
            most = num_experts or MAX_EXPERTS
            experts.append(_whole(row[columns["expert"]], "expert", most - 1))
            tokens.append(_whole(row[columns["tokens"]], "tokens", MAX_COUNT))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    expert_I = np.array(experts, dtype=np.int64)
    return keys.trace(
        path, expert_I, np.array(tokens, dtype=np.int64), num_experts or _largest(expert_I) + 1
    )


def _read_wide(
    path: Path, rows: Iterator[list[str]], columns: Mapping[str, int], num_experts: int | None
) -> Trace:
    given = len(columns) - len(KEYS)
    if given > (num_experts or MAX_EXPERTS):
        raise ValueError(f"line 1: {given} experts, at most {num_experts or MAX_EXPERTS} expected")
    places = [columns[f"expert_{expert}"] for expert in range(given)]
    keys = _Keys()
    tokens = array("q")
    for number, row in _lines(path, rows, len(columns)):
        try:
            keys.add(row, columns)
            tokens.extend(_whole(row[place], "tokens", MAX_COUNT) for place in places)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    keys.check_all_ranks(path)
    expert_I = np.tile(np.arange(given), len(keys.lines))
    return keys.trace(
        path, expert_I, np.array(tokens, dtype=np.int64), num_experts or given, repeats=given
    )


class _Keys:
    """Collects the keys of all lines, and their line numbers."""

    def __init__(self) -> None:
        self.lines = array("q")
        self._numbers = array("q")
        self._layers: dict[str, int] = {}

    def add(self, row: Sequence[str], columns: Mapping[str, int]) -> None:
        """Take the keys of the next line.

        Raises:
            ValueError: a key that is malformed.
        """
        name = row[columns["layer"]].strip()
        if not name:
            raise ValueError("the layer is empty")
        step = _whole(row[columns["step"]], "step", MAX_INDEX)
        microbatch = _whole(row[columns["microbatch"]], "microbatch", MAX_INDEX)
        rank = _whole(row[columns["source_rank"]], "source_rank", MAX_RANKS - 1)
        layer = self._layers.setdefault(name, len(self._layers))
        self._numbers.extend((step, layer, microbatch, rank))
        self.lines.append(len(self.lines))

    def check_all_ranks(self, path: Path) -> None:
        """Demand that every record has a line of each rank.

        Raises:
            ValueError: one has none.
        """
        key_I4 = np.array(self._numbers, dtype=np.int64).reshape(-1, 4)
        if len(key_I4) == 0:
            return
        records, lines_R = np.unique(key_I4[:, :3], axis=0, return_counts=True)
        num_ranks = _largest(key_I4[:, 3]) + 1
        short = np.flatnonzero(lines_R != num_ranks)
        if short.size > 0:
            step, layer, microbatch = records[short[0]].tolist()
            name = list(self._layers)[layer]
            raise ValueError(
                f"{path}: step {step}, layer {name}, microbatch {microbatch} has "
                f"{lines_R[short[0]]} lines, expected one for each of the {num_ranks} source ranks"
            )

    def trace(
        self, path: Path, expert_I: Int64, tokens_I: Int64, num_experts: int, repeats: int = 1
    ) -> Trace:
        """Return the trace; each line stands for `repeats` cells.

        Raises:
            ValueError: a cell that is there twice, or no lines.
        """
        key_I4 = np.array(self._numbers, dtype=np.int64).reshape(-1, 4)
        _check_no_holes(path, key_I4[:, 3])
        key_I4 = np.repeat(key_I4, repeats, axis=0)
        names = list(self._layers)
        order = sorted(range(len(names)), key=lambda layer: _natural(names[layer]))
        place_L = np.argsort(order) if order else np.zeros(0, dtype=np.int64)
        key_I4[:, 1] = place_L[key_I4[:, 1]]
        _check_once(path, np.column_stack([key_I4, expert_I]))
        return assemble(
            [names[layer] for layer in order],
            key_I4[:, :3],
            key_I4[:, 3],
            expert_I,
            tokens_I,
            num_ranks=_largest(key_I4[:, 3]) + 1,
            num_experts=num_experts,
            file_bytes=path.stat().st_size,
        )


def _check_no_holes(path: Path, rank_I: Int64) -> None:
    """Refuse missing ranks: a mistyped one would else be planned for, with all below it."""
    found_N = np.unique(rank_I)
    if found_N.size == _largest(found_N) + 1 or found_N.size == 0:
        return
    first = int(np.flatnonzero(found_N != np.arange(found_N.size))[0])
    raise ValueError(
        f"{path}: a line is of source rank {found_N[first]}, none is of rank {first}; give every "
        "rank at least one line, or mend the number"
    )


def _check_once(path: Path, cell_I5: Int64) -> None:
    order_I = np.lexsort(cell_I5.T[::-1])
    sorted_I5 = cell_I5[order_I]
    twice = np.flatnonzero((sorted_I5[1:] == sorted_I5[:-1]).all(axis=1))
    if twice.size > 0:
        step, _, microbatch, rank, expert = sorted_I5[twice[0]].tolist()
        raise ValueError(
            f"{path}: step {step}, microbatch {microbatch}, source_rank {rank}, expert {expert} is "
            "there twice for one layer"
        )


def _lines(
    path: Path, rows: Iterator[list[str]], num_columns: int
) -> Iterator[tuple[int, list[str]]]:
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != num_columns:
            raise ValueError(f"{path}, line {number}: {len(row)} values, expected {num_columns}")
        yield number, row


def _whole(text: str, name: str, most: int) -> int:
    stripped = text.strip()
    if not _WHOLE.fullmatch(stripped, endpos=20) or int(stripped) > most:
        raise ValueError(f"{name} must be a whole number in 0..{most}, got {text[:60]!r}")
    return int(stripped)


def _largest(numbers: Int64) -> int:
    return int(numbers.max()) if numbers.size > 0 else 0


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort decoder.2 before decoder.10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
