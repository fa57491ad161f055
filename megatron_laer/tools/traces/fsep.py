"""Reader of the recordings of `telemetry.trace_file`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool
from megatron_laer.files import memory
from megatron_laer.files.checks import open_input
from megatron_laer.telemetry.trace_file import (
    MAX_COUNT,
    MAX_STEP,
    damage,
    frames,
    read_counts,
    read_header_of,
)
from megatron_laer.tools.traces.records import PairRecords, Trace

logger = logging.getLogger(__name__)

# A count takes 4 bytes, and 8 more where it is summed.
_BYTES_PER_COUNT = 12


def read_recording(path: Path, *, pairs: bool = False) -> Trace:
    """Read a recording of `TraceWriter`; an incomplete last record is skipped with a warning.

    Its `pairs`, with sets, are read on request: they may be many times as large as the counts.
    """
    with open_input(path) as file:
        header = read_header_of(file, path)
        end, size = header.line_bytes, header.file_bytes
        records: dict[tuple[int, int, int], npt.NDArray[np.unsignedinteger[Any]]] = {}
        of_pairs: dict[tuple[int, int], npt.NDArray[np.unsignedinteger[Any]]] = {}
        sets: dict[tuple[int, int], Bool] = {}
        for number, frame in enumerate(frames(file, path, header), start=1):
            where = f"{path}, record {number} at byte {frame.offset}"
            counts_NE = read_counts(file, frame, header)
            if counts_NE is None:
                if frame.end >= size:
                    break
                raise ValueError(f"{where}: the checksum does not fit; {damage(frame.offset)}")
            if not 0 <= frame.step <= MAX_STEP or frame.layer >= len(header.layers):
                raise ValueError(
                    f"{where}: step {frame.step}, layer {frame.layer} is out of range; there are "
                    f"{len(header.layers)} layers"
                )
            if int(counts_NE.max(initial=0)) > MAX_COUNT:
                raise ValueError(f"{where}: {int(counts_NE.max())} tokens exceed {MAX_COUNT}")
            key = frame.step, frame.layer
            if frame.has_sets and pairs:
                bits = np.unpackbits(counts_NE, axis=1, count=header.num_experts, bitorder="little")
                sets[key] = bits.astype(bool)
            elif frame.has_pairs and pairs:
                of_pairs[key] = counts_NE
            elif not (frame.has_pairs or frame.has_sets):
                records[*key, frame.microbatch] = counts_NE
            end = frame.end
    if not records:
        raise ValueError(f"{path} holds no complete record; record at least two steps")
    if end < size:
        logger.warning(
            "%s: its last %d bytes are no whole record and are left out", path, size - end
        )
    memory.check_enough(
        _BYTES_PER_COUNT * len(records) * header.num_ranks * header.num_experts,
        f"{len(records)} records of {header.num_ranks} ranks and {header.num_experts} experts",
        "give a part of the trace",
    )
    keys_R3 = np.array(list(records), dtype=np.int64)
    counts_RNE = np.empty((len(records), header.num_ranks, header.num_experts), dtype=np.int32)
    for record, counts_NE in enumerate(records.values()):
        counts_RNE[record] = counts_NE
    return Trace(
        header.layers,
        keys_R3[:, 0],
        keys_R3[:, 1],
        keys_R3[:, 2],
        counts_RNE,
        PairRecords.of_triangles(of_pairs, header.num_experts),
        sets,
    )
