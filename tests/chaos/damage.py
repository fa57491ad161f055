"""Damage to a recording between two starts of a job, which the next start must refuse."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.records import records_of

TORN = "a torn record"
DAMAGES = ("a lost record", "swapped records", "another run's record", TORN)


@contextmanager
def damaged(folder: Path, kind: str, another: Path, draws: random.Random) -> Iterator[Path | None]:
    """Damage one of a job's recordings meanwhile; yield its path, or None if all are too short.

    `another` is the folder of another run of the same kind. A torn record stays.
    """
    long_enough = [
        (path, records)
        for path in sorted((folder / "recorded").glob("*-0.*"))
        if path.name.count(".") == 1 and len(records := records_of(path)) > 4
    ]
    if not long_enough:
        yield None
        return
    path, (header, *records) = draws.choice(long_enough)
    content, at = path.read_bytes(), draws.randrange(len(records) - 2)
    if kind == DAMAGES[0]:
        del records[at]
    elif kind == DAMAGES[1]:
        records[at : at + 2] = records[at + 1], records[at]
    elif kind == DAMAGES[2]:
        records[at] = records_of(another / "recorded" / path.name)[1 + at]
    else:
        records.append(records[at][:20])  # less than a header
    path.write_bytes(header + b"".join(records))
    yield path
    if kind != TORN:
        path.write_bytes(content)
