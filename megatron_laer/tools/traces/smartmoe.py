"""Reader of the SmartMoE artifact's traces (USENIX ATC'23): its folder, or a packed form.

The folder `moe_trace` has one file `table_iter{I}_rank{R}.log` per iteration and rank. Each line is
`{layer}:{counts}`; counts are JSON lists [microbatches][experts] of whole numbers in floating-point
notation. The packed form is an npz with `tokens` [iterations, layers, ranks, microbatches, experts]
and, optionally, `iteration` [iterations].

Legend: I iterations, L layers, N ranks, M microbatches, E experts.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.files.checks import open_input, read_bytes
from megatron_laer.telemetry.trace_file import MAX_COUNT, MAX_INDEX
from megatron_laer.tools.traces.records import Int32, Trace, check_cells

FILE_NAME = re.compile(r"table_iter([0-9]{1,15})_rank([0-9]{1,7})\.log")

_LINE = re.compile(rb"([0-9]{1,15}):(.*)")
# Limit for one rank and iteration: a hundred times as much as 60 layers with 256 experts.
_MAX_TABLE_BYTES = 2**26

Integers = npt.NDArray[np.integer[Any]]


def read_smartmoe(
    path: Path,
    ranks: Sequence[int] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Trace:
    """Read the folder; `ranks` are the ranks to read, in their new order.

    Raises ValueError for a malformed line, a missing file or files of different shapes.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the folder of table_iter*_rank*.log")
    files: dict[tuple[int, int], Path] = {}
    for file in sorted(path.iterdir()):
        if match := FILE_NAME.fullmatch(file.name):
            other = files.setdefault((int(match[1]), int(match[2])), file)
            if other != file:
                raise ValueError(f"{file} and {other} are of one rank; move one away")
    iterations = sorted({iteration for iteration, _ in files})
    wanted = sorted({rank for _, rank in files}) if ranks is None else list(ranks)
    if not iterations or not wanted:
        raise ValueError(f"{path} holds no files table_iter*_rank*.log of ranks {wanted}")
    tables: list[tuple[list[int], Int32]] = []
    for iteration in progress(iterations):
        for rank in wanted:
            if (iteration, rank) not in files:
                raise ValueError(f"{path}: table_iter{iteration}_rank{rank}.log is missing")
            tables.append(_read_table(files[iteration, rank]))
            (layers, counts_LME), (first, first_LME) = tables[-1], tables[0]
            if layers != first or counts_LME.shape != first_LME.shape:
                raise ValueError(
                    f"{files[iteration, rank]} has layers {layers[:4]}... and [layers, "
                    f"microbatches, experts] = {counts_LME.shape}, those before it {first[:4]}... "
                    f"and {first_LME.shape}"
                )
    counts_INLME = np.stack([counts for _, counts in tables])
    counts_INLME = counts_INLME.reshape(len(iterations), len(wanted), *tables[0][1].shape)
    names = [str(name) for name in tables[0][0]]
    # Move step, layer and microbatch to the front.
    return _dense(counts_INLME.transpose(0, 2, 3, 1, 4), np.array(iterations), names)


