"""Switch of all layers to stock's placement and back, while a run goes on.

It holds from one step to another on all ranks of the world, and changes no result.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_laer.files.checks import quoted
from megatron_laer.runtime.comm.copies import Download, upload

logger = logging.getLogger(__name__)


@dataclass
class StockSwitch:
    """Whether a file exists, as rank 0 of the world sees it.

    The answer is broadcast in a step and used in the next one, when it has long arrived, so that no
    rank waits. Only the first step waits for its own.
    """

    path: str | None
    device: torch.device
    is_on: bool = False
    _asked: Callable[[], torch.Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._download = Download(self.device)

    def begin_step(self, step: int) -> bool:
        """Return whether this step has stock's placement. Collective over the world."""
        if self.path is None:
            return False
        was_on, asked = self.is_on, self._asked or self._ask()
        self.is_on = bool(asked())
        self._asked = self._ask()
        if self.is_on != was_on and dist.get_rank() == 0:
            placement = "stock's placement" if self.is_on else "planned layouts again"
            verb = "is there" if self.is_on else "is gone"
            logger.warning(
                "FSEP: %s %s: all layers have %s from step %d on",
                *(quoted(self.path), verb, placement, step),
            )
        return self.is_on

    def _ask(self) -> Callable[[], torch.Tensor]:
        assert self.path is not None
        exists = torch.tensor([os.path.lexists(self.path)], dtype=torch.uint8)
        answer = upload(exists, self.device)
        dist.broadcast(answer, src=0)
        return self._download.start(answer)
