"""`--fsep-timeline` writes the events of each track; the log has the waits of compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.telemetry.timeline import FIRST_STEP, NUM_STEPS
from megatron_laer.telemetry.trace_events import COMPUTE, TOKENS, TRACKS
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.row import AT_HOME

STEPS = FIRST_STEP + NUM_STEPS + 1
MICROBATCHES = 2
LAYERS = ("layer 1", "layer 2")
# In a step: the first layer's weights go from backward to the next forward, and the last layer's
# from forward to backward.
RESTORES = {"layer 1": MICROBATCHES + 1, "layer 2": MICROBATCHES}
# Times are written in tenths of a microsecond.
ROUNDING_US = 0.2
FORECAST = " --fsep-plan-mode forecast --fsep-late-plan wait"
MODES = {
    "on": FORECAST,
    "off": FORECAST + " --fsep-scheduler off",
    "without replicas": AT_HOME + " --fsep-planner static",
}


def flags(data: str, extra: str, steps: int = STEPS) -> list[str]:
    return command_line(
        data,
        " --expert-parallel-mode fsep --fsep-sharding rows" + extra,
        global_batch=4 * MICROBATCHES,
        steps=steps,
    )


def read(directory: Path, rank: int) -> dict[str, list[dict[str, Any]]]:
    events = json.loads((directory / f"rank-{rank}.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {rank}
    names = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert tuple(names[place] for place in sorted(names)) == TRACKS
    tracks: dict[str, list[dict[str, Any]]] = {track: [] for track in TRACKS}
    for event in sorted(events, key=lambda event: event.get("ts", 0.0)):
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["name"] == name]


def end(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


@dataclass(frozen=True)
class Run:
    """Recorded run of two ranks: its record, and its folders of timelines and of TensorBoard."""

    record: Record
    timeline: Path
    board: Path


@pytest.fixture(scope="module")
def runs(
    ranks: RankPools, text_data: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Train with the scheduler on and off, and with experts at home alone."""
    found = {}
    for mode, of_mode in MODES.items():
        folder = tmp_path_factory.mktemp("run")
        extra = (
            f"{of_mode} --log-interval 2"
            f" --fsep-timeline {folder / 'timeline'} --tensorboard-dir {folder / 'board'}"
        )
        record = ranks(2).run(train, flags(text_data, extra))[0]
        found[mode] = Run(record, folder / "timeline", folder / "board")
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_exchange_of_the_recorded_steps_is_on_its_track(
    runs: dict[str, Run], mode: str
) -> None:
    for rank in range(2):
        tracks = read(runs[mode].timeline, rank)
        steps = [event for event in tracks[COMPUTE] if event["name"].startswith("step ")]
        wanted = range(FIRST_STEP, FIRST_STEP + NUM_STEPS)
        assert [event["name"] for event in steps] == [f"step {step + 1}" for step in wanted]
        for layer in LAYERS:
            passes = NUM_STEPS * MICROBATCHES
            matrices = 0 if mode == "without replicas" else 2
            restores = RESTORES[layer] if mode == "on" else 2 * MICROBATCHES
            restored = named(tracks["parameters"], f"restore {layer}")
            assert len(restored) == restores * matrices * NUM_STEPS
            assert len(named(tracks["gradients"], f"reduce {layer}")) == matrices * passes
            for exchange in (f"dispatch {layer}", f"combine {layer}"):
                assert len(named(tracks[TOKENS], exchange)) == passes
                assert len(named(tracks[TOKENS], f"{exchange}, backward")) == passes
            for phase in (f"experts {layer}", f"experts {layer}, backward"):
                assert len(named(tracks[COMPUTE], phase)) == passes
        for track in TRACKS:
            outside = [
                event
                for event in tracks[track]
                if event["ts"] < steps[0]["ts"] - ROUNDING_US
                or end(event) > end(steps[-1]) + ROUNDING_US
            ]
            assert not outside


