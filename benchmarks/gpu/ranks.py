"""Parts on several cards: one process for each rank, as torchrun starts them.

A part trains again and again in the same processes. Each run has its own process group and thus
needs its own rendezvous address, which rank 0 distributes through torchrun's store.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed import TCPStore

from benchmarks.end_to_end_cases import Size
from benchmarks.gpu.recipe import LOCAL, has_transformer_engine, recipe_flags
from benchmarks.gpu.report import NO_CARD, Part, finish
from benchmarks.gpu.timing import Budget

# Sizes at which experts dominate a step, yet many runs fit. `experts` is per rank.
_CARD = Size(4, 2048, 4096, 4, 4, 4096, 1, warm_up=2, steps=8, repeats=1)
_DRY = Size(1, 32, 48, 4, 2, 16, 2, warm_up=1, steps=4, repeats=1)


class Ranks:
    """State that all ranks of a part share.

    `data` is the prefix of the training data; ranks leave files for each other in `folder`.
    """

    def __init__(self, seconds: float, data: str, folder: Path, *, dry: bool) -> None:
        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        self.data, self.folder, self.dry = data, folder, dry
        self._budget = Budget(seconds)
        self._runs = 0
        self._store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False
        )

    def may_run(self) -> bool:
        """Return on all ranks alike whether there is time for a run, and set its new address."""
        key = f"gpu check {self._runs}"
        self._runs += 1
        if self.rank == 0:
            self._store.set(key, "" if self._budget.spent else _free_port())
        port = self._store.get(key).decode()
        if port:
            os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=port)
        return bool(port)

    @property
    def model(self) -> Size:
        """Return the model's sizes; its experts are those of each rank."""
        return _DRY if self.dry else _CARD

    def flags(self, size: Size, ranks: int) -> list[str]:
        """Return the flags of a run with the recipe, in groups of `ranks`."""
        return size.flags(self.data, ranks, recipe_flags(dry=self.dry))

    def part(self) -> Part:
        """Return a part without results."""
        is_local = not (self.dry or has_transformer_engine(dry=False))
        return Part(left_out=[LOCAL] if is_local else [])


def run_ranks_part(
    doc: str | None, measure: Callable[[Ranks], Part], arguments: Sequence[str] | None = None
) -> int:
    """Run one part on this rank; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="what it may take")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, help="where rank 0 writes the tables")
    parser.add_argument("--data", required=True, help="prefix of a dataset")
    options = parser.parse_args(arguments)
    from megatron_laer import device, launch

    launch.prepare()
    if device.cpu_installed():
        print(NO_CARD, file=sys.stderr)
        return 2
    folder = Path(options.data).parent
    ranks = Ranks(options.seconds, options.data, folder, dry=options.dry_run)
    part = measure(ranks)
    if ranks.rank == 0:
        finish(part, options.json, options.dry_run)
    return 0


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("", 0))
        return str(found.getsockname()[1])
