"""Draws a training step from recorded timelines: `python -m benchmarks.timeline_picture --help`.

It trains a small model on two CPU ranks with `--fsep-timeline`, with the scheduler and without. One
rank's tracks of one step are drawn for each, on one scale, as SVG. Only recorded events are drawn.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a file

from benchmarks.command_line import output, parser_of, program
from benchmarks.end_to_end_cases import FSEP, Size
from benchmarks.training_run import Routing, measure
from megatron_laer.cpu.ranks import RankPool
from megatron_laer.files.checks import quoted, read_text, refuse_overwriting
from megatron_laer.files.writing import write_file
from megatron_laer.telemetry.timeline import FIRST_STEP, NUM_STEPS
from megatron_laer.telemetry.trace_events import COMPUTE, TRACKS
from megatron_laer.tools.cli.argument_types import path
from megatron_laer.tools.data import default_text_sources, prepare_data

RANKS = 2
SIZE = Size(3, 256, 1024, 8, 2, 128, 8, warm_up=0, steps=FIRST_STEP + NUM_STEPS, repeats=1)

# Limits of a file, enough for some steps of a rank, and of a run, a year.
_MAX_BYTES, _MAX_US = 2**28, 3.2e13

WIDTH, LEFT, TRACK, BAR, HEAD = 1280, 110, 30, 22, 34
COLOURS = {
    "dense layers": "#d8dee6",
    "experts": "#5b8def",
    "dispatch": "#f2a65a",
    "combine": "#f2a65a",
    "restore": "#4caf7a",
    "change": "#2e7d52",
    "reduce": "#a67bd4",
    "wait": "#d64545",
}
LEGEND = {
    "dense layers": "attention, router, permutations, optimizer",
    "experts": "experts",
    "dispatch": "token exchange",
    "restore": "restore",
    "reduce": "gradient exchange",
    "wait": "compute waits for an exchange",
}


@dataclass(frozen=True)
class Bar:
    """An interval on a track, in milliseconds since the step began."""

    track: str
    name: str
    start_ms: float
    length_ms: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Record timelines, unless traces are given, and draw them."""
    parser = parser_of("benchmarks.timeline_picture", __doc__)
    parser.add_argument("--svg", type=output, required=True, help="where to draw")
    parser.add_argument(
        "--traces",
        nargs=2,
        type=path,
        metavar=("ON", "OFF"),
        help="files of one rank, recorded with and without the scheduler, instead of new ones",
    )
    options = parser.parse_args(arguments)
    if options.traces is not None:
        refuse_overwriting(options.svg, options.traces, "--svg")
        traces = [read_trace_events(given) for given in options.traces]
    else:
        traces = record()
    write_file(options.svg, draw(traces[0], traces[1]))
    return 0


def read_trace_events(given: Path) -> dict[str, Any]:
    """Read a timeline of one rank; raise ValueError for one without a whole step on our tracks."""
    try:
        trace = json.loads(read_text(given, _MAX_BYTES))
        events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        for event in events:
            if not 0 <= event["ts"] < _MAX_US or not 0 <= event["dur"] < _MAX_US:
                raise ValueError(f"a bar begins at {event['ts']!r} and lasts {event['dur']!r}")
            if event["cat"] not in TRACKS:
                raise ValueError(f"there is no track {quoted(event['cat'])}")
            is_step = event["name"].startswith("step ")
            if not is_step and not event["name"].startswith(tuple(COLOURS)):
                raise ValueError(f"nothing of ours is called {quoted(event['name'])}")
        if all(bar.length_ms == 0 for bar in shortest_step(trace)):
            raise ValueError("its shortest step is empty")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{given} is no timeline of --fsep-timeline: {error}") from error
    found: dict[str, Any] = trace
    return found


def record() -> list[dict[str, Any]]:
    traces = []
    with tempfile.TemporaryDirectory() as scratch, RankPool(RANKS) as pool:
        prefix = f"{scratch}/text"
        prepare_data(default_text_sources()[:150], prefix, progress=False)
        for scheduler in ("on", "off"):
            extra = (
                f"{FSEP} --fsep-plan-mode forecast --fsep-late-plan wait "
                f"--fsep-scheduler {scheduler} --fsep-timeline {scratch}/{scheduler}"
            )
            pool.run(
                measure,
                [*SIZE.flags(prefix, RANKS), *extra.split()],
                Routing("--moe-router-force-load-balancing"),
                SIZE.routing_shape(RANKS),
                SIZE.steps,
                timeout_s=1800,
            )
            traces.append(json.loads(Path(f"{scratch}/{scheduler}/rank-0.json").read_text()))
    return traces