def read_npz(path: Path) -> Trace:
    """Read the packed form; raise ValueError for another file or sizes that do not fit it."""
    with open_input(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = path.stat().st_size
                arrays = {name: _read_array(archive, name, size) for name in _names(archive)}
        # `zipfile` and NumPy's header parser raise many exceptions for damaged files.
        except Exception as error:
            raise ValueError(f"{path} is not a trace in npz: {error}") from error
    tokens_ILNME = arrays["tokens"]
    if tokens_ILNME.ndim != 5 or 0 in tokens_ILNME.shape:
        raise ValueError(
            f"{path}: tokens has shape {tokens_ILNME.shape}, expected [iterations, layers, ranks, "
            "microbatches, experts]"
        )
    iteration_I = arrays.get("iteration", np.arange(len(tokens_ILNME)))
    if iteration_I.shape != tokens_ILNME.shape[:1]:
        raise ValueError(
            f"{path}: iteration has shape {iteration_I.shape}, expected {tokens_ILNME.shape[:1]}"
        )
    low, high = int(tokens_ILNME.min()), int(tokens_ILNME.max())
    if low < 0 or high > MAX_COUNT:
        raise ValueError(f"{path}: tokens must be in 0..{MAX_COUNT}, got {low} to {high}")
    if not 0 <= int(iteration_I.min()) <= int(iteration_I.max()) <= MAX_INDEX:
        raise ValueError(f"{path}: iterations must be in 0..{MAX_INDEX}")
    layers = [str(layer) for layer in range(tokens_ILNME.shape[1])]
    try:
        return _dense(tokens_ILNME.transpose(0, 1, 3, 2, 4), iteration_I, layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    names = archive.namelist()
    if "tokens.npy" not in names:
        raise ValueError(f"it has no array `tokens`, but {sorted(names)[:8]}")
    return [name for name in ("tokens", "iteration") if f"{name}.npy" in names]


def _read_array(archive: zipfile.ZipFile, name: str, file_bytes: int) -> Integers:
    """Read an array of integers after checking the sizes in its header."""
    with archive.open(f"{name}.npy") as member:
        is_first = np.lib.format.read_magic(member) == (1, 0)
        header = np.lib.format
        read = header.read_array_header_1_0 if is_first else header.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.kind not in "iu":
        raise ValueError(f"{name}.npy is of {dtype}, expected integers")
    if any(length < 0 for length in shape):
        raise ValueError(f"{name}.npy has shape {shape}")
    check_cells(1, 1, math.prod(shape), file_bytes)
    with archive.open(f"{name}.npy") as member:
        array: Integers = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError(f"{name}.npy has shape {shape}, which does not fit its length")
        return array


def _dense(counts_ILMNE: Integers, iteration_I: Integers, layers: Sequence[str]) -> Trace:
    shape = counts_ILMNE.shape[:3]
    iteration_R, layer_R, microbatch_R = (part.reshape(-1) for part in np.indices(shape))
    return Trace(
        tuple(layers),
        iteration_I.astype(np.int64)[iteration_R],
        layer_R.astype(np.int64),
        microbatch_R.astype(np.int64),
        counts_ILMNE.reshape(math.prod(shape), *counts_ILMNE.shape[3:]).astype(np.int32),
    )


def _read_table(path: Path) -> tuple[list[int], Int32]:
    """Read the ordered layers and the counts [L, M, E] of one file."""
    found: dict[int, Int32] = {}
    for number, line in enumerate(read_bytes(path, _MAX_TABLE_BYTES).splitlines(), start=1):
        try:
            match = _LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"expected LAYER:COUNTS, got {line[:60]!r}")
            layer, counts_ME = int(match[1]), _counts_ME(json.loads(match[2]))
            if layer in found:
                raise ValueError(f"layer {layer} is there twice")
            first_ME = next(iter(found.values()), counts_ME)
            if counts_ME.shape != first_ME.shape:
                raise ValueError(
                    f"counts have shape {counts_ME.shape}, those before it {first_ME.shape}"
                )
            found[layer] = counts_ME
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} is empty; it should hold a line per layer")
    layers = sorted(found)
    return layers, np.stack([found[layer] for layer in layers])


def _counts_ME(content: object) -> Int32:
    counts_ME = np.array(content)
    if counts_ME.ndim != 2 or 0 in counts_ME.shape or counts_ME.dtype.kind not in "iuf":
        raise ValueError(
            f"expected lists [microbatches][experts] of numbers, got shape {counts_ME.shape} of "
            f"{counts_ME.dtype}"
        )
    # Written so that NaN fails.
    if not ((counts_ME >= 0) & (counts_ME <= MAX_COUNT)).all():
        raise ValueError(f"counts must be in 0..{MAX_COUNT}")
    whole_ME = counts_ME.astype(np.int32)
    if not np.array_equal(whole_ME, counts_ME):
        raise ValueError("counts must be whole numbers")
    return whole_ME
