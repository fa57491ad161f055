"""Format of `--fsep-record DIR trace`, one file per FSEP group.

A line of JSON, then binary records, all little-endian:

    {"format":"megatron_laer-trace","version":2,"run":...,"num_ranks":N,"num_experts":E,
     "layers":[...],"crc":...}\\n
    record:  uint32  CRC-32 of the run's number and the six fields below, so that a record's length
                     can be relied on
             uint32  bytes per count: 1, 2 or 4, the least that holds the record's largest; plus
                     256 in a record of pairs; 513 in one of sets
             int64   the record's number, from 1
             int64   step
             uint32  layer, index into `layers`
             uint32  microbatch
             uint32  CRC-32 of the counts
             N*E counts, source rank by source rank; or E*(E+1)/2 of pairs; or sets

Pairs are those of a step with `--fsep-set pairs_interval`, summed over the group: tokens that chose
both of two experts. They go row by row of the upper triangle, whose diagonal has each expert's
tokens. Their microbatch is 0.

Sets are the experts of some of these tokens: a bit per expert, the lowest first, in whole bytes per
token. In place of the microbatch they have the number of tokens.

`files.json_lines` defines the line's checksum. A record is written at once and unbuffered, so a
killed run leaves a file that is readable up to its last complete record. There is no compression
and no index, because the training thread writes it. `files.recording` describes resuming and the
run's number, and `tools/traces/fsep.py` reads whole files.

Legend: N source ranks, E experts.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.files.checks import open_input
from megatron_laer.files.json_lines import MAX_RANKS, check_shape
from megatron_laer.files.recording import RecordingFile, check_number, read_recording_header
from megatron_laer.planner.layout import MAX_EXPERTS

logger = logging.getLogger(__name__)

FORMAT = "megatron_laer-trace"

MAX_COUNT = int(np.iinfo(np.int32).max)
# More steps than any run has.
MAX_STEP = 2**53

# First bytes of a file, for detection.
MAGIC = b'{"format":"' + FORMAT.encode() + b'"'

# Marks of a record of pairs and of sets, added to its width.
_PAIRS, _SETS = 256, 512

_FRAME = struct.Struct("<IIqqIII")  # the header of a record
_CRC_BYTES = 4
_WIDTHS: dict[int, np.dtype[np.unsignedinteger[Any]]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
}
_KNOWN = {*_WIDTHS, *(width | _PAIRS for width in _WIDTHS), 1 | _SETS}
_MAX_HEADER_BYTES = 2**20

# A power failure may leave zeros for data not yet on disk, up to some seconds' worth.
_MAX_LOST_BYTES = 2**26


class Header(NamedTuple):
    """First line of a recording, with its length and the file's when it was opened."""

    seed: int
    num_ranks: int
    num_experts: int
    layers: tuple[str, ...]
    line_bytes: int
    file_bytes: int


class Frame(NamedTuple):
    """Place and fields of a record."""

    offset: int
    end: int
    width: int
    step: int
    layer: int
    microbatch: int
    crc: int
    has_pairs: bool
    has_sets: bool


class TraceWriter:
    """Writer of every microbatch's counts, on rank 0 of an FSEP group.

    A resumed run continues an existing recording. Records of earlier steps stay; those from
    `first_step` on are moved to another file, named `*.cut-from-STEP.*`. The same happens whenever
    the step goes back.
    """

    def __init__(
        self,
        path: Path,
        num_ranks: int,
        num_experts: int,
        layer_names: Sequence[str],
        first_step: int = 0,
        run: str | None = None,
    ) -> None:
        self._shape = (num_ranks, num_experts)
        self._layers = tuple(layer_names)
        fields = {"num_ranks": num_ranks, "num_experts": num_experts, "layers": [*layer_names]}
        _check_header(fields)
        self._file = RecordingFile(path, FORMAT, fields, _recorded, first_step, run)
        last = self._file.last
        if last is not None and last < first_step - 1:
            logger.warning(
                "FSEP: %s: nothing is recorded of steps %d to %d, which an earlier run made",
                path,
                last + 1,
                first_step - 1,
            )

    def append(
        self,
        step: int,
        layer_index: int,
        microbatch: int,
        counts_NE: npt.NDArray[np.integer[Any]],
    ) -> None:
        """Write one record. Of two with the same keys, readers use the later one."""
        if counts_NE.shape != self._shape:
            raise ValueError(
                f"counts_NE has shape {counts_NE.shape}, expected [ranks, experts] = {self._shape}"
            )
        self._append(step, layer_index, microbatch, *_packed(counts_NE))

    def append_pairs(self, step: int, layer_index: int, pairs_EE: Int64) -> None:
        """Write the pairs of a layer in a step, a symmetric table."""
        num_experts = self._shape[1]
        if pairs_EE.shape != (num_experts, num_experts):
            raise ValueError(
                f"pairs_EE has shape {pairs_EE.shape}, expected {num_experts} experts twice"
            )
        payload, width = _packed(pairs_EE[np.triu_indices(num_experts)])
        self._append(step, layer_index, 0, payload, width | _PAIRS)

    def append_sets(self, step: int, layer_index: int, chosen_TE: Bool) -> None:
        """Write the experts of some tokens of a layer in a step."""
        if chosen_TE.ndim != 2 or chosen_TE.shape[1] != self._shape[1]:
            raise ValueError(
                f"chosen_TE has shape {chosen_TE.shape}, expected [tokens, {self._shape[1]}]"
            )
        bits = np.packbits(chosen_TE, axis=1, bitorder="little")
        self._append(step, layer_index, len(bits), bits.tobytes(), 1 | _SETS)

    def _append(
        self, step: int, layer_index: int, microbatch: int, payload: bytes, width: int
    ) -> None:
        for name, value in (("step", step), ("microbatch", microbatch)):
            if not 0 <= value <= (MAX_STEP if name == "step" else 2**32 - 1):
                raise ValueError(f"{name} is out of range, got {value}")
        if not 0 <= layer_index < len(self._layers):
            raise ValueError(
                f"layer_index must be in 0..{len(self._layers) - 1}, got {layer_index}"
            )
        if step != self._file.step:
            self._file.begin_step(step)
        of_record = self._file.next, step, layer_index, microbatch, zlib.crc32(payload)
        fields = _FRAME.pack(0, width, *of_record)[_CRC_BYTES:]
        crc = zlib.crc32(fields, self._file.seed)
        self._file.append(crc.to_bytes(_CRC_BYTES, "little") + fields + payload)

    def close(self) -> None:
        self._file.close()


