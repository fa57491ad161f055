"""Layers of a group in one process, for random lives of this rank's restored experts.

`Layer` has a plain account of weights and gradients. This rank is the first of two, whose exchanges
run together.

Legend: E experts, C replica slots per rank, N ranks, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, partial
from typing import Any

import torch
from hypothesis import strategies as st

from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.layer.experts.fp8.payload import PayloadForm, PayloadPacker
from megatron_laer.life import IMPOSSIBLE, Kind, Kinds
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.placed import row_bounds
from megatron_laer.precision import Precision
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.memory import Memory, empty
from megatron_laer.runtime.comm.streams import Steps
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.share import Packers, Share
from tests.doubles import fp8
from tests.loopback import groups_of, run

CPU = torch.device("cpu")
RANKS, SLOTS = 2, 2
# Scales of payloads are aligned, as in all sizes that a recipe takes.
SIZES = ((4, 4), (3, 8), (2, 4))

# Kinds that the layer's share, the layout or the pass has; all others are the run's.
_FOUND = {
    *(Kind.HOMES, Kind.DIRECTIONS, Kind.EMPTY, Kind.FROZEN),
    *(Kind.FIRST, Kind.RERUN, Kind.EVALUATION),
}


# The group: its layouts, the experts of all ranks, and their exchanges.


@cache
def geometry_of(*, at_home: bool) -> Geometry:
    """Return two ranks with three experts in rows, or with two home experts each."""
    if at_home:
        return Geometry(RANKS, 4, 2 + SLOTS, 1, Sharding.EXPERTS)
    return Geometry(RANKS, 3, SLOTS, 1, Sharding.ROWS)


@cache
def layouts_of(*, at_home: bool, may_be_empty: bool) -> list[ExpertLayout]:
    """Return layouts that differ in all slots, in some, or in another rank's only."""
    slots_CN = [[0, 1, 2, 0], [2, 1, 0, 2], [1, 2, 0, 1], [0, 2, 1, 1], [0, 2, 2, 1]]
    if at_home:
        replicas = [[2, 3, 0, 1], [3, EMPTY, 1, 0], [EMPTY, 2, 0, EMPTY], [EMPTY, EMPTY, 0, EMPTY]]
        replicas += [[EMPTY] * 4] * may_be_empty
        slots_CN = [[0, 1, *some[:2], 2, 3, *some[2:]] for some in replicas]
    ranks, capacity, experts = geometry_of(at_home=at_home).shape
    return [ExpertLayout.from_slots(ranks, capacity, experts, slots) for slots in slots_CN]


def packers_of(precision: Precision, size: tuple[int, int]) -> Packers:
    """Return those of a matrix's real payloads, by the definitions of the precision's quantiser."""

    def packer(*, by_columns: bool) -> PayloadPacker:
        form, block = PayloadForm(precision, *size, by_columns=by_columns), precision.row.block
        block = block[::-1] if block is not None and by_columns else block
        return PayloadPacker(form, partial(fp8.quantised, dtype=fp8.E4M3, block=block))

    forward = packer(by_columns=False)
    return forward, packer(by_columns=True) if precision.row.directions > 1 else forward


@dataclass(frozen=True)
class GroupShare(Share):
    """This rank's share, and with it all ranks' ones, whose exchanges run together."""

    peers: tuple[Share, ...] = ()

    def weights(self, memory: Memory = empty) -> Any:
        peers = (replace(peer, packers=self.packers) for peer in self.peers)
        return (super().weights(memory), *(peer.weights() for peer in peers))

    def sums_in_rows(self, sums: tuple[torch.Tensor, ...]) -> Any:
        return (super().sums_in_rows(sums), *(peer.sums_in_rows(()) for peer in self.peers))


