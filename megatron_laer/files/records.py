"""Records of typed fields: the one codec of traces, layouts, metrics and the planner's state.

A file is a line of JSON, its header, and records, all little-endian:

    {"format":"megatron_laer-trace","version":3,"run":...,"num_ranks":N,...,"crc":"89abcdef"}\n

    uint16  kind, an index into the format's kinds
    uint16  bytes of a count: 1, 2 or 4, the least that holds the record's largest

    uint32  length of the open dimension
    int64   the record's number, from 1
    int64   step, which never decreases

    uint32  CRC-32 of the content
    uint32  CRC-32 of the header's line and the six fields above
    content: the values of the kind's fields, in order

The header's last key is the CRC-32 of the line's bytes before its comma. A `Format` declares the
header's sizes and the fields of each kind. A record's last checksum covers its length, place and
header. So damage is no early end, and a lost, moved or another run's record is noticed.

One rule for the end: a last record that is incomplete, torn, or zeros after a loss of power is left
out. Everything else that does not fit is refused, with its byte.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_laer.files.checks import MAX_TEXT_BYTES, quoted

logger = logging.getLogger(__name__)

# Version of all formats.
VERSION = 3

MAX_RANKS = 2**20
MAX_STEP = 2**53  # more steps than any run has
_MAX_LAYERS = 2**16

# Dimension whose length each record gives, and the type of counts.
OPEN, COUNT = "open", "count"
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4"}
_SCALARS = {"<u4": struct.Struct("<I").pack, "<f8": struct.Struct("<d").pack}

_FRAME = struct.Struct("<HHIqqII")
_SEAL_BYTES = 4
# A power failure may leave zeros for data not yet on disk, up to some seconds' worth.
_MAX_LOST_BYTES = 2**26

_KEY = "crc"
_END = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n?')
_END_BYTES = len(b',"crc":"01234567"}')
_ASIDE = re.compile(r".+\.cut-from-\d+(\.\d+)?\.[^.]+")


class Field(NamedTuple):
    """Numbers of one type in a record; those with a `below` are integers in 0..below - 1.

    A dimension is a number, `OPEN`, or the name of a size or list in the header, as is `below`. One
    field of a kind has the type `COUNT`, if any.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] = ()
    below: int | str | None = None


@dataclass(frozen=True)
class Format:
    """Declaration of a kind of file.

    Attributes:
        title: noun phrase for messages.
        suffix: of the files' names, one for each FSEP group.
        sizes: integers of the header, with their maxima.
        kinds: fields of each kind of record.
        columns: lists of names in the header, which this release has to know.
        has_every_step: whether a step without a record is missing.
    """

    name: str
    title: str
    suffix: str
    sizes: Mapping[str, int]
    kinds: Mapping[str, tuple[Field, ...]]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    has_every_step: bool = True

    @property
    def magic(self) -> bytes:
        """Return the first bytes of a file."""
        return b'{"format":"%s"' % self.name.encode()

    def path(self, directory: str | Path, group_index: int) -> Path:
        """Return the file of an FSEP group, of a pipeline stage and data-parallel replica."""
        return Path(directory) / f"group-{group_index}.{self.suffix}"


class Frame(NamedTuple):
    """Place and header of a record."""

    kind: str
    step: int
    number: int
    offset: int
    begin: int
    end: int
    width: int
    length: int
    crc: int

    def problem(self, path: Path, text: object) -> ValueError:
        return _damaged(path, self.number, self.offset, text)


