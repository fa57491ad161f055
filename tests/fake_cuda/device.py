"""The labelled device: all its parts together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from tests.fake_cuda import findings, labels, names, streams
from tests.fake_cuda.clocks import Checker
from tests.fake_cuda.findings import Findings
from tests.fake_cuda.kernels import Kernels, Launches, replaced_by_torch
from tests.fake_cuda.oracle import Oracle, Watcher

H100, B200 = (9, 0), (10, 0)


class Device(NamedTuple):
    """Records of a labelled device."""

    findings: Findings
    launches: Launches


@contextlib.contextmanager
def labelled_device(
    checker: Checker,
    watcher: Watcher,
    *,
    kernels: Kernels = replaced_by_torch,
    capability: tuple[int, int] = H100,
) -> Iterator[Device]:
    """Let the card be labels inside the block, in this thread.

    Args:
        checker: gets the orders of streams.
        watcher: gets all operations.
        kernels: treatment of Triton's kernels, a function of `kernels.py`.
    """
    device = Device(findings.renew(), Launches())
    with (
        streams.replaced(checker),
        kernels(device.launches),
        names.replaced(capability),
        Oracle(watcher),
        _shapes_of_shards(),
    ):
        yield device


@contextlib.contextmanager
def _shapes_of_shards() -> Iterator[None]:
    """Let DTensor work out shapes without labels, as it expects its fake tensors' own devices."""
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def without_labels(*args: Any, **kwargs: Any) -> Any:
        with labels.suspended(), _disable_current_modes():
            return propagate(*args, **kwargs)

    with mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", without_labels):
        yield
