"""One FSEP layer on one GPU: its host waits for counts and nothing else, and never in backward.

Tokens that go through nodes are the one exception: a second wait, which has a name.

torch's debug mode raises at waits for a stream. It does not see waits for an event and asynchronous
copies from memory that is not pinned, so both are recorded here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.one_layer import EXPECTED, MODELS, UPLOAD, WAIT, host_work, naming_token_sizes, one_layer


class _Uploads(TorchDispatchMode):
    """Record of copies from the host to the device."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self._done = done

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = {"aten::_to_copy": args[:1], "aten::copy_": args[1:2]}
        for source in sources.get(func._schema.name, ()):
            if source.device.type == "cpu" and result.device.type == "cuda":
                self._done.append(UPLOAD if source.is_pinned() else f"{UPLOAD} of pageable memory")
        return result


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list of waits and uploads of the host; other waits raise."""
    done: list[str] = []
    synchronize = torch.cuda.Event.synchronize

    def noted(event: torch.cuda.Event) -> None:
        done.append(WAIT)
        synchronize(event)

    noting = mock.patch.object(torch.cuda.Event, "synchronize", noted)
    with noting, naming_token_sizes(done), _Uploads(done):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield done
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_debug_mode_raises_at_a_number_that_is_read_back() -> None:
    ones = torch.ones(4, device="cuda")
    with watched() as done:
        with pytest.raises(RuntimeError, match="synchronizing"):
            ones.sum().item()
        torch.zeros(4).pin_memory().to("cuda", non_blocking=True)
        torch.zeros(4).to("cuda", non_blocking=True)
        torch.cuda.current_stream().record_event().synchronize()
    assert done == [UPLOAD, f"{UPLOAD} of pageable memory", WAIT]


@pytest.mark.parametrize("token_exchange", EXPECTED)
@pytest.mark.parametrize("model", MODELS)
def test_the_host_waits_for_counts_and_uploads_what_it_planned(
    model: str, token_exchange: str
) -> None:
    torch.cuda.set_device(0)
    with one_layer("nccl", model, token_exchange) as layer:
        assert host_work(layer, watched) == [EXPECTED[token_exchange]] * 3
