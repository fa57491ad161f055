"""Check of the launcher's variables for several ranks, without torch."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_laer.runtime.comm import launcher

START = "start at least two with `torchrun --nproc-per-node 2 -m megatron_laer calibrate FILE`"


def check_launched(environment: Mapping[str, str]) -> None:
    """Refuse to measure without a launcher's ranks."""
    launcher.check_ranks(environment)
    if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        raise ValueError(f"exchanges need several ranks; {START}")