def shortest_step(trace: dict[str, Any]) -> list[Bar]:
    """Return the bars of the step that other work on the machine delayed least."""
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    steps = [event for event in events if event["name"].startswith("step ")]
    step = min(steps, key=lambda event: event["dur"])
    first, last = step["ts"], step["ts"] + step["dur"]
    return [
        Bar(event["cat"], event["name"], (event["ts"] - first) / 1e3, event["dur"] / 1e3)
        for event in events
        if event not in steps and first <= event["ts"] < last
    ]


def draw(on: dict[str, Any], off: dict[str, Any]) -> str:
    panels = [("scheduler on", shortest_step(on)), ("scheduler off", shortest_step(off))]
    longest_ms = max(bar.start_ms + bar.length_ms for _, bars in panels for bar in bars)
    scale = (WIDTH - LEFT - 20) / longest_ms
    height = len(panels) * (HEAD + len(TRACKS) * TRACK) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    top = 0.0
    for title, bars in panels:
        waits_ms = sum(bar.length_ms for bar in bars if bar.name.startswith("wait"))
        length_ms = max(bar.start_ms + bar.length_ms for bar in bars)
        text = f"{title}: step {length_ms:.0f} ms, of which compute waited {waits_ms:.1f} ms"
        parts.append(f'<text x="8" y="{top + 20:.0f}" font-weight="bold">{text}</text>')
        parts += _panel(bars, top + HEAD, scale)
        top += HEAD + len(TRACKS) * TRACK
    parts += _axis(top, longest_ms, scale)
    parts += _legend(top + 36)
    return "\n".join([*parts, "</svg>", ""])


def _panel(bars: Sequence[Bar], top: float, scale: float) -> Iterator[str]:
    for place, track in enumerate(TRACKS):
        y = top + place * TRACK
        yield f'<text x="8" y="{y + 16:.0f}">{track}</text>'
        yield f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y + BAR}" y2="{y + BAR}" stroke="#ccc"/>'
        # Waits lie within phases, so they are drawn over them.
        for bar in sorted(
            (bar for bar in bars if bar.track == track), key=lambda bar: bar.name.startswith("wait")
        ):
            yield _bar(bar, y, scale)


def _bar(bar: Bar, y: float, scale: float) -> str:
    colour = next(colour for kind, colour in COLOURS.items() if bar.name.startswith(kind))
    is_wait = bar.track == COMPUTE and bar.name.startswith("wait")
    x, width = LEFT + bar.start_ms * scale, max(bar.length_ms * scale, 0.3)
    height = BAR / 2 if is_wait else BAR
    label = f"{bar.name}: {bar.length_ms:.2f} ms"
    shape = (
        f'<rect x="{x:.1f}" y="{y + BAR - height:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" fill="{colour}" stroke="white" stroke-width="0.3">'
        f"<title>{escape(label)}</title></rect>"
    )
    short = bar.name.replace("layer ", "").replace("backward", "bwd").replace(" layers", "")
    if is_wait or width < 6.5 * len(short):
        return shape
    return f'{shape}<text x="{x + 3:.1f}" y="{y + 15:.0f}" font-size="10">{escape(short)}</text>'


def _axis(top: float, longest_ms: float, scale: float) -> Iterator[str]:
    every_ms = next(step for step in (5, 10, 20, 50, 100, 200, 500, 1000) if longest_ms / step < 15)
    for tick in range(0, int(longest_ms) + 1, every_ms):
        x = LEFT + tick * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD}" y2="{top:.0f}" stroke="#eee"/>'
        yield f'<text x="{x:.1f}" y="{top + 14:.0f}" text-anchor="middle">{tick} ms</text>'


def _legend(y: float) -> Iterator[str]:
    x = float(LEFT)
    for kind, meaning in LEGEND.items():
        yield f'<rect x="{x:.0f}" y="{y:.0f}" width="12" height="12" fill="{COLOURS[kind]}"/>'
        yield f'<text x="{x + 17:.0f}" y="{y + 11:.0f}">{meaning}</text>'
        x += 45 + 6.4 * len(meaning)


if __name__ == "__main__":
    program("python -m benchmarks.timeline_picture", main)
