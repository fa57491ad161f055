"""Megatron's `--profile` names what FSEP does; the log has the waits of compute."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.training import Record, train
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.row import AT_HOME, FSEP

STEPS = 6
# Megatron profiles the third and the fourth step.
PROFILE = " --profile --use-pytorch-profiler --profile-step-start 3 --profile-step-end 5"
PROFILED = 2
MICROBATCHES = 2
LAYERS = ("layer 1", "layer 2")
# In a step: the first layer's weights go from backward to the next forward, and the last layer's
# from forward to backward.
RESTORES = {"layer 1": MICROBATCHES + 1, "layer 2": MICROBATCHES}
FORECAST = " --fsep-plan-mode forecast --fsep-late-plan wait"
MODES = {"rows": FORECAST, "without replicas": AT_HOME + " --fsep-planner static"}


def train_profiled(command: list[str], all_threads: bool) -> Record:
    with _every_thread() if all_threads else contextlib.nullcontext():
        return train(command)


@contextlib.contextmanager
def _every_thread() -> Iterator[None]:
    """Let Megatron's profiler see the threads of communication streams on the CPU."""
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    profile = partial(torch.profiler.profile, experimental_config=config)
    with mock.patch.object(torch.profiler, "profile", profile):
        yield


@dataclass(frozen=True)
class Run:
    """Profiled run of two ranks: its record, and its folder."""

    record: Record
    folder: Path

    def events(self, rank: int) -> list[dict[str, Any]]:
        """Return the rank's events in the order of their beginning."""
        with gzip.open(self.folder / "torch_profile" / f"rank-{rank}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        timed = [event for event in events if event["ph"] == "X"]
        return sorted(timed, key=lambda event: float(event["ts"]))


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["name"] == name]


def end(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


@pytest.fixture(scope="module")
def runs(trained: Trainings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Train with slices of experts, and with experts at home alone."""
    found = {}
    for mode, of_mode in MODES.items():
        folder = tmp_path_factory.mktemp("run")
        board = folder / "board"
        flags = f"{FSEP}{of_mode}{PROFILE} --log-interval 2 --tensorboard-dir {board}"
        found[mode] = Run(trained(flags, mode == "rows", by=train_profiled, steps=STEPS), folder)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_exchange_of_the_profiled_steps_is_named(runs: dict[str, Run], mode: str) -> None:
    for rank in range(2):
        count = Counter(event["name"] for event in runs[mode].events(rank))
        for layer in LAYERS:
            passes = PROFILED * MICROBATCHES
            moves = mode != "without replicas"
            assert count[f"restore {layer}"] == moves * RESTORES[layer] * PROFILED
            assert count[f"reduce {layer}"] == moves * passes
            for exchange in (f"dispatch {layer}", f"combine {layer}"):
                assert count[exchange] == count[f"{exchange}, backward"] == passes
            assert count[f"experts {layer}"] == passes


def test_a_backward_exchange_is_named_around_its_node(runs: dict[str, Run]) -> None:
    events = runs["rows"].events(0)
    sent = named(events, "_AllToAllBackward")
    for exchange in ("dispatch", "combine"):
        for of in named(events, f"{exchange} layer 1, backward"):
            inside = [one for one in sent if of["ts"] <= one["ts"] and end(one) <= end(of)]
            assert len(inside) == 1


def test_a_profile_changes_no_bit(trained: Trainings, runs: dict[str, Run]) -> None:
    assert identical(runs["rows"].record, trained(FSEP + FORECAST, steps=STEPS))
