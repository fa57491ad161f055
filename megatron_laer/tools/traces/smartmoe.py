"""This reader takes traces of the SmartMoE artifact (USENIX ATC'23): its folder, or a packed form.

The folder `moe_trace` holds a file `table_iter{I}_rank{R}.log` per iteration and rank; each line is
`{layer}:{counts}`, counts as JSON lists [microbatches][experts] of whole numbers written as floats.
The packed form is an npz with `tokens` [iterations, layers, ranks, microbatches, experts] and,
optionally, `iteration` [iterations].

Legend: I iterations, L layers, N ranks, M microbatches, E experts.
"""

from __future__ import annotations

import json
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_laer.files.checks import open_input, read_bytes
from megatron_laer.telemetry.trace_records import MAX_COUNT, MAX_INDEX, Int32, Trace, check_cells

FILE_NAME = re.compile(r"table_iter([0-9]{1,15})_rank([0-9]{1,7})\.log")

_LINE = re.compile(rb"([0-9]{1,15}):(.*)")
# What `zipfile` and NumPy's header parser raise for damaged files; neither documents a list.
_DAMAGE = (
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    OSError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
# Of one rank and iteration: a hundred times that of 60 layers with 256 experts.
_MAX_TABLE_BYTES = 2**26
# NumPy's own limit for what it parses as a Python literal.
_MAX_NPY_HEADER_BYTES = 10_000


def read_smartmoe(
    path: Path,
    ranks: Sequence[int] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Trace:
    """Read the folder.

    Args:
        ranks: the ranks to read, in the order that they shall have; all by default.

    Raises:
        ValueError: a malformed line, a missing file, or files of different shapes.
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the folder of table_iter*_rank*.log")
    files: dict[tuple[int, int], Path] = {}
    for file in sorted(path.iterdir()):
        if match := FILE_NAME.fullmatch(file.name):
            key = int(match[1]), int(match[2])
            if key in files:
                raise ValueError(f"{file} and {files[key]} are of one rank; move one away")
            files[key] = file
    iterations = sorted({iteration for iteration, _ in files})
    wanted = sorted({rank for _, rank in files}) if ranks is None else list(ranks)
    if not iterations or not wanted:
        raise ValueError(f"{path} holds no files table_iter*_rank*.log of ranks {wanted}")
    counts: list[Int32] = []
    layers: list[int] | None = None
    for iteration in progress(iterations):
        for rank in wanted:
            if (iteration, rank) not in files:
                raise ValueError(f"{path}: table_iter{iteration}_rank{rank}.log is missing")
            file = files[iteration, rank]
            found, counts_LME = _read_table(file)
            if layers is None:
                layers = found
            if found != layers or counts_LME.shape != (counts or [counts_LME])[0].shape:
                raise ValueError(
                    f"{file} has layers {found[:4]}... and [layers, microbatches, experts] = "
                    f"{counts_LME.shape}, those before it {layers[:4]}... and {counts[0].shape}"
                )
            counts.append(counts_LME)
    assert layers is not None
    counts_INLME = np.stack(counts).reshape(len(iterations), len(wanted), *counts[0].shape)
    # Step, layer and microbatch first.
    return _dense(
        counts_INLME.transpose(0, 2, 3, 1, 4), np.array(iterations), [str(name) for name in layers]
    )


def read_npz(path: Path) -> Trace:
    """Read the packed form.

    Raises:
        ValueError: not such a file, or sizes that do not fit the file's own.
        OSError: the file cannot be read.
    """
    # A file that cannot be opened is an OSError; those after it are of offsets without sense.
    with open_input(path) as file:
        try:
            tokens_ILNME, iteration_I = _read_archive(file, path.stat().st_size)
        except _DAMAGE as error:
            raise ValueError(f"{path} is not a trace in npz: {error}") from error
    if tokens_ILNME.ndim != 5 or 0 in tokens_ILNME.shape:
        raise ValueError(
            f"{path}: tokens has shape {tokens_ILNME.shape}, expected [iterations, layers, ranks, "
            "microbatches, experts]"
        )
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


def _dense(
    counts_ILMNE: npt.NDArray[np.integer[Any]],
    iteration_I: npt.NDArray[np.integer[Any]],
    layers: Sequence[str],
) -> Trace:
    num_iterations, num_layers, num_microbatches, *shape = counts_ILMNE.shape
    num_records = num_iterations * num_layers * num_microbatches
    iteration_R, layer_R, microbatch_R = np.unravel_index(
        np.arange(num_records), (num_iterations, num_layers, num_microbatches)
    )
    return Trace(
        tuple(layers),
        iteration_I.astype(np.int64)[iteration_R],
        layer_R.astype(np.int64),
        microbatch_R.astype(np.int64),
        counts_ILMNE.reshape(num_records, *shape).astype(np.int32),
    )


def _read_table(path: Path) -> tuple[list[int], Int32]:
    """Read the layers of one file, in order, and counts [L, M, E]."""
    layers: list[int] = []
    counts: list[Int32] = []
    content = read_bytes(path, _MAX_TABLE_BYTES)
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            match = _LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"expected LAYER:COUNTS, got {line[:60]!r}")
            counts.append(_counts_ME(json.loads(match[2])))
            layers.append(int(match[1]))
            if layers[-1] in layers[:-1]:
                raise ValueError(f"layer {layers[-1]} is there twice")
            if counts[-1].shape != counts[0].shape:
                raise ValueError(
                    f"counts have shape {counts[-1].shape}, those before it {counts[0].shape}"
                )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not counts:
        raise ValueError(f"{path} is empty; it should hold a line per layer")
    order = sorted(range(len(layers)), key=layers.__getitem__)
    return [layers[index] for index in order], np.stack([counts[index] for index in order])


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


def _read_archive(
    file: BinaryIO, file_bytes: int
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if "tokens.npy" not in names:
            raise ValueError(f"it has no array `tokens`, but {sorted(names)[:8]}")
        tokens_ILNME = _read_array(archive, "tokens.npy", file_bytes)
        if "iteration.npy" in names:
            return tokens_ILNME, _read_array(archive, "iteration.npy", file_bytes)
    return tokens_ILNME, np.arange(len(tokens_ILNME) if tokens_ILNME.ndim > 0 else 0)


def _read_array(
    archive: zipfile.ZipFile, name: str, file_bytes: int
) -> npt.NDArray[np.integer[Any]]:
    """Read one integer array of an npz, its sizes checked before memory is taken for it."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by method {info.compress_type}; use NumPy to write")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has version {version} of NumPy's format")
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read_header(member, max_header_size=_MAX_NPY_HEADER_BYTES)
        if dtype.kind not in "iu":
            raise ValueError(f"{name} is of {dtype}, expected integers")
        if any(length < 0 for length in shape):
            raise ValueError(f"{name} has shape {shape}")
        size = math.prod(shape)
        check_cells(1, 1, size, file_bytes)
        content = member.read(size * dtype.itemsize)
        if len(content) != size * dtype.itemsize or member.read(1):
            raise ValueError(f"{name} has shape {shape}, which does not fit its length")
    array = np.frombuffer(content, dtype=dtype)
    return array.reshape(shape, order="F" if is_fortran else "C")
