"""Checks of a run on itself, before the optimizer uses their subject: restored weights.

The ranks of a group choose the same ones, from the step's number and the kind of exchange alone.
What compute reads is summed up then and there, so that a late, stale or overwritten slot is seen.
One gather of a step's sums compares it with the owners.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_laer.arrays import Int64
from megatron_laer.choices import Verify
from megatron_laer.runtime.comm.collectives import gather_integers
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.weights.share import Share
from megatron_laer.runtime.weights.slots import ExchangeStreams, RestoredWeights
from megatron_laer.verify.sums import bit_sums, launch_kernel
from megatron_laer.verify.weights import Read, VerificationError, described, differences
from megatron_laer.version import __version__

# Steps after a start or a resume of which all is checked.
_FIRST_STEPS = 2
_DUMP = "fsep-verify-{}.npz"

# Restored weights, their share, and the sums of bits of their slots, [C, M].
_Summed = tuple[Read, Share, torch.Tensor]


@dataclass
class Verifier:
    """Checks of one rank, as `--fsep-set verify` asks for them.

    Attributes:
        checks: restores that all ranks read and that were compared, since the start.
    """

    setting: Verify | int
    groups: FSEPGroups
    streams: ExchangeStreams
    device: torch.device
    checks: int = 0

    def __post_init__(self) -> None:
        self._layers: frozenset[str] = frozenset()  # of which all is checked in this step
        self._is_in_step = False
        self._step = self._steps = 0
        self._known: set[tuple[object, ...]] = set()  # kinds of exchanges
        self._reads: list[_Summed] = []
        # Of what each rank owns, [E, M], by share; summed up before an optimizer may change it.
        self._owned: dict[int, torch.Tensor] = {}
        self._hook: Any = None

    def start(self) -> None:
        if self.setting != Verify.OFF:
            launch_kernel(self.device)
            self.streams.readers.append(self._read)
            # Of any loop, and of any optimizer: Megatron's end in torch's.
            before = "before the optimizer's step"
            self._hook = register_optimizer_step_pre_hook(lambda *_: self._check(before))

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self.streams.readers.remove(self._read)
            self._hook = None

    def begin_step(self, step: int, layers: Sequence[str]) -> None:
        """Begin a step, in which these layers are checked: all, one of them or none."""
        chosen: Sequence[str] = ()
        if self.setting == Verify.ALL or self._steps < _FIRST_STEPS:
            chosen = layers
        elif isinstance(self.setting, int) and layers and step % self.setting == 0:
            turn = step // self.setting % len(layers)
            chosen = layers[turn : turn + 1]
        self._layers, self._step, self._is_in_step = frozenset(chosen), step, True
        self._steps += 1

    def end_step(self) -> None:
        """Check what no optimizer of torch's has checked, and end the step."""
        self._check("at the end of the step")
        self._is_in_step = False

    def _read(self, weights: RestoredWeights, matrices: Sequence[torch.Tensor]) -> None:
        """Sum up the bits of weights that compute is about to read."""
        if not self._is_in_step:
            return  # an evaluation
        share, placed = weights.share, weights.index.placed
        is_in_backward = torch._C._current_graph_task_id() != -1
        direction = "backward" if is_in_backward else "forward"
        way = self.streams.exchange.choose(placed).name
        kind = way, direction, *share.form.parts
        if weights.name not in self._layers and kind in self._known:
            return
        self._known.add(kind)
        number = Counter((read.layer, read.direction) for read, *_ in self._reads)
        read = Read(weights.name, direction, number[weights.name, direction], way, placed)
        if id(share) not in self._owned:
            self._owned[id(share)] = share.bit_sums(placed, self.groups.rank)
        self._reads.append((read, share, torch.stack([bit_sums(of) for of in matrices], dim=1)))

    def _check(self, when: str) -> None:
        """Compare what was read since the last check. Collective over the group.

        Raises:
            VerificationError: on every rank of the group, with the first differences.
        """
        (reads, owned), self._reads, self._owned = (self._reads, self._owned), [], {}
        if not reads:
            return
        sums = [*(sums_CM for *_, sums_CM in reads), *owned.values()]
        gathered = gather_integers(
            torch.cat([part.flatten() for part in sums]), self.groups, self.device
        )
        ends = np.cumsum([part.numel() for part in sums])
        found = [
            part.reshape(self.groups.size, *of.shape)
            for part, of in zip(np.split(gathered, ends[:-1], axis=1), sums, strict=True)
        ]
        owned_NEM = dict(zip(owned, found[len(reads) :], strict=True))
        texts, ranks = [], set[int]()
        for (read, share, _), slots_NCM in zip(reads, found, strict=False):
            wrong = [*differences(read, slots_NCM, owned_NEM[id(share)])]
            if wrong:
                ranks |= {rank for rank, *_ in wrong}
                texts.append(described(read, wrong, share.sizes, self.groups.ranks))
        if texts:
            if self.groups.rank in ranks:
                self._dump(reads, found)
            raise VerificationError(
                f"FSEP verify, step {self._step}: {texts[0]}"
                + (f"; and {len(texts) - 1} more restores" if len(texts) > 1 else "")
                + f". Every rank stops, {when}; the named ranks have written "
                f"{_DUMP.format('RANK')}, with layouts and sums, to {Path.cwd()}"
            )
        if not self.checks and self.groups.rank == self.groups.index == 0:
            print(
                f"FSEP verified {len(reads)} restores of step {self._step}: each slot has its "
                "owner's bits",
                flush=True,
            )
        self.checks += len(reads)

    def _dump(self, reads: Sequence[_Summed], found: Sequence[Int64]) -> None:
        """Write layouts and sums of all restores of the step."""
        content: dict[str, Any] = {"version": __version__, "step": self._step}
        for at, ((read, *_), slots_NCM) in enumerate(zip(reads, found, strict=False)):
            content[f"read_{at}"] = f"{read.layer}, {read.direction} {read.number}, {read.way}"
            content[f"layout_{at}"] = read.placed.layout.slot_expert_S
            content[f"slots_{at}"] = slots_NCM
        for at, owned_NEM in enumerate(found[len(reads) :]):
            content[f"owned_{at}"] = owned_NEM
        np.savez(_DUMP.format(self.groups.ranks[self.groups.rank]), **content)
