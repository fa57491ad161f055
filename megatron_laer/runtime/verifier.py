"""Checks of a run on itself, before the optimizer uses their subject: weights and gradients.

The ranks of a group choose the same ones, from the step's number and the kind of exchange alone.
What compute and the optimizer read is summed up then and there, so that a late, stale or
overwritten slot is seen. One gather of a step's sums compares slots with owners.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_laer.choices import Verification
from megatron_laer.files.checks import reason
from megatron_laer.files.writing import free_name, write_file
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.collectives import add_up, gather_integers
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.comm.streams import used_here
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.main_grads import hook_stream
from megatron_laer.runtime.weights.share import Owned, Share
from megatron_laer.runtime.weights.slots import ExchangeStreams, RestoredWeights
from megatron_laer.telemetry.log import say
from megatron_laer.verify.checked import Checked, VerificationError, described, end_with_status
from megatron_laer.verify.gradients import Roundings
from megatron_laer.verify.gradients import differences as of_gradients
from megatron_laer.verify.sums import bit_sums, launch_kernels, signed_sums
from megatron_laer.verify.tokens import Bound, PassTokens, differences_back, differences_out
from megatron_laer.verify.weights import differences as of_weights
from megatron_laer.version import __version__

logger = logging.getLogger(__name__)

# Steps after a start or a resume of which all is checked.
_FIRST_STEPS = 2
_DUMP = "fsep-verify-{}.npz"
_NUMPY = {torch.int64: np.int64, torch.float64: np.float64}


@dataclass
class _Check:
    """Sums of this rank for one check.

    Attributes:
        of_slots: all ranks' are gathered.
        of_owned: all ranks' are added up.
        differences: yields rank and description of what is wrong by these.
    """

    checked: Checked
    of_slots: torch.Tensor
    of_owned: torch.Tensor
    differences: Callable[[Any, Any], Iterator[tuple[int, str]]]


@dataclass
class Verifier:
    """Checks of one rank, as `--fsep-set verify` asks for them.

    Attributes:
        dispatch: name of the tokens' way.
        checks: restores that all ranks read, and reduces, that were compared since the start.
    """

    setting: Verification
    groups: FSEPGroups
    streams: ExchangeStreams
    device: torch.device
    dispatch: str
    checks: int = 0

    def __post_init__(self) -> None:
        self._layers: frozenset[str] = frozenset()  # of which all is checked in this step
        self._wrong: set[str] = set()
        self._is_in_step = False
        self._step = self._steps = 0
        self._known: set[tuple[object, ...]] = set()  # kinds of exchanges
        self._checks: list[_Check] = []
        self._number: Counter[tuple[str, str]] = Counter()
        # Of what each rank owns, [E, M], by share; summed up before an optimizer may change it.
        self._owned: dict[int, torch.Tensor] = {}

    def start(self) -> None:
        if self.setting.is_on:
            launch_kernels(self.device)
            self.streams.observers.append(self)

    def close(self) -> None:
        if self in self.streams.observers:
            self.streams.observers.remove(self)

    def begin_step(self, step: int, layers: Sequence[str]) -> None:
        """Begin a step, in which these layers are checked: all, one of them or none."""
        setting, chosen = self.setting, list[str]()
        if setting.all or (setting.first and self._steps < _FIRST_STEPS):
            chosen = [*layers]
        elif setting.interval is not None and layers and step % setting.interval == 0:
            chosen = [layers[step // setting.interval % len(layers)]]
        self._layers, self._step = frozenset(chosen), step
        self._is_in_step = setting.is_on
        self._steps += 1
        if self._wrong and self.groups.rank == 0:
            wrong = ", ".join(sorted(self._wrong))
            logger.warning("FSEP verify, step %d: %s has stock's placement", step, wrong)

    def has_found(self, layer: str) -> bool:
        """Return whether a finding has put a layer under stock's placement."""
        return layer in self._wrong

    def before_optimizer(self, *, can_skip: bool) -> bool:
        """Check what the step has exchanged, since all its gradients are complete.

        Args:
            can_skip: whether the caller can leave out the optimizer's step.

        Returns:
            Whether it must, on all ranks of the world.
        """
        return self._check("before the optimizer's step", can_skip=can_skip)

    def end_step(self) -> None:
        """Check the exchanges of a loop that completes no gradients by Megatron's function."""
        self._check("at the end of the step", can_skip=False)
        self._is_in_step = False

    def reads(
        self, weights: RestoredWeights, matrices: Sequence[torch.Tensor], direction: str
    ) -> None:
        """Sum up the bits of weights that compute is about to read."""
        share, placed = weights.share, weights.index.placed
        of_layer = weights.name, direction, placed, share.sizes, share.form.parts
        if (checked := self._chosen(*of_layer)) is None:
            return
        if id(share) not in self._owned:
            every, experts = range(len(share.sizes)), range(placed.geometry.num_experts)
            of = every, Owned.weight, bit_sums, placed, self.groups.rank, experts
            self._owned[id(share)] = share.summed(*of)
        of_slots = torch.stack([bit_sums(of) for of in matrices], dim=1)
        differences = partial(of_weights, checked)
        self._checks.append(_Check(checked, of_slots, self._owned[id(share)], differences))

    def sends(
        self,
        name: str,
        share: Share,
        index: LayoutIndex,
        slots_CRK: torch.Tensor,
        sums: Sequence[torch.Tensor],
    ) -> Callable[[], None]:
        """Sum up gradients that leave, and what they are added to, before and after."""
        placed, exchange = index.placed, self.streams.exchange
        sizes = [share.sizes[at] for at in share.trained_at]
        if (checked := self._chosen(name, "reduce", placed, sizes, slots_CRK.dtype)) is None:
            return lambda: None
        tensor = share.sums_of(sums)
        into = tensor(share.owned[share.trained_at[0]][0]).dtype
        wire = exchange.wire_dtype(share.grads_form.dtype)
        roundings = Roundings(wire, into, len(exchange.choose(placed).links))
        parts = share.grads_form.parts_of(slots_CRK)
        of_slots = torch.stack([signed_sums(part) for part in parts], dim=1)
        experts = {*placed.replica_expert_S[placed.filled_S].tolist()}
        of = share.trained_at, tensor, signed_sums, placed, self.groups.rank, experts
        of_owned = partial(share.summed, *of)
        before = of_owned()

        def arrived() -> None:
            # Where hooks of the parameters, and so the optimizer, read them.
            stream = None if sums else hook_stream(share.trained)
            with torch.cuda.stream(stream):
                owned = torch.stack([before, of_owned()], dim=2)
            if stream is not None:
                torch.cuda.current_stream(stream.device).wait_stream(stream)
                used_here(owned)
            differences = partial(of_gradients, checked, roundings)
            self._checks.append(_Check(checked, of_slots, owned, differences))

        return arrived

    def tokens(self, layer: str, plan: MicrobatchPlan) -> PassTokens | None:
        """Return what sums up the tokens of a forward pass, if it is checked."""
        placed, way = plan.restored.index.placed, self.dispatch
        out = self._chosen(layer, "dispatch", placed, (), None, way)
        if out is None:
            return None
        back = replace(out, direction="combine")

        def done(
            of_slots: torch.Tensor,
            of_tokens: torch.Tensor,
            of_groups: torch.Tensor,
            bound: Bound,
        ) -> None:
            self._checks.append(_Check(out, of_slots, of_tokens, partial(differences_out, out)))
            returned = partial(differences_back, bound)
            self._checks.append(_Check(back, of_groups[:0], of_groups, returned))

        return PassTokens(plan.quotas.tokens_C, plan.rows, used_here, done)

    def _chosen(
        self,
        layer: str,
        direction: str,
        placed: Placed,
        sizes: Any,
        kind: Any,
        way: str | None = None,
    ) -> Checked | None:
        """Return the subject of a check, if this use of an exchange is one."""
        if not self._is_in_step:
            return None  # an evaluation
        way = way or self.streams.exchange.choose(placed).name
        kind = way, direction, kind
        is_new = self.setting.first and kind not in self._known
        if layer not in self._layers and not is_new:
            return None
        self._known.add(kind)
        number = self._number[layer, direction]
        self._number[layer, direction] += 1
        return Checked(layer, direction, number, way, placed, sizes, self.groups.ranks)

    def _check(self, when: str, *, can_skip: bool) -> bool:
        """Compare what was summed up since the last check. Collective over the group.

        Returns:
            Whether differences were found in layers that stock's placement may help.

        Raises:
            VerificationError: on every rank of the group, with the first differences.
        """
        (checks, self._checks), self._owned = (self._checks, []), {}
        self._number.clear()
        if not checks:
            return False
        of_slots, of_owned = self._of_all_ranks(checks)
        texts, ranks, layers = [], set[int](), set[str]()
        for check, *sums in zip(checks, of_slots, of_owned, strict=True):
            if found := [*check.differences(*sums)]:
                ranks |= {rank for rank, _ in found}
                layers.add(check.checked.layer)
                texts.append(described(check.checked, [text for _, text in found]))
        if texts:
            is_named = self.groups.rank in ranks
            not_written = self._dump(checks, of_slots, of_owned) if is_named else ""
            goes_on = self.setting.warns and can_skip and self._wrong.isdisjoint(layers)
            ends = (
                f"The step is skipped, and {', '.join(sorted(layers))} has stock's placement from "
                "the next one on"
                if goes_on
                else f"Every rank stops, {when}"
            )
            text = (
                f"FSEP verify, step {self._step}: {texts[0]}"
                + (f"; and {len(texts) - 1} more exchanges" if len(texts) > 1 else "")
                + f". {ends}; the named ranks write {_DUMP.format('RANK')}, with layouts and sums, "
                f"to {Path.cwd()}{not_written}"
            )
            if not goes_on:
                end_with_status()
                raise VerificationError(text)
            self._wrong |= layers
            if self.groups.rank == 0 or is_named:
                logger.warning("%s", text)
            return True
        if not self.checks and self.groups.rank == self.groups.index == 0:
            numbers = Counter(check.checked.direction for check in checks)
            restores = numbers["forward"] + numbers["backward"]
            say(
                f"FSEP verified {restores} restores, {numbers['reduce']} reduces and the tokens of "
                f"{numbers['dispatch']} passes of step {self._step}: each slot has its owner's "
                "bits, owners add up what slots send, and each token reaches its experts and "
                "returns"
            )
        self.checks += len(checks)
        return False

    def _of_all_ranks(self, checks: Sequence[_Check]) -> tuple[list[Any], list[Any]]:
        """Return all ranks' sums of slots, `[N, …]`, and the sums over ranks of owned ones."""
        parts = [used_here(check.of_slots) for check in checks]
        bits = torch.cat([part.flatten().view(torch.int64) for part in parts])
        gathered = gather_integers(bits, self.groups, self.device)
        ends = np.cumsum([part.numel() for part in parts])[:-1]
        of_slots = [
            np.ascontiguousarray(of).view(_NUMPY[part.dtype]).reshape(len(of), *part.shape)
            for of, part in zip(np.split(gathered, ends, axis=1), parts, strict=True)
        ]
        owned: dict[torch.dtype, list[torch.Tensor]] = {}
        for check in checks:
            owned.setdefault(check.of_owned.dtype, []).append(used_here(check.of_owned))
        added = {dtype: iter(add_up(parts, self.groups)) for dtype, parts in owned.items()}
        return of_slots, [next(added[check.of_owned.dtype]) for check in checks]

    def _dump(self, checks: Sequence[_Check], of_slots: list[Any], of_owned: list[Any]) -> str:
        """Write layouts and sums of all checks since the last ones; return why it cannot be."""
        content: dict[str, Any] = {"version": __version__, "step": self._step}
        for at, check in enumerate(checks):
            content[f"of_{at}"] = str(check.checked)
            content[f"layout_{at}"] = check.checked.placed.layout.slot_expert_S
            content[f"slots_{at}"], content[f"owned_{at}"] = of_slots[at], of_owned[at]
        written = io.BytesIO()
        np.savez(written, **content)
        # Neither over an earlier finding's nor through a link that others have put there.
        path = free_name(Path(_DUMP.format(self.groups.ranks[self.groups.rank])))
        try:
            write_file(path, written.getvalue())
        except OSError as error:
            return f"; {path} cannot be written: {reason(error)}"
        return ""
