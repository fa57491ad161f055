"""The labelled device: all its parts together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from tests.fake_cuda import findings, names, streams
from tests.fake_cuda.clocks import Checker
from tests.fake_cuda.findings import Findings
from tests.fake_cuda.kernels import Kernels, Launches, replaced_by_torch
from tests.fake_cuda.oracle import Oracle, Watcher

H100 = 9, 0


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
    ):
        yield device
