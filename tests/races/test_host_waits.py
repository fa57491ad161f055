"""A layer's forward pass waits for the device once and uploads once; its backward does neither.

Tokens that go through nodes are the one exception: a second wait, which has a name, and an upload.

The code for CUDA runs on replaced streams. Waits, and operations that would read a number back from
the device, are recorded. Effects that only a GPU shows are left to `tests/gpu/test_host_waits.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.telemetry.metrics_file import recording_path
from megatron_laer.tools.report.metrics_recording import read_metrics
from tests.one_layer import (
    EXPECTED,
    HIDDEN,
    MODELS,
    TOKENS,
    UPLOAD,
    WAIT,
    HostWork,
    host_work,
    naming_token_sizes,
    one_layer,
)
from tests.races import cuda
from tests.races.observing import observed

_READ_BACK = """
    _local_scalar_dense is_nonzero equal nonzero masked_select _unique2 unique_consecutive
    repeat_interleave.Tensor
""".split()


class _ReadsBack(TorchDispatchMode):
    """Record of operations whose result on the host needs the device's."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self._done = done

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.removesuffix(".default")
        if name in _READ_BACK and kwargs.get("output_size") is None:
            self._done.append(f"{WAIT} for {name}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list to which every wait and upload of the host is appended."""
    done: list[str] = []

    def noting(owner: Any, name: str, event: str) -> Any:
        function = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(event)
            return function(*args, **kwargs)

        return mock.patch.object(owner, name, noted)

    with (
        noting(cuda.Event, "synchronize", WAIT),
        noting(torch.cuda, "synchronize", WAIT),
        noting(cuda, "copy_to_card", UPLOAD),
        naming_token_sizes(done),
        _ReadsBack(done),
    ):
        yield done


def work_of(model: str, token_exchange: str, fault: bool) -> list[HostWork]:
    """Return the host's operations on this rank, with or without a number that is read back."""
    from megatron_laer.layer.dispatch.dispatcher import SlotTokenDispatcher

    broken: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if fault:
        true_preprocess = SlotTokenDispatcher.preprocess

        def preprocess(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
            assert routing_map.sum().item() > 0
            return true_preprocess(dispatcher, routing_map)

        broken = mock.patch.object(SlotTokenDispatcher, "preprocess", preprocess)
    with observed() as checker, broken, one_layer("gloo", model, token_exchange) as layer:
        found = host_work(layer, watched)
    assert checker.races == []
    return found


@pytest.mark.parametrize("token_exchange", EXPECTED)
@pytest.mark.parametrize("model", MODELS)
def test_the_host_waits_for_counts_and_uploads_what_it_planned(
    ranks: RankPools, model: str, token_exchange: str
) -> None:
    assert ranks(1).run(work_of, model, token_exchange, False) == [[EXPECTED[token_exchange]] * 3]


def waits_of_recorded(folder: str) -> list[list[str]]:
    """Return the host's operations in whole recorded steps, their start and end included."""
    import megatron_laer

    found = []
    with (
        observed() as checker,
        one_layer("gloo", "no shared experts", record_metrics=folder) as layer,
    ):
        for step in range(3):
            hidden = torch.randn(TOKENS, 1, HIDDEN, device=torch.cuda.current_device())
            hidden.requires_grad_()
            layer.zero_grad_buffer()
            with watched() as done:
                with megatron_laer.training_step(step, 1):
                    output, _ = layer(hidden)
                    output.sum().backward()
                found.append([*done])
    assert checker.races == []
    return found


def test_a_rank_that_records_metrics_waits_for_nothing_more(
    ranks: RankPools, tmp_path: Path
) -> None:
    (steps,) = ranks(1).run(waits_of_recorded, str(tmp_path))
    assert [done.count(WAIT) for done in steps[1:]] == [1, 1]
    # No event is ever found to have passed here, so all steps are written at the end.
    recording = read_metrics(recording_path(tmp_path, 0))
    assert recording.steps_T.tolist() == [0, 1, 2]


def test_a_number_that_is_read_back_is_a_wait(ranks: RankPools) -> None:
    (steps,) = ranks(1).run(work_of, "no shared experts", "rank", True)
    assert steps == [([WAIT, f"{WAIT} for _local_scalar_dense", UPLOAD], [])] * 3