class Layer:
    """Experts of one layer on all ranks, and a plain account of their gradients.

    Attributes:
        whole: for each matrix the weights of all experts, [E, R, K].
        expected: for each matrix the sums that main gradients of all experts must have.
        summed: passes whose gradients are in a step's sums.
        last: pass with which gradients were last sent.
    """

    def __init__(self, setup: Setup, number: int) -> None:
        at_home = self.at_home = Kind.HOMES in setup.kinds
        self.setup, self.geometry = setup, geometry_of(at_home=at_home)
        experts = self.geometry.num_experts
        self.random = torch.Generator().manual_seed(number)
        self.whole = [torch.empty(experts, *size) for size in SIZES]
        self.expected = [torch.zeros_like(whole_ERK) for whole_ERK in self.whole]
        self.summed: list[Pass] = []
        self.last: Pass | None = None
        shares = [self._share(rank) for rank in range(RANKS)]
        self.ranks = shares
        mine = shares[0]
        self.share = GroupShare(
            mine.matrices, mine.sizes, mine.num_home, mine.packers, (*shares[1:],)
        )
        self.put_weights()
        self.zero_grads()

    def _share(self, rank: int) -> Share:
        parts = []
        for at, whole_ERK in enumerate(self.whole):
            trains = self.setup.trained[at]
            owned = [
                torch.nn.Parameter(part.clone(), trains) for part in self.parts(whole_ERK, rank)
            ]
            parts.append((*owned,))
        if not self.at_home:
            return Share.of_slices([part for (part,) in parts], [rows for rows, _ in SIZES])
        packers: list[Packers | None] = [None] * len(SIZES)
        if self.setup.precision.is_quantised:
            packers[:2] = [packers_of(self.setup.precision, size) for size in SIZES[:2]]
        return Share.of_homes(parts, packers)

    def parts(self, whole_ERK: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Return a rank's part of all experts: rows of each, or its home experts."""
        if self.at_home:
            home = self.geometry.home_slots
            return [*whole_ERK[rank * home : (rank + 1) * home]]
        first, last = row_bounds(whole_ERK.shape[1], RANKS)[rank : rank + 2]
        return [whole_ERK[:, first:last]]

    def owned(self) -> Iterator[tuple[torch.nn.Parameter, int, int, int]]:
        """Yield each parameter of each rank, with its matrix, rank and place."""
        for rank, share in enumerate(self.ranks):
            for at, matrix in enumerate(share.matrices):
                for place, parameter in enumerate(matrix):
                    yield parameter, at, rank, place

    @torch.no_grad()
    def put_weights(self) -> None:
        for whole_ERK in self.whole:
            whole_ERK.normal_(generator=self.random)
        for parameter, at, rank, place in self.owned():
            parameter.copy_(self.parts(self.whole[at], rank)[place])

    def update(self) -> None:
        """Change all weights, as an optimizer does."""
        self.put_weights()

    def zero_grads(self) -> None:
        self.expected = [torch.zeros_like(sums_ERK) for sums_ERK in self.expected]
        for parameter, _, rank, _ in self.owned():
            parameter.grad = None
            if rank > 0 or self.setup.has_main_grads:
                parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]

    def slots_of(self, layout: ExpertLayout, rank: int) -> list[int]:
        """Return the experts of a rank's replica slots."""
        slots_NC = layout.slot_expert_S.reshape(RANKS, -1)[:, self.geometry.home_slots :]
        return [int(expert) for expert in slots_NC[rank]]

    def check_weights(
        self, matrix_CRK: torch.Tensor, layout: ExpertLayout, at: int, *, backward: bool
    ) -> None:
        packers = self.share.packers[at]
        for slot, expert in enumerate(self.slots_of(layout, 0)):
            if expert != EMPTY:
                wanted_RK = self.whole[at][expert]
                wanted_RK = packers[backward].pack(wanted_RK) if packers else wanted_RK
                assert torch.equal(matrix_CRK[slot], wanted_RK), (
                    f"slot {slot} has no weights of expert {expert}, matrix {at}: "
                    f"{matrix_CRK[slot].tolist()} is not {wanted_RK.tolist()}"
                )

    def expect(self, grads: dict[int, torch.Tensor], layout: ExpertLayout) -> None:
        """Add the gradients of this rank's slots in one pass, by matrix, to the account."""
        for at, grads_CRK in grads.items():
            for slot, expert in enumerate(self.slots_of(layout, 0)):
                if expert != EMPTY:
                    self.expected[at][expert] += grads_CRK[slot]

    def expect_peers(self, layout: ExpertLayout) -> None:
        """Add ones for each slot of other ranks, which they send with each reduce."""
        for at in self.share.trained_at:
            for rank in range(1, RANKS):
                for expert in self.slots_of(layout, rank):
                    if expert != EMPTY:
                        self.expected[at][expert] += 1

    def check_grads(self) -> None:
        for parameter, at, rank, place in self.owned():
            if not parameter.requires_grad:
                continue
            wanted = self.parts(self.expected[at], rank)[place]
            grad = getattr(parameter, "main_grad", parameter.grad)
            grad = torch.zeros_like(parameter) if grad is None else grad
            assert torch.equal(grad, wanted), (
                f"rank {rank}, matrix {at}: gradients {grad.tolist()} are not {wanted.tolist()}"
            )