class Records:
    """Codec of one file: a format, with the sizes of its header.

    `fields` are the header's, and `line` its bytes if it was read; ValueError for other sizes.
    """

    def __init__(self, format: Format, fields: Mapping[str, Any], line: bytes = b"") -> None:
        layers = fields.get("layers")
        check_shape({name: (fields.get(name), most) for name, most in format.sizes.items()}, layers)
        for name, known in format.columns.items():
            if fields.get(name, [*known]) != [*known]:
                raise ValueError(f"{name} {quoted(fields[name])} are another release's; take that")
        columns = {name: [*names] for name, names in format.columns.items()}
        self.fields = {**fields, **columns}
        self.line = line or header_line(format.name, self.fields)
        self.seed = zlib.crc32(self.line)
        sizes: dict[object, Any] = {
            name: len(value) if isinstance(value, list) else value
            for name, value in self.fields.items()
        }
        self._fields = {
            kind: [
                of._replace(
                    shape=tuple(sizes.get(name, name) for name in of.shape),
                    below=sizes.get(of.below, of.below),
                )
                for of in declared
            ]
            for kind, declared in format.kinds.items()
        }
        self._kinds = [*self._fields]
        self._sizes: dict[tuple[str, int, int], int] = {}

    @classmethod
    def of(cls, file: BinaryIO, path: Path, format: Format) -> Records:
        """Read the header of an open file."""
        line = file.readline(MAX_TEXT_BYTES + 1)
        try:
            if not format.magic.startswith(line[: len(format.magic)]):
                raise _foreign(line, format.title)
            if not line.endswith(b"\n"):
                raise ValueError(f"{len(line):,} bytes are no header; give a {format.title}")
            return cls(format, read_header(line, format.name, format.title), line)
        except ValueError as error:
            raise ValueError(f"{path}, line 1: {error}") from error

    def encode(self, kind: str, number: int, step: int, values: Mapping[str, Any]) -> bytes:
        """Return a record; raise ValueError for values of another shape or out of range."""
        _check_range("step", step, step, MAX_STEP + 1)
        parts: list[Any] = []
        width, length, crc = 1, 0, 0
        for of in self._fields[kind]:
            value = values[of.name]
            if not of.shape:
                if of.below is not None:
                    _check_range(of.name, value, value, of.below)
                parts.append(_SCALARS[of.dtype](value))
            else:
                array, shape, dtype = np.asarray(value), of.shape, of.dtype
                if OPEN in shape and array.ndim == len(shape):
                    length = array.shape[shape.index(OPEN)]
                    shape = _closed(shape, length)
                if array.shape != shape:
                    raise ValueError(f"{of.name} has shape {array.shape}, expected {shape}")
                high = _check_array(of, array)
                if dtype == COUNT:
                    width = next(size for size in _WIDTHS if high < 256**size)
                    dtype = _WIDTHS[width]
                parts.append(np.ascontiguousarray(array, dtype))
            crc = zlib.crc32(parts[-1], crc)
        index = self._kinds.index(kind)
        frame = _FRAME.pack(index, width, length, number, step, crc, 0)[:-_SEAL_BYTES]
        seal = zlib.crc32(frame, self.seed).to_bytes(_SEAL_BYTES, "little")
        return b"".join((frame, seal, *parts))

    def places(self, file: BinaryIO, path: Path) -> Iterator[Frame]:
        """Yield the frames of all whole records; only the last one's content is read."""
        for frame, following in pairwise(chain(self._frames(file, path), [None])):
            assert frame is not None
            if following is not None or self._content(file, frame) is not None:
                yield frame

    def read(
        self,
        file: BinaryIO,
        path: Path,
        kinds: Collection[str] | None = None,
        *,
        must_be_whole: bool = False,
        must_have_one: bool = False,
    ) -> Iterator[tuple[Frame, dict[str, Any]]]:
        """Yield all records, or those of some kinds, with their values by name.

        A last one that is not whole is left out with a warning, or is an error if the file
        `must_be_whole`. A file that `must_have_one`, and has none, is its reader's to refuse.
        """
        end, size = len(self.line), file.seek(0, os.SEEK_END)
        for frame in self.places(file, path):
            end = frame.end
            if kinds is None or frame.kind in kinds:
                content = self._content(file, frame)
                if content is None:
                    raise frame.problem(path, "its checksum does not fit")
                yield frame, self._values(content, frame, path)
        if end < size and not (must_have_one and end == len(self.line)):
            left = f"its last {size - end} bytes are no whole record"
            if must_be_whole:
                raise ValueError(f"{path} is damaged or cut off; {left}")
            logger.warning("%s: %s and are left out", path, left)

    def _frames(self, file: BinaryIO, path: Path) -> Iterator[Frame]:
        """Yield the frames of all records that end within the file."""
        offset, size = len(self.line), file.seek(0, os.SEEK_END)
        # The first ones of a file set aside from a later step on are in another.
        number = None if is_cut_off(path) and ".cut-from-0." not in path.name else 0
        step = 0
        while offset + _FRAME.size <= size:
            file.seek(offset)
            head = file.read(_FRAME.size)
            kind, width, length, found, at, crc, seal = _FRAME.unpack(head)
            is_ours = seal == zlib.crc32(head[:-_SEAL_BYTES], self.seed)
            number = found if number is None else number + 1
            if not is_ours or kind >= len(self._kinds) or width not in _WIDTHS:
                if _is_torn(file, offset, size):
                    return
                raise _damaged(path, number, offset, "no record of its run begins there")
            if found != number:
                raise _damaged(path, number, offset, f"it is record {found}; others are lost")
            if not step <= at <= MAX_STEP:
                raise _damaged(path, number, offset, f"step {at} comes after step {step}")
            name, begin, step = self._kinds[kind], offset + _FRAME.size, at
            end = begin + self._bytes(name, width, length)
            if end > size:
                return
            yield Frame(name, step, number, offset, begin, end, width, length, crc)
            offset = end

    def _content(self, file: BinaryIO, frame: Frame) -> bytes | None:
        file.seek(frame.begin)
        content = file.read(frame.end - frame.begin)
        return content if zlib.crc32(content) == frame.crc else None

    def _values(self, content: bytes, frame: Frame, path: Path) -> dict[str, Any]:
        values, at = {}, 0
        for of in self._fields[frame.kind]:
            dtype = _WIDTHS[frame.width] if of.dtype == COUNT else of.dtype
            shape = _closed(of.shape, frame.length)
            array = np.frombuffer(content, dtype, math.prod(shape), at).reshape(shape)
            at += array.nbytes
            try:
                _check_array(of, array)
            except ValueError as error:
                raise frame.problem(path, error) from error
            values[of.name] = array if shape else array.item()
        return values

    def _bytes(self, kind: str, width: int, length: int) -> int:
        """Return the size of a record's content."""
        key = kind, width, length
        if key not in self._sizes:
            self._sizes[key] = sum(
                (width if of.dtype == COUNT else np.dtype(of.dtype).itemsize)
                * math.prod(_closed(of.shape, length))
                for of in self._fields[kind]
            )
        return self._sizes[key]


