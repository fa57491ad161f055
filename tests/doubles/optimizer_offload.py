"""Double of the two devices of an optimizer that is offloaded in part."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch


class _OnHost(torch.Tensor):
    is_cuda = False


def fix() -> None:
    """Let optimizers move parameters from a GPU to the host, all of which are on the CPU."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    stock = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    # The stock method copies only parameters on a GPU to the host, and expects some of each kind.
    # Here all count as on the GPU until it moves them.
    @functools.wraps(stock)
    def groups(self: Any, fraction: float) -> Any:
        with (
            mock.patch.object(torch.Tensor, "is_cuda", True),
            mock.patch.object(torch.Tensor, "cpu", lambda tensor: tensor.as_subclass(_OnHost)),
        ):
            found = stock(self, fraction)
        for group in found[0]:
            for parameter in group["params"]:
                parameter.__class__ = torch.Tensor
        return found

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = groups
