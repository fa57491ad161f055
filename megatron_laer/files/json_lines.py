"""Lines of JSON in recordings: checksums, headers, and checks that all formats share.

    {"format":"megatron_laer-metrics","version":2,"run":"0123456789abcdef",...,"crc":"89abcdef"}\\n
    {"record":1,"step":7,...,"crc":"0a1b2c3d"}\\n

The last key is the CRC-32 of the line's bytes before its comma. In a record the run's number comes
before them; see `recording`.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_laer.files.checks import MAX_TEXT_BYTES, quoted

logger = logging.getLogger(__name__)

# Version of all formats.
VERSION = 2

MAX_RANKS = 2**20

_KEY = "crc"
_MAX_LAYERS = 2**16
_END = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n?')
_END_BYTES = len(b',"crc":"01234567"}')


def header_line(format_name: str, fields: Mapping[str, Any]) -> bytes:
    return sealed({"format": format_name, "version": VERSION, **fields})


def sealed(content: Mapping[str, Any], seed: int = 0) -> bytes:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    body = text.removesuffix("}").encode()
    return b'%s,"%s":"%08x"}\n' % (body, _KEY.encode(), zlib.crc32(body, seed))


def read_header(
    line: bytes, format_name: str, kind: str, *, may_lack_checksum: bool = False
) -> dict[str, Any]:
    """Return a first line's fields, without format and version."""
    content = _object(line)
    if content.pop("format", None) != format_name:
        begin = line[:100].decode(errors="backslashreplace")
        raise ValueError(f"it is no {kind}, since it begins with {quoted(begin)}")
    version = content.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"version {quoted(version)} of the format; this release reads version {VERSION}, so "
            "take the release that wrote it"
        )
    if _KEY in content or not may_lack_checksum:
        _check_seal(line, content)
    return content


def read_line(line: bytes, seed: int) -> dict[str, Any]:
    content = _object(line)
    try:
        _check_seal(line, content, seed)
    except ValueError as error:
        raise ValueError(f"{error}; a copy of the lines before it can be read") from error
    return content


def numbered_lines(
    file: BinaryIO, path: Path, longest: int, *, kind: str = ""
) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, end and bytes of each line; the first one has at most `MAX_TEXT_BYTES`.

    An incomplete last line is skipped, with a warning.
    """
    end, limit = 0, MAX_TEXT_BYTES
    for number in itertools.count(1):
        line = file.readline(limit + 1)
        if not line:
            return
        if len(line) > limit:
            raise ValueError(
                f"{kind}{path}, line {number}: has more than {limit:,} bytes; the file is damaged "
                "there"
            )
        if not line.endswith(b"\n"):
            logger.warning("%s: its last %d bytes are no whole line", path, len(line))
            return
        end, limit = end + len(line), longest
        yield number, end, line


def check_shape(sizes: Mapping[str, tuple[object, int]], layers: object) -> None:
    """Check the sizes in a header, given with their maxima, and the names of layers."""
    for name, (value, most) in sizes.items():
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} must be an integer in 1..{most}, got {quoted(value)}")
    if not isinstance(layers, list) or not 1 <= len(layers) <= _MAX_LAYERS:
        raise ValueError(f"layers must be names of at least one layer, got {quoted(layers)}")
    if not all(isinstance(name, str) for name in layers):
        raise ValueError(f"layers must be names of at least one layer, got {quoted(layers)}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers must all be different, got {quoted(layers)}")


def _object(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"not JSON: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {quoted(content)}")
    return content


def _check_seal(line: bytes, content: dict[str, Any], seed: int = 0) -> None:
    """Check a line's checksum, and remove it from the content."""
    body_bytes = len(line.removesuffix(b"\n")) - _END_BYTES
    end = _END.fullmatch(line, max(body_bytes, 0))
    if end is None or int(end[1], 16) != zlib.crc32(line[:body_bytes], seed):
        other = " or another run's" if seed else ""
        raise ValueError(f"its checksum does not fit, so it is damaged{other}")
    content.pop(_KEY)
