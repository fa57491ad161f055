"""Damaged copies of files, for the tests of everything that reads from disk."""

from __future__ import annotations

import random
from pathlib import Path

NASTY = (
    b"9" * 18,
    b"9" * 5000,
    b"-1",
    b"1e400",
    b"NaN",
    b"[" * 5000,
    b"\0",
    bytes(64),
    b"\xff\xff\xff\xff",
    b"{",
    b'"',
    b"\n",
    b"]",
)
JSON = b'0123456789-eE.,:{}[]"tn'


def damaged(content: bytes, luck: random.Random) -> bytes:
    """Return a copy with one to four changed, removed, doubled or replaced parts, or a cut end."""
    changed = bytearray(content)
    for _ in range(luck.choice((1, 1, 2, 4))):
        begin = luck.randrange(len(changed) + 1)
        end = min(len(changed), begin + luck.choice((1, 1, 2, 8, 40)))
        kind = luck.randrange(7)
        if kind == 0 and begin < len(changed):
            changed[begin] = luck.randrange(256)
        elif kind == 1:
            del changed[begin:end]
        elif kind == 2:
            changed[begin:begin] = changed[begin:end]
        elif kind == 3:
            changed[begin:end] = luck.choice(NASTY)
        elif kind == 4:
            changed[begin:end] = luck.randbytes(end - begin)
        elif kind == 5:
            changed[begin:end] = bytes(luck.choices(JSON, k=end - begin))
        else:
            del changed[begin:]
    return bytes(changed)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])