def _packed(counts: npt.NDArray[np.integer[Any]]) -> tuple[bytes, int]:
    low, high = int(counts.min()), int(counts.max())
    if low < 0 or high > MAX_COUNT:
        raise ValueError(f"counts must be in 0..{MAX_COUNT}, got {low} to {high}")
    width = next(width for width in _WIDTHS if high < 256**width)
    return counts.astype(_WIDTHS[width]).tobytes(), width


def recording_path(directory: str | Path, group_index: int) -> Path:
    """Return the file of an FSEP group; each pipeline stage and data-parallel replica has one."""
    return Path(directory) / f"group-{group_index}.trace"


def _recorded(path: Path) -> Iterator[tuple[int, int]]:
    """Yield every record's step and the offset of its end, but no damaged last record."""
    with open_input(path) as file:
        header = read_header_of(file, path)
        last: Frame | None = None
        for frame in frames(file, path, header):
            if last is not None:
                yield last.step, last.end
            last = frame
        if last is not None and read_counts(file, last, header) is not None:
            yield last.step, last.end


def _check_header(fields: Mapping[str, Any]) -> None:
    most = {"num_ranks": MAX_RANKS, "num_experts": MAX_EXPERTS}
    check_shape({name: (fields.get(name), most[name]) for name in most}, fields.get("layers"))


def read_header_of(file: BinaryIO, path: Path) -> Header:
    line = file.readline(_MAX_HEADER_BYTES)
    try:
        fields, seed = read_recording_header(line, FORMAT, "trace")
        _check_header(fields)
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from error
    sizes = fields["num_ranks"], fields["num_experts"]
    file_bytes = os.fstat(file.fileno()).st_size
    return Header(seed, *sizes, tuple(fields["layers"]), len(line), file_bytes)


def frames(file: BinaryIO, path: Path, header: Header) -> Iterator[Frame]:
    """Yield all complete records; their counts are skipped."""
    offset, size, place = header.line_bytes, header.file_bytes, 0
    while offset + _FRAME.size <= size:
        file.seek(offset)
        fields = file.read(_FRAME.size)
        crc_of_fields, width, number, step, layer, microbatch, crc = _FRAME.unpack(fields)
        place += 1
        where = f"{path}, record {place} at byte {offset}: "
        is_ours = crc_of_fields == zlib.crc32(fields[_CRC_BYTES:], header.seed)
        if width not in _KNOWN or not is_ours:
            if _is_torn(file, offset, size, _FRAME.size):
                return
            raise ValueError(f"{where}no record of its run begins there; {damage(offset)}")
        check_number(path, number, place, where)
        mark = width & (_PAIRS | _SETS)
        width -= mark
        frame = Frame(offset, 0, width, step, layer, microbatch, crc, mark == _PAIRS, mark == _SETS)
        end = offset + _FRAME.size + math.prod(_shape(header, frame)) * width
        if end > size:
            return
        yield frame._replace(end=end)
        offset = end


def _shape(header: Header, frame: Frame) -> tuple[int, ...]:
    num_experts = header.num_experts
    if frame.has_pairs:
        return (num_experts * (num_experts + 1) // 2,)
    if frame.has_sets:
        return frame.microbatch, -(-num_experts // 8)
    return header.num_ranks, num_experts


def damage(offset: int) -> str:
    return f"the file is damaged there; what is before can be read from a copy of {offset} bytes"


def _is_torn(file: BinaryIO, offset: int, size: int, most: int) -> bool:
    """Return True if a power failure may have left this tail: zeros after part of a header."""
    if size - offset > _MAX_LOST_BYTES:
        return False
    file.seek(offset + most)
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            return False
    file.seek(offset)
    return file.read(most).endswith(b"\0")


def read_counts(
    file: BinaryIO, frame: Frame, header: Header
) -> npt.NDArray[np.unsignedinteger[Any]] | None:
    """Read the counts [N, E], the triangle of pairs, or the bytes of sets.

    Return None if the checksum differs.
    """
    begin = frame.offset + _FRAME.size
    file.seek(begin)
    payload = file.read(frame.end - begin)
    if zlib.crc32(payload) != frame.crc:
        return None
    return np.frombuffer(payload, dtype=_WIDTHS[frame.width]).reshape(_shape(header, frame))
