"""The mailbox on the planner rank: whole steps go to the planner, microbatches to the recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.runtime.planning.mailbox import RoutingMailbox
from megatron_laer.telemetry.trace_file import TraceWriter
from megatron_laer.tools.traces.reading import read_recording

Delivered = list[tuple[int, int, list[list[int]]]]


def counts(value: int) -> npt.NDArray[np.int64]:
    return np.full((2, 3), value, dtype=np.int64)


def mailbox(trace: TraceWriter | None = None) -> tuple[RoutingMailbox, Delivered, list[str]]:
    delivered: Delivered = []
    warnings: list[str] = []

    def plan(step: int, layer: int, counts_NE: npt.NDArray[np.int64]) -> None:
        if counts_NE[0, 0] == 13:
            raise RuntimeError("no thirteen")
        delivered.append((step, layer, counts_NE.tolist()))

    homes = [HomeOrder.stock(3)] * 2
    box = RoutingMailbox(["layer 1", "layer 2"], homes, plan, trace, warnings.append)
    return box, delivered, warnings


def test_a_layers_sum_is_delivered_once_with_its_last_microbatch() -> None:
    box, delivered, _ = mailbox()
    box.begin_step(4, num_microbatches=2)
    box.put(0, 0, counts(1))
    box.put(1, 0, counts(5))
    assert delivered == []
    box.put(0, 1, counts(2))
    assert delivered == [(4, 0, counts(3).tolist())]
    box.end_step()
    assert len(delivered) == 1, "the second layer's step is not complete"
    box.begin_step(5, num_microbatches=1)
    box.put(1, 0, counts(7))
    assert delivered[1:] == [(5, 1, counts(7).tolist())], "nothing of the step before is in it"


def test_without_a_number_of_microbatches_sums_are_delivered_when_the_step_ends() -> None:
    box, delivered, _ = mailbox()
    box.begin_step(0, num_microbatches=None)
    for number in range(3):
        box.put(1, number, counts(1))
    assert delivered == []
    box.end_step()
    assert delivered == [(0, 1, counts(3).tolist())]


def test_counts_that_change_afterwards_change_no_sum() -> None:
    box, delivered, _ = mailbox()
    box.begin_step(0, num_microbatches=2)
    first = counts(1)
    box.put(0, 0, first)
    first += 100
    box.put(0, 1, counts(1))
    for number in range(2):  # the step is repeated
        box.put(0, number, counts(1))
    assert delivered == [(0, 0, counts(2).tolist())] * 2


def test_a_planner_that_raises_is_counted_and_named_and_the_next_layer_goes_on() -> None:
    box, delivered, warnings = mailbox()
    box.begin_step(7, num_microbatches=1)
    box.put(0, 0, counts(13))
    box.put(1, 0, counts(1))
    assert box.faults == 1 and len(delivered) == 1
    (warning,) = warnings
    assert "step 7, layer 1" in warning and "no thirteen" in warning


def test_every_microbatch_is_recorded_and_a_recording_that_fails_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / "group-0.trace"
    writer = TraceWriter(path, 2, 3, ["layer 1", "layer 2"], 0)
    box, delivered, warnings = mailbox(writer)
    box.begin_step(0, num_microbatches=2)
    for number in range(2):
        for layer in range(2):
            box.put(layer, number, counts(number))
    box.begin_step(1, num_microbatches=1)
    box.put(0, 0, np.zeros((9, 9), dtype=np.int64))
    assert any("recording of routing ends at step 1" in warning for warning in warnings)
    box.close()
    assert len(delivered) == 3
    assert len(read_recording(path)) == 4