class GroupExchange(Exchange):
    """Exchange of this rank, which runs together with all other ranks' parts."""

    def __init__(self, *, at_home: bool) -> None:
        way = way_of(geometry_of(at_home=at_home), ExchangeAlgorithm.FLAT)
        mine, *others = groups_of(RANKS, 1)
        super().__init__(mine, [way])
        self._peers = [Exchange(groups, [way]) for groups in others]

    def restore_steps(self, owned: Any, index: Any, matrices: Any, /, **options: Any) -> Steps:
        restores = [super().restore_steps, *(peer.restore_steps for peer in self._peers)]

        def restore(index: LayoutIndex, outs: list[torch.Tensor], before: Any = None) -> None:
            ranks = zip(restores, owned, outs, strict=True)
            run([each(has, index, matrices, out=out, before=before) for each, has, out in ranks])

        out: torch.Tensor = options["out"]
        before = options.get("before")
        theirs = [torch.empty_like(out) for _ in self._peers]
        if before is not None:  # other ranks' slots as they were
            restore(before, [torch.empty_like(out), *theirs])
        restore(index, [out, *theirs], before)
        yield from ()
        return out

    def reduce_steps(
        self, grads_CRK: torch.Tensor, index: Any, matrices: Any, /, **options: Any
    ) -> Steps:
        reduces = [super().reduce_steps, *(peer.reduce_steps for peer in self._peers)]
        whole = [grads_CRK, *(torch.ones_like(grads_CRK) for _ in self._peers)]
        wire = options["wire_dtype"]
        ranks = zip(reduces, whole, options["add_to"], strict=True)
        run([each(has, index, matrices, add_to=to, wire_dtype=wire) for each, has, to in ranks])
        yield from ()
        return grads_CRK


# A life, and its passes.


@dataclass(frozen=True)
class Setup:
    """Kinds of a life, and all else that stays the same in it.

    Attributes:
        chunks: of the model, each with the numbers of its layers.
        kept: the number of layers whose weights fit into the memory to keep them.
        hurries: probability that a stream does its work at once.
        in_blocks: whether payloads of home experts have one scale per block, or one; None for none.
        at_block: whether checkpoints are around transformer layers, not around MoE layers.
    """

    kinds: Kinds
    chunks: tuple[tuple[int, ...], ...] = ((0, 1),)
    trained: tuple[bool, ...] = (True, True, True)
    has_main_grads: bool = True
    inputs_train: bool = True
    probs_train: bool = True
    kept: float = 0
    foresees: bool = True
    hurries: float = 0.5
    at_block: bool = True
    seed: int = 0
    in_blocks: bool | None = None

    @property
    def precision(self) -> Precision:
        """Return that of home experts: by `in_blocks`, unless directions have their own."""
        if Kind.DIRECTIONS in self.kinds:
            return Precision.MXFP8
        if Kind.HOMES not in self.kinds or self.in_blocks is None:
            return Precision.PARAMETERS
        return Precision.BLOCKWISE if self.in_blocks else Precision.TENSORWISE

    @property
    def of_run(self) -> Kinds:
        return self.kinds - _FOUND

    @property
    def checkpoints(self) -> bool:
        """Return whether layers are checkpointed; Megatron's combined 1F1B does not."""
        return bool(self.kinds & {Kind.FIRST, Kind.RERUN}) and Kind.PARTS not in self.kinds