def test_work_on_one_track_is_in_order_and_phases_alternate_with_exchanges(
    runs: dict[str, Run],
) -> None:
    for rank in range(2):
        tracks = read(runs["on"].timeline, rank)
        phases = [
            event for event in tracks[COMPUTE] if not event["name"].startswith(("step ", "wait: "))
        ]
        main_thread = sorted(phases + tracks[TOKENS], key=lambda event: event["ts"])
        for series in (main_thread, tracks["parameters"], tracks["gradients"]):
            for before, after in pairwise(series):
                assert after["ts"] >= end(before) - ROUNDING_US, (before, after)
        # Phases and exchanges follow each other without a gap, within each step.
        kinds = [event["cat"] for event in main_thread]
        per_step = len(kinds) // NUM_STEPS
        for start in range(0, len(kinds), per_step):
            step = kinds[start : start + per_step]
            assert step == [COMPUTE, TOKENS] * (per_step // 2) + [COMPUTE]


def test_the_next_layers_restore_begins_before_this_layers_experts_end(
    runs: dict[str, Run],
) -> None:
    """Compare with and without the schedule: without it, the trace must show no overlap."""
    overlapped = {}
    for scheduler in ("on", "off"):
        tracks = read(runs[scheduler].timeline, 0)
        # A microbatch restores both matrices in forward, and unscheduled in backward too.
        matrices = 2 * RESTORES["layer 2"] if scheduler == "on" else 4 * MICROBATCHES
        restores = named(tracks["parameters"], "restore layer 2")[:: matrices // MICROBATCHES]
        experts = named(tracks[COMPUTE], "experts layer 1")
        overlapped[scheduler] = sum(
            restore["ts"] < end(compute) for restore, compute in zip(restores, experts, strict=True)
        )
    # On a busy machine, a communication stream's thread may run only after the experts.
    assert overlapped["on"] > 0
    assert overlapped["off"] == 0


def test_a_timeline_changes_no_bit(ranks: RankPools, text_data: str, runs: dict[str, Run]) -> None:
    plain = ranks(2).run(train, flags(text_data, FORECAST))[0]
    assert identical(runs["on"].record, plain)


def test_a_run_that_ends_early_leaves_what_it_recorded(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    ranks(2).run(train, flags(text_data, f" --fsep-timeline {tmp_path}", steps=FIRST_STEP + 1))
    for rank in range(2):
        steps = [
            event["name"]
            for event in read(tmp_path, rank)[COMPUTE]
            if event["name"].startswith("step ")
        ]
        assert steps == [f"step {FIRST_STEP + 1}"]


def test_a_timeline_that_cannot_be_written_is_refused_on_every_rank(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    # Blocks one rank's file only, so that the other rank must learn of it.
    (tmp_path / "rank-1.json").mkdir()
    command = flags(text_data, f" --fsep-timeline {tmp_path}")
    for result in ranks(2).run_raw(train, command):
        assert result.type_name == "RefusedError", result.traceback
        assert "rank-1.json" in result.message


@pytest.mark.parametrize(
    ("scheduler", "waits"), [("on", False), ("off", True)], ids=["scheduled", "unscheduled"]
)
def test_exposed_times_are_in_tensorboard(
    runs: dict[str, Run], scheduler: str, waits: bool
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[scheduler].board))
    events.Reload()
    for what, label in (("restore", "parameters"), ("reduce", "gradients")):
        series = [event.value for event in events.Scalars(f"fsep_{what}_exposed_ms")]
        assert len(series) == STEPS // 2
        assert all(value >= 0 for value in series)
        if waits:  # for all work of the stream; steps 3 and 4 are the second report's
            track_ms = 0.0
            for rank in range(2):
                tracks = read(runs[scheduler].timeline, rank)
                until = end(named(tracks[COMPUTE], "step 4")[0])
                track_ms += sum(e["dur"] for e in tracks[label] if e["ts"] < until) / 1e3
            mean_of_ranks_and_steps_ms = track_ms / 2 / 2
            assert series[1] == pytest.approx(mean_of_ranks_and_steps_ms, rel=0.2, abs=0.5)
