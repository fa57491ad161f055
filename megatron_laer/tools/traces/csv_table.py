"""Reader of a table of counts in CSV, with a line of column names, in one of two forms.

Long:  step,layer,microbatch,source_rank,expert,tokens
       one line per count; missing ones are 0, but every source rank has a line somewhere.
Wide:  step,layer,microbatch,source_rank,expert_0,expert_1,...
       one line per source rank; all must be present.

All values are whole numbers of at least 0, except that layers may be names.

Legend: I lines, J cells, E experts.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.files import memory
from megatron_laer.files.checks import lines, open_input, quoted
from megatron_laer.files.json_lines import MAX_RANKS
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.telemetry.trace_file import MAX_COUNT, MAX_INDEX
from megatron_laer.tools.traces.records import Trace, assemble

KEYS = ("step", "layer", "microbatch", "source_rank")

# A line of 12 bytes takes some 100 as a row, and several times as many while rows are sorted.
_BYTES_PER_FILE_BYTE = 32


def read_csv(path: Path, num_experts: int | None = None) -> Trace:
    """Read a table of counts; E defaults to the number of columns or the largest number + 1.

    Raises ValueError for unknown columns, a malformed line or a repeated cell.
    """
    try:
        with open_input(path) as file:
            size = path.stat().st_size
            memory.check_enough(_BYTES_PER_FILE_BYTE * size, f"{path}", "give a part of the table")
            text = lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), path)
            names = [name.strip() for name in next(csv.reader([next(text, "")]), [])]
            experts = _check_columns(names)
            fields = [(name, object if name == "layer" else np.int64) for name in names]
            with warnings.catch_warnings():
                # An empty table, which is refused below.
                warnings.simplefilter("ignore", UserWarning)
                table_I = np.loadtxt(
                    text, fields, comments=None, delimiter=",", quotechar='"', ndmin=1
                )
            return _trace(table_I, experts, num_experts, size)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not CSV: {error}") from error
    except ValueError as error:
        problem = _NO_NUMBER.sub(_no_number, str(error))
        raise ValueError(problem if str(path) in problem else f"{path}: {problem}") from error


# NumPy's error, which counts rows from 0.
_NO_NUMBER = re.compile(r"could not convert string (.*) to int64 at row (\d+), .*", re.DOTALL)


def _no_number(match: re.Match[str]) -> str:
    return f"row {int(match[2]) + 1}: {match[1][:80]} is no whole number"


def _check_columns(names: Sequence[str]) -> list[str]:
    experts = [f"expert_{number}" for number in range(len(names) - len(KEYS))]
    for columns in (["expert", "tokens"], experts):
        if sorted(names) == sorted([*KEYS, *columns]) and columns:
            return [] if "tokens" in columns else columns
    raise ValueError(
        f"line 1: the columns are {quoted(','.join(names))}, expected {','.join(KEYS)} and either "
        "expert,tokens or expert_0,expert_1,... each once"
    )


def _trace(table_I: np.ndarray, experts: list[str], num_experts: int | None, size: int) -> Trace:
    most = num_experts or MAX_EXPERTS
    if len(experts) > most:
        raise ValueError(f"line 1: {len(experts)} experts, at most {most} expected")
    limits = {"step": MAX_INDEX, "microbatch": MAX_INDEX, "source_rank": MAX_RANKS - 1}
    limits |= dict.fromkeys(experts or ("tokens",), MAX_COUNT)
    limits |= {} if experts else {"expert": most - 1}
    for name, limit in limits.items():
        for row in np.flatnonzero((table_I[name] < 0) | (table_I[name] > limit))[:1].tolist():
            raise ValueError(
                f"row {row + 1}: {name} must be a whole number in 0..{limit}, got "
                f"{table_I[name][row]}"
            )
    names, layer_I = _layers(table_I["layer"])
    columns = [table_I["step"], layer_I, table_I["microbatch"], table_I["source_rank"]]
    key_I4 = np.stack(columns, axis=1).astype(np.int64)
    _check_ranks(names, key_I4, must_have_all=bool(experts))
    if experts:
        key_J4 = np.repeat(key_I4, len(experts), axis=0)
        expert_J = np.tile(np.arange(len(experts)), len(key_I4))
        tokens_J = np.stack([table_I[name] for name in experts], axis=1).reshape(-1)
    else:
        key_J4, expert_J, tokens_J = key_I4, table_I["expert"], table_I["tokens"]
    _check_once(np.column_stack([key_J4, expert_J]))
    return assemble(
        names,
        key_J4[:, :3],
        key_J4[:, 3],
        expert_J,
        tokens_J,
        num_ranks=_largest(key_J4[:, 3]) + 1,
        num_experts=num_experts or len(experts) or _largest(expert_J) + 1,
        file_bytes=size,
    )


def _layers(layer_I: np.ndarray) -> tuple[list[str], Int64]:
    stripped = [name.strip() for name in layer_I.tolist()]
    if "" in stripped:
        raise ValueError(f"row {stripped.index('') + 1}: the layer is empty")
    names = sorted(set(stripped), key=_natural)
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[name] for name in stripped], dtype=np.int64)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts decoder.2 before decoder.10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _check_ranks(names: Sequence[str], key_I4: Int64, must_have_all: bool) -> None:
    """Refuse missing ranks: a mistyped number would add ranks to the trace."""
    found_N = np.unique(key_I4[:, 3])
    num_ranks = _largest(found_N) + 1
    records, lines_R = np.unique(key_I4[:, :3], axis=0, return_counts=True)
    for record in np.flatnonzero(lines_R != num_ranks)[: int(must_have_all)].tolist():
        step, layer, microbatch = records[record].tolist()
        raise ValueError(
            f"step {step}, layer {names[layer]}, microbatch {microbatch} has {lines_R[record]} "
            f"lines, expected one for each of the {num_ranks} source ranks"
        )
    if 0 < found_N.size < num_ranks:
        first = int(np.flatnonzero(found_N != np.arange(found_N.size))[0])
        raise ValueError(
            f"a line is of source rank {found_N[first]}, none is of rank {first}; give every rank "
            "at least one line, or correct the number"
        )


def _check_once(cell_J5: Int64) -> None:
    sorted_J5 = cell_J5[np.lexsort(cell_J5.T[::-1])]
    twice = np.flatnonzero((sorted_J5[1:] == sorted_J5[:-1]).all(axis=1))
    if twice.size > 0:
        step, _, microbatch, rank, expert = sorted_J5[twice[0]].tolist()
        raise ValueError(
            f"step {step}, microbatch {microbatch}, source_rank {rank}, expert {expert} is there "
            "twice for one layer"
        )


def _largest(numbers: Int64) -> int:
    return int(numbers.max()) if numbers.size > 0 else 0