_CHUNKS = (
    ((0,),),
    ((0, 1),),
    ((0, 0),),
    ((0, 1, 1),),
    ((0,), (1,)),
    ((0, 1), (2, 3)),
    ((0, 1, 2),),
)


@st.composite
def setups(draw: st.DrawFn, /, **fixed: Any) -> Setup:
    bools = st.booleans()
    kinds = draw(st.sets(st.sampled_from(Kind)).map(frozenset).filter(is_possible))
    if kinds & {Kind.DIRECTIONS, Kind.EMPTY}:
        kinds |= {Kind.HOMES}  # rows have neither payloads nor empty slots
    trains = st.tuples(bools, bools, bools)
    drawn = Setup(
        kinds,
        draw(st.sampled_from(_CHUNKS)),
        draw(trains) if Kind.FROZEN in kinds else (True, True, True),
        draw(bools) or Kind.STEP in kinds,
        draw(bools),
        draw(bools),
        draw(st.sampled_from([0, 0.9, 1, 2, 20])),
        draw(bools),
        draw(st.sampled_from([0.0, 0.5, 1.0])),
        draw(bools),
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from([None, False, True])),
    )
    return replace(drawn, **fixed)


def is_possible(kinds: Kinds) -> bool:
    """Return whether a run may have passes of these kinds; two of a checkpoint are two passes."""
    of_run = kinds - _FOUND
    return not any(pair <= of_run for pair in IMPOSSIBLE)


class Stage(Enum):
    """Progress of a pass's gradients."""

    NONE = 0
    COMPUTED = 1
    LEFT = 2
    ARRIVED = 3


@dataclass(eq=False)
class Pass:
    """One pass of a layer: its experts, its layout, and the gradients that its backward writes."""

    layer: Layer
    state: LayerState
    restored: RestoredExperts
    layout: ExpertLayout
    unused: frozenset[int]
    grads: dict[int, torch.Tensor]
    has_graph: bool = False
    stage: Stage = Stage.NONE

    @property
    def has_replicas(self) -> bool:
        ranks = range(RANKS)
        slots = (self.layer.slots_of(self.layout, rank) for rank in ranks)
        return any(expert != EMPTY for each in slots for expert in each)

    @property
    def has_grads(self) -> bool:
        return self.has_graph and self.has_replicas and any(self.layer.setup.trained)


class Product(torch.autograd.Function):
    """Product with a matrix, which checks the weights instead, and writes the pass's gradients."""

    @staticmethod
    def forward(ctx, tokens, _, one, at):  # type: ignore[no-untyped-def]
        ctx.one, ctx.at = one, at
        one.layer.check_weights(one.restored.weights.matrix(at), one.layout, at, backward=False)
        return tokens * 1

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        one, at = ctx.one, ctx.at
        tokens_need, weights_need = ctx.needs_input_grad[:2]
        if tokens_need:
            matrix_CRK = one.restored.backward_weights.matrix(at)
            one.layer.check_weights(matrix_CRK, one.layout, at, backward=True)
        if not weights_need:
            return grad, None, None, None
        grads_CRK = one.restored.weight_grads(at, lambda out: out.copy_(one.grads[at]))
        return (grad if tokens_need else None), grads_CRK, None, None
