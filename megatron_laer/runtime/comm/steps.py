"""Steps of exchanges: several exchanges run side by side, and the last steps may be launched later.

An exchange is a generator. It yields the communicator before each All-to-All, and again behind it,
where its next kernel would wait for what arrives. Behind the last one it yields None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

Steps = Generator[dist.ProcessGroup | None, None, torch.Tensor]


def finish(steps: Steps) -> torch.Tensor:
    """Run an exchange to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result


class SideBySide:
    """Exchanges of one layout, whose All-to-Alls are launched together.

    Attributes:
        results: by position, of exchanges that have ended.
        has_more: whether other All-to-Alls follow those that were launched last.
    """

    def __init__(self, exchanges: Sequence[Steps], device: torch.device) -> None:
        self.results: dict[int, torch.Tensor] = {}
        self.has_more = False
        self._exchanges = exchanges
        self._device = device

    def next(self) -> bool:
        """Run to behind the next All-to-Alls; return False once the exchanges have ended."""
        # A layout decides on All-to-Alls, so all exchanges have as many, on the same communicators.
        groups = {self._advance(at) for at in range(len(self._exchanges))}
        assert len(groups) == 1, "exchanges of one layout have different steps"
        (group,) = groups
        if group is None:
            self.has_more = False
            return False
        with one_launch(group, self._device):
            following = [self._advance(at) for at in range(len(self._exchanges))]
        self.has_more = any(group is not None for group in following)
        return True

    def _advance(self, at: int) -> dist.ProcessGroup | None:
        if at in self.results:
            return None
        try:
            return next(self._exchanges[at])
        except StopIteration as end:
            self.results[at] = end.value
            return None


def one_launch(group: dist.ProcessGroup, device: torch.device) -> AbstractContextManager[object]:
    """Launch the block's collectives of one communicator as one kernel, as NCCL can."""
    if getattr(group._get_backend(device), "supports_coalescing", False):
        return dist.distributed_c10d._coalescing_manager(group, device)
    return contextlib.nullcontext()
