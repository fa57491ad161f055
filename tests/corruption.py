"""Changes of small files with checksums, in every format, and a count of the readers' reactions.

Changes are drawn by seeds, so that each run makes the same.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import open_input
from megatron_laer.planner.state import PlannerState
from megatron_laer.runtime.planning.layout_recording import read_layouts
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.traces.fsep import read_recording
from tests.planner_states import make_state
from tests.recorded_runs import RUN_NUMBER, record_run
from tests.traces import records_of

CHANGES_OF_A_KIND = 40
ERROR, PREFIX, UNCHANGED, OTHER = OUTCOMES = (
    "clear error",
    "right prefix",
    "unchanged value",
    "other data, in silence",
)

# Content of a file by record, each with the header; a list of one for a single value.
Records = list[Any]


@dataclass(frozen=True)
class Format:
    """Kind of file: its name in a run's folder, its reader, and the length of its header."""

    name: str
    read: Callable[[Path], Records]
    header_bytes: Callable[[bytes], int] = lambda content: content.index(b"\n") + 1


def _state(path: Path) -> Records:
    with open_input(path) as file:
        return [PlannerState.from_file(file).to_bytes()]


def _routing(path: Path) -> Records:
    trace = read_recording(path)
    keys = zip(trace.step_R, trace.microbatch_R, trace.layer_R, strict=True)
    found = [
        ([*map(int, key)], trace.layers, trace.counts_NE(at).tolist())
        for at, key in enumerate(keys)
    ]
    return sorted(found)  # as they were recorded


def _metrics(path: Path) -> Records:
    found = read_metrics(path)
    runs = [
        (first, 0, repr(run), repr(cluster))
        for (first, run), cluster in zip(found.runs, found.clusters, strict=True)
    ]
    columns = (found.of_steps, found.of_layers, found.metrics)
    steps = [
        (
            int(step),
            1,
            found.shape,
            repr([{name: values[at].tolist() for name, values in of.items()} for of in columns]),
            found.rank_tokens_TLN[at].tolist(),
        )
        for at, step in enumerate(found.steps_T)
    ]
    return sorted([*runs, *steps], key=lambda record: record[:2])


FORMATS: Mapping[str, Format] = {
    "planner's state": Format(
        "group-0.bin", _state, lambda content: 16 + int.from_bytes(content[12:16], "little")
    ),
    "trace": Format("group-0.trace", _routing),
    "layouts": Format("group-0.jsonl", lambda path: [*read_layouts(path)]),
    "metrics": Format("metrics-0.jsonl", _metrics),
}
RECORDINGS = ("trace", "layouts", "metrics")


def _piece(content: bytes, luck: random.Random) -> tuple[bytes, bytes, bytes]:
    begin = luck.randrange(len(content))
    end = min(len(content), begin + luck.randrange(1, 200))
    return content[:begin], content[begin:end], content[end:]


def _with_byte(content: bytes, at: int, change: int) -> bytes:
    return b"%s%c%s" % (content[:at], content[at] ^ change, content[at + 1 :])


def _bit(content: bytes, luck: random.Random) -> bytes:
    return _with_byte(content, luck.randrange(len(content)), 1 << luck.randrange(8))


def _byte(content: bytes, luck: random.Random) -> bytes:
    return _with_byte(content, luck.randrange(len(content)), luck.randrange(1, 256))


def _cut(content: bytes, luck: random.Random) -> bytes:
    before, _, after = _piece(content, luck)
    return before + after


def _truncated(content: bytes, luck: random.Random) -> bytes:
    return content[: luck.randrange(len(content))]


def _zeros(content: bytes, luck: random.Random) -> bytes:
    at = luck.randrange(len(content))
    return (content[:at] + bytes(64) + content[at + 64 :])[: len(content)]


def _doubled(content: bytes, luck: random.Random) -> bytes:
    before, piece, after = _piece(content, luck)
    return before + piece + piece + after


KINDS = (_bit, _byte, _cut, _truncated, _zeros, _doubled)


def changed(content: bytes) -> Iterator[bytes]:
    for kind in KINDS:
        for seed in range(CHANGES_OF_A_KIND):
            yield kind(content, random.Random(f"{kind.__name__} {seed}"))


def flipped(content: bytes, length: int) -> Iterator[bytes]:
    """Yield copies with one bit changed within this many bytes from the start."""
    for bit in range(8 * length):
        yield _with_byte(content, bit // 8, 1 << bit % 8)


def moved(path: Path, luck: random.Random) -> Iterator[bytes]:
    """Yield copies with each record lost, doubled, in another's place, or another run's."""
    record_run(path.parent / "another", number=RUN_NUMBER[::-1])
    header, *mine = records_of(path)
    _, *others = records_of(path.parent / "another" / path.name)
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
            yield header + b"".join(records)


def make(folder: Path) -> None:
    record_run(folder)
    (folder / "group-0.bin").write_bytes(make_state().to_bytes())


def outcome(format: Format, path: Path, expected: Records) -> str:
    try:
        found = format.read(path)
    except ValueError as error:
        assert str(error)
        return ERROR
    if found == expected:
        return UNCHANGED
    return PREFIX if found == expected[: len(found)] else OTHER


def outcomes(format: Format, path: Path, copies: Iterator[bytes]) -> Counter[str]:
    content, expected = path.read_bytes(), format.read(path)
    found: Counter[str] = Counter()
    for copy in copies:
        path.write_bytes(copy)
        found[outcome(format, path, expected)] += 1
    path.write_bytes(content)
    return found
