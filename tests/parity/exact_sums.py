"""`exact_sums()` sends partial sums of tokens across ranks in fp32, for tests only.

With `--fsep-token-exchange node`, and with HybridEP, a rank sums outputs and gradients of a token
before they leave, a rounding more in bf16 than in stock. In fp32 a token's sum is rounded once, as
in stock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megatron_laer.cpu.training import Record
from tests.parity.replay import train_row


@dataclass
class _Rounding:
    """Replacement of the last step's map that rounds its sums."""

    map: Any
    dtype: torch.dtype

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = self.map.collect(rows).to(self.dtype)
        return rounded


def train_exactly(*arguments: Any) -> Record:
    """Train as `train_row` does, with exact sums."""
    with exact_sums():
        return train_row(*arguments)


@contextlib.contextmanager
def exact_sums() -> Iterator[None]:
    from megatron_laer.layer.dispatch.node_dispatcher import NodeTokenDispatcher
    from tests.doubles.deep_ep import HybridEPBuffer

    combine = HybridEPBuffer.combine_with_unpermute
    check = NodeTokenDispatcher._verify_sent
    steps = {
        name: getattr(NodeTokenDispatcher, name)
        for name in ("dispatch_preprocess", "dispatch_postprocess", "combine_preprocess")
    }

    def dispatch_preprocess(self: Any, hidden_states: torch.Tensor, *args: Any) -> Any:
        self._dtype_in_model = hidden_states.dtype
        sent = steps["dispatch_preprocess"](self, hidden_states.float(), *args)
        self._first = _Rounding(self._first, self._dtype_in_model)
        return sent

    def verify_sent(self: Any, hidden_states: torch.Tensor, *args: Any) -> None:
        """Compare the bits that experts get."""
        check(self, hidden_states.to(self._dtype_in_model), *args)

    def dispatch_postprocess(self: Any, *args: Any) -> Any:
        rows, tokens_C, probs = steps["dispatch_postprocess"](self, *args)
        return rows.to(self._dtype_in_model), tokens_C, probs

    def combine_preprocess(self: Any, hidden_states: torch.Tensor) -> Any:
        return steps["combine_preprocess"](self, hidden_states.float())

    def combine_with_unpermute(self: Any, *, hidden: torch.Tensor, **more: Any) -> Any:
        sums_TH, probs_TE = combine(self, hidden=hidden.float(), **more)
        return sums_TH.to(hidden.dtype), probs_TE

    with (
        mock.patch.object(HybridEPBuffer, "combine_with_unpermute", combine_with_unpermute),
        mock.patch.object(NodeTokenDispatcher, "dispatch_preprocess", dispatch_preprocess),
        mock.patch.object(NodeTokenDispatcher, "dispatch_postprocess", dispatch_postprocess),
        mock.patch.object(NodeTokenDispatcher, "combine_preprocess", combine_preprocess),
        mock.patch.object(NodeTokenDispatcher, "_verify_sent", verify_sent),
    ):
        yield
