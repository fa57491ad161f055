"""A program on the labelled device, in place of a card.

`python -m tests.fake_cuda.program MODULE …` runs the module with the arguments behind it. Megatron
has its replacements for the CPU below the labels, and NCCL is gloo. Findings that would be errors
on a card are printed at the end, as races are, and make the status 1.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported

import torch.distributed as dist

from megatron_laer import device
from tests.fake_cuda.allowed import STOCK
from tests.fake_cuda.device import observed
from tests.fake_cuda.findings import WHEN_STEADY
from tests.fake_cuda.kernels import interpreted
from tests.fake_cuda.observing import HOST_GROUPS, side_stream_of_leaves


@contextlib.contextmanager
def gloo_for_nccl() -> Iterator[None]:
    """Make groups of gloo for NCCL; those that are gloo's on a card's machine stay unobserved."""

    def with_gloo(true: Callable[..., Any]) -> Callable[..., Any]:
        names = inspect.signature(true)

        @functools.wraps(true)
        def make(*args: Any, **kwargs: Any) -> Any:
            given = names.bind(*args, **kwargs)
            wanted = given.arguments.get("backend")
            if wanted == "nccl":
                given.arguments["backend"] = "gloo"
            group = true(*given.args, **given.kwargs)
            # A rank outside of the group gets a number.
            if wanted == "gloo" and group != dist.GroupMember.NON_GROUP_MEMBER:
                HOST_GROUPS.add((group or dist.group.WORLD).group_name)
            return group

        return make

    with contextlib.ExitStack() as stack:
        for name in ("init_process_group", "new_group"):
            made = with_gloo(getattr(dist, name))
            for owner in (dist, dist.distributed_c10d):
                stack.enter_context(mock.patch.object(owner, name, made))
        yield
        HOST_GROUPS.clear()


def main() -> int:
    """Run the module; return its status, or 1 for findings."""
    _, module, *_ = sys.argv
    del sys.argv[0]
    device.install_cpu()
    status: Any = 0
    with gloo_for_nccl(), observed(interpreted) as seen, side_stream_of_leaves():
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            status = ended.code
    wrong = [
        f"{kind}: {what}, in {place}"
        for kind, place, what in seen.findings.found
        if kind not in WHEN_STEADY and (kind, place) not in STOCK
    ]
    for line in (*wrong, *seen.checker.races):
        print(f"on the labelled device: {line}", file=sys.stderr)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    return status or int(bool(wrong or seen.checker.races))


if __name__ == "__main__":
    sys.exit(main())