def header_line(format_name: str, fields: Mapping[str, Any]) -> bytes:
    content = {"format": format_name, "version": VERSION, **fields}
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    body = text.removesuffix("}").encode()
    return b'%s,"%s":"%08x"}\n' % (body, _KEY.encode(), zlib.crc32(body))


def read_header(
    line: bytes, format_name: str, title: str, *, may_lack_checksum: bool = False
) -> dict[str, Any]:
    """Return a header's fields, without format and version."""
    content = json_object(line)
    if content.pop("format", None) != format_name:
        raise _foreign(line, title)
    version = content.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"version {quoted(version)} of the format; this release reads version {VERSION}, so "
            "take the release that wrote it"
        )
    if _KEY in content or not may_lack_checksum:
        body_bytes = len(line.removesuffix(b"\n")) - _END_BYTES
        end = _END.fullmatch(line, max(body_bytes, 0))
        if end is None or int(end[1], 16) != zlib.crc32(line[:body_bytes]):
            raise ValueError("its checksum does not fit; it is damaged")
        content.pop(_KEY)
    return content


def check_shape(sizes: Mapping[str, tuple[object, int]], layers: object) -> None:
    """Check the sizes in a header, given with their maxima, and the names of layers."""
    for name, (value, most) in sizes.items():
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} must be an integer in 1..{most}, got {quoted(value)}")
    names = layers if isinstance(layers, list) else []
    if not 1 <= len(names) <= _MAX_LAYERS or not all(isinstance(name, str) for name in names):
        raise ValueError(f"layers must be names of at least one layer, got {quoted(layers)}")
    if len(set(names)) != len(names):
        raise ValueError(f"layers must all be different, got {quoted(layers)}")


def is_cut_off(path: Path) -> bool:
    """Return True for names of files that were set aside, since their steps were repeated."""
    return _ASIDE.fullmatch(path.name) is not None


def _foreign(line: bytes, title: str) -> ValueError:
    begin = quoted(line[:100].decode(errors="backslashreplace"))
    return ValueError(f"it begins with {begin}; give a {title}")


def _closed(shape: tuple[int | str, ...], length: int) -> tuple[int, ...]:
    return tuple(length if isinstance(size, str) else size for size in shape)


def _check_array(of: Field, array: np.ndarray[Any, Any]) -> int:
    """Return the largest value, if there is a range; raise ValueError for values beyond it."""
    if of.below is None or not array.size:
        return 0
    high = int(array.max())
    _check_range(of.name, 0 if array.dtype.kind == "u" else int(array.min()), high, of.below)
    return high


def _check_range(name: str, low: int, high: int, below: int | str) -> None:
    assert isinstance(below, int), f"{name} lies below {below}, which the header lacks"
    if not 0 <= low <= high < below:
        found = low if low == high else f"{low} to {high}"
        raise ValueError(f"{name} must be in 0..{below - 1}, got {found}")


def _damaged(path: Path, number: int, offset: int, text: object) -> ValueError:
    return ValueError(
        f"{path}, record {number} at byte {offset}: {text}; the file is damaged there; what is "
        f"before can be read from a copy of {offset} bytes"
    )


def _is_torn(file: BinaryIO, offset: int, size: int) -> bool:
    """Return True if a power failure may have left this tail: zeros after part of a frame."""
    if size - offset > _MAX_LOST_BYTES:
        return False
    file.seek(offset + _FRAME.size)
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            return False
    file.seek(offset)
    return file.read(_FRAME.size).endswith(b"\0")


def json_object(line: bytes) -> dict[str, Any]:
    """Read an object of JSON; raise ValueError for anything else."""
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("not JSON; it is nested too deeply") from error
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"not JSON: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {quoted(content)}")
    return content
