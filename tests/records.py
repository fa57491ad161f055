"""Files of records in tests: taken apart, changed, damaged, and put together anew."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import open_input
from megatron_laer.files.records import Format, Records
from megatron_laer.planner.state import STATE
from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE

FORMATS: Mapping[str, Format] = {of.suffix: of for of in (TRACE, LAYOUTS, METRICS, STATE)}

# Kind, step and values of each record.
Content = list[tuple[str, int, dict[str, Any]]]


def format_of(path: Path) -> Format:
    return FORMATS[path.suffix[1:]]


def taken_apart(path: Path) -> tuple[dict[str, Any], Content]:
    """Return the header's fields, and all whole records."""
    with open_input(path) as file:
        records = Records.of(file, path, format_of(path))
        found = records.read(file, path)
        return records.fields, [(frame.kind, frame.step, values) for frame, values in found]


def put_together(path: Path, fields: Mapping[str, Any], content: Content) -> None:
    records = Records(format_of(path), fields)
    encoded = [
        records.encode(kind, number, step, values)
        for number, (kind, step, values) in enumerate(content, start=1)
    ]
    path.write_bytes(records.line + b"".join(encoded))


def rewrite(path: Path, change: Callable[[str, int, dict[str, Any]], bool | None]) -> None:
    """Write a file anew with changed values, and without the records for which it returns False."""
    fields, content = taken_apart(path)
    copies = [(kind, step, dict(values)) for kind, step, values in content]
    put_together(path, fields, [of for of in copies if change(*of) is not False])


def records_of(path: Path) -> list[bytes]:
    """Return the bytes of a file's header and of each record."""
    content = path.read_bytes()
    with open_input(path) as file:
        records = Records.of(file, path, format_of(path))
        found = [content[of.offset : of.end] for of in records.places(file, path)]
    return [records.line, *found]


def without_run(path: Path) -> list[bytes]:
    """Return `records_of` without the run's number, on which the checksums depend."""
    _, *records = records_of(path)
    fields, _ = taken_apart(path)
    fields.pop("run", None)
    return [repr(fields).encode(), *(record[:28] + record[32:] for record in records)]


def moved(mine: list[bytes], others: list[bytes], luck: random.Random) -> Iterator[bytes]:
    """Yield copies with each record lost, doubled, in another's place, or of another file."""
    for at, record in enumerate(mine):
        before, after = mine[:at], mine[at + 1 :]
        place = luck.randrange(len(mine))
        swapped = [*mine]
        swapped[at], swapped[place] = swapped[place], swapped[at]
        for records in (
            [*before, *after],
            [*before, record, record, *after],
            swapped,
            [*before, others[at], *after],
            [*before, others[at], record, *after],
            [*before, *others[at:]],
        ):
            yield b"".join(records)
