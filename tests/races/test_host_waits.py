"""A layer's forward pass waits for the device once and uploads once; its backward does neither.

Tokens that go through nodes are the one exception: a second wait, which has a name, and an upload.
The tests for a card (`tests/gpu/test_host_waits.py`) run on the labelled device here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.tools.report.metrics_recording import read_metrics
from tests.fake_cuda import findings
from tests.fake_cuda.device import observed
from tests.fake_cuda.findings import Kind
from tests.gpu import test_host_waits as on_card
from tests.one_layer import EXPECTED, HIDDEN, MODELS, TOKENS, one_layer


def with_gloo(_: str, *args: Any, **more: Any) -> Any:
    return one_layer("gloo", *args, **more)


def check(name: str, arguments: list[str]) -> list[str]:
    """Run a test for a card on the labelled device; return the races found."""
    with observed() as device, mock.patch.object(on_card, "one_layer", with_gloo):
        getattr(on_card, name)(*arguments)
    return device.checker.races


@pytest.mark.parametrize("token_exchange", EXPECTED)
@pytest.mark.parametrize("model", MODELS)
def test_the_host_waits_for_counts_and_uploads_what_it_planned(
    ranks: RankPools, model: str, token_exchange: str
) -> None:
    name = on_card.test_the_host_waits_for_counts_and_uploads_what_it_planned.__name__
    assert ranks(1).run(check, name, [model, token_exchange]) == [[]]


def test_the_debug_mode_raises_at_a_number_that_is_read_back(ranks: RankPools) -> None:
    name = on_card.test_the_debug_mode_raises_at_a_number_that_is_read_back.__name__
    assert ranks(1).run(check, name, []) == [[]]


def waits_of_steps(folder: str) -> tuple[list[int], list[str]]:
    """Train four steps whose metrics are recorded; return the waits in each one, and races."""
    import megatron_laer

    found = []
    with (
        observed() as device,
        one_layer("gloo", "no shared experts", record_metrics=folder) as layer,
    ):
        for step in range(4):
            hidden = torch.randn(TOKENS, 1, HIDDEN, device=torch.cuda.current_device())
            hidden.requires_grad_()
            layer.zero_grad_buffer()
            noted = findings.renew()
            noted.is_steady = True
            with megatron_laer.training_step(step, 1):
                output, _ = layer(hidden)
                output.sum().backward()
            waits = [number for one, number in noted.found.items() if one.kind is Kind.WAIT]
            found.append(sum(waits))
    return found, device.checker.races


def test_a_rank_that_records_metrics_waits_for_nothing_more(
    ranks: RankPools, tmp_path: Path
) -> None:
    ((waits, races),) = ranks(1).run(waits_of_steps, str(tmp_path))
    # For counts, and for a step's new layouts. The first two are verified.
    assert waits[2:] == [2, 2] and races == []
    # No event is ever found to have passed here, so all steps are written at the end.
    recording = read_metrics(METRICS.path(tmp_path, 0))
    assert recording.steps_T.tolist() == [0, 1, 2, 3]
