"""Lines of JSON in recordings end with a checksum, which is made and checked here.

    {"format":"megatron_laer-metrics","version":2,...,"crc":"89abcdef"}\\n
    {"step":7,...,"crc":"0a1b2c3d"}\\n

The last key is the CRC-32 of the line's bytes before its comma. Version 1 of a format had no
checksums. Knows nothing else of what lines hold.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import quoted

logger = logging.getLogger(__name__)

# The version of every format whose lines end with a checksum.
VERSION = 2

_KEY = "crc"
_END = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n?')
_END_BYTES = len(b',"crc":"01234567"}')


def sealed(content: Mapping[str, Any]) -> bytes:
    """Return a line that ends with its checksum."""
    body = unsealed(content).removesuffix(b"}\n")
    return b'%s,"%s":"%08x"}\n' % (body, _KEY.encode(), zlib.crc32(body))


def unsealed(content: Mapping[str, Any]) -> bytes:
    """Return a line of version 1."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def warn_of(version: int, path: Path) -> None:
    """Warn that a recording is of version 1, if it is."""
    if version == 1:
        logger.warning("%s: version 1 of the format, in which not all damage is noticed", path)


def read_header(line: bytes, format_name: str, kind: str) -> tuple[dict[str, Any], int]:
    """Return what a recording's first line holds beside format and version, and the version.

    Args:
        kind: of recording, for messages.

    Raises:
        ValueError: another format or version, or a checksum that does not fit.
    """
    content = _object(line)
    if content.pop("format", None) != format_name:
        raise ValueError(f"it is no {kind}, since it begins with {quoted(line[:100])}")
    version = content.pop("version", None)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"version {quoted(version)} of the format; this release reads versions 1 to {VERSION}"
        )
    _check_seal(line, content, is_sealed=version > 1)
    return content, version


def read_line(line: bytes, version: int) -> dict[str, Any]:
    """Return what a line holds, in this version of the format.

    Raises:
        ValueError: its checksum does not fit, or it is no JSON object.
    """
    content = _object(line)
    try:
        _check_seal(line, content, is_sealed=version > 1)
    except ValueError as error:
        raise ValueError(f"{error}; a copy of the lines before it can be read") from error
    return content


def _object(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {quoted(content)}")
    return content


def _check_seal(line: bytes, content: dict[str, Any], *, is_sealed: bool) -> None:
    """Check a line's checksum, and take it out of the content; version 1 must have none."""
    if not is_sealed:
        if _KEY in content:
            raise ValueError(f"has the key {_KEY!r}, which version 1 of the format has not")
        return
    body_bytes = len(line.removesuffix(b"\n")) - _END_BYTES
    end = _END.fullmatch(line, max(body_bytes, 0))
    if end is None or int(end[1], 16) != zlib.crc32(line[:body_bytes]):
        raise ValueError("its checksum does not fit, so it is damaged")
    content.pop(_KEY)
