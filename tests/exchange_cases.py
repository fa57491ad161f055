"""Random exchanges, with the results that plain code finds without communication.

Legend: N ranks, E experts, C replica slots per rank. R rows of an expert, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_laer.choices import Sharding
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Way, ways_of
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.placed import Placed, row_bounds
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index

COLUMNS = 3
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Experts of a group, their layouts, and the dtypes of an exchange.

    Attributes:
        matrices: of an expert, each with its rows, and the rows of K columns that each of them is.
        dtype: of weights; bytes of a payload or a float.
        wire: of sums between hops; None for the gradients' own.
        main: of main gradients.
    """

    geometry: Geometry
    way: Way
    matrices: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    grad: torch.dtype
    wire: torch.dtype | None
    main: torch.dtype
    seed: int

    @classmethod
    def draw(cls, seed: int) -> Case:
        rng = np.random.default_rng(seed)
        node_size, nodes = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        num_ranks = node_size * nodes
        at_home = num_ranks > 1 and rng.random() < 0.5
        home, least = (int(rng.integers(1, 4)), 1) if at_home else (0, 0)
        experts = home * num_ranks or int(rng.integers(1, 3 * num_ranks + 1))
        least += home or -(-experts // num_ranks)
        capacity = int(rng.integers(least, min(least + 3, experts) + 1))
        sharding = Sharding.EXPERTS if at_home else Sharding.ROWS
        geometry = Geometry(num_ranks, experts, capacity, node_size, sharding)
        ways = ways_of(geometry)
        return cls(
            geometry,
            ways[int(rng.integers(len(ways)))],
            tuple(
                (int(rng.choice([1, num_ranks, 2 * num_ranks, rng.integers(1, 3 * num_ranks)])), of)
                for of in rng.permutation(3)[: rng.integers(1, 4)] + 1
            ),
            dtype=[*FLOATS, torch.uint8][int(rng.integers(4))],
            grad=FLOATS[int(rng.integers(3))],
            wire=[None, *FLOATS][int(rng.integers(4))],
            main=FLOATS[int(rng.integers(3))],
            seed=seed,
        )

    @property
    def rows(self) -> int:
        return sum(rows * width for rows, width in self.matrices)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return the rows and columns of the matrices."""
        return [(rows, width * COLUMNS) for rows, width in self.matrices]

    def block_rows(self, num_blocks: int) -> list[int]:
        """Return the rows of an expert in each block of its matrices."""
        bounds = [(row_bounds(rows, num_blocks), width) for rows, width in self.matrices]
        return [
            sum((of[block + 1] - of[block]) * width for of, width in bounds)
            for block in range(num_blocks)
        ]

    def new_slots(self) -> torch.Tensor:
        return torch.empty(self.geometry.replica_slots, self.rows, COLUMNS, dtype=self.dtype)

    def placed(self, step: int) -> Placed:
        return Placed(self.geometry.random_layout((self.seed, step)), self.geometry)

    def index(self, step: int) -> LayoutIndex:
        return layout_index(self.placed(step), CPU)

    def random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return drawn.mul(50).abs().to(dtype) if dtype == torch.uint8 else drawn.to(dtype)

    @cached_property
    def whole_ERK(self) -> torch.Tensor:
        return self.random(self.geometry.num_experts, self.rows, COLUMNS, dtype=self.dtype)

    @cached_property
    def grads_NCRK(self) -> torch.Tensor:
        slots = self.geometry.num_ranks, self.geometry.replica_slots
        return self.random(*slots, self.rows, COLUMNS, dtype=self.grad)

    def owned_by(self, rank: int, whole_ERK: torch.Tensor) -> list[torch.Tensor]:
        """Return a rank's share of all experts, as an exchange takes it."""
        home, owned, begin = self.geometry.home_slots, [], 0
        for rows, width in self.matrices:
            matrix_ERK = whole_ERK[:, begin : begin + rows * width]
            begin += rows * width
            if home:
                owned += matrix_ERK[rank * home : (rank + 1) * home].clone().unbind()
                continue
            bounds = row_bounds(rows, self.geometry.num_ranks)
            mine_ErK = matrix_ERK[:, bounds[rank] * width : bounds[rank + 1] * width]
            owned.append(mine_ErK.flatten(0, 1).clone())
        return owned

    def experts_of(self, rank: int, step: int) -> list[int]:
        layout = self.placed(step).layout
        return list(layout.experts_of(rank)[self.geometry.home_slots :])

    def check_restored(self, restored_CRK: torch.Tensor, rank: int, step: int) -> int:
        """Compare a rank's filled slots with their experts; return how many there are."""
        filled = [(c, e) for c, e in enumerate(self.experts_of(rank, step)) if e != EMPTY]
        for slot, expert in filled:
            assert torch.equal(restored_CRK[slot], self.whole_ERK[expert]), (self, rank, slot)
        return len(filled)

    def summed_ERK(self, step: int, wire: torch.dtype) -> torch.Tensor:
        """Return the sums over replicas in float32 and in order; those between hops are rounded."""
        parts: list[list[tuple[int, torch.Tensor]]] = [[] for _ in range(self.geometry.num_experts)]
        for rank in range(self.geometry.num_ranks):
            for slot, expert in enumerate(self.experts_of(rank, step)):
                if expert != EMPTY:
                    parts[expert].append((rank, self.grads_NCRK[rank, slot].float()))
        for at in range(len(self.way.widths) - 2, 0, -1):
            # A spread next to the homes has one place for an expert.
            one_place = at == 1 and self.geometry.home_slots > 0
            width = self.geometry.num_ranks if one_place else self.way.widths[at]
            for expert, found in enumerate(parts):
                sums: dict[int, torch.Tensor] = {}
                for rank, part in found:
                    first = rank - rank % width
                    sums[first] = sums[first] + part if first in sums else part
                parts[expert] = [(first, total.to(wire).float()) for first, total in sums.items()]
        zero = torch.zeros(self.rows, COLUMNS)
        return torch.stack([sum((part for _, part in found), start=zero) for found in parts])

    def rows_into_nodes(self, step: int, before: int | None) -> list[int]:
        """Return the rows that each node receives from others, block by block of the experts.

        Each place of a holding gets an expert once that changed slots want: from a slot of its own
        that had it, or else from the holding before. A spread gets its own from the owners alone.
        """
        geometry, widths = self.geometry, self.way.widths
        home_slots, node_size, ranks = geometry.home_slots, geometry.node_size, geometry.num_ranks
        had = [[EMPTY] * geometry.replica_slots for _ in range(ranks)]
        if before is not None:
            had = [self.experts_of(rank, before) for rank in range(ranks)]
        rows_N, found = self.block_rows(ranks), [0] * geometry.num_nodes

        def send(source: int, source_width: int, target: int, target_width: int) -> None:
            for block, rows in enumerate(rows_N):
                leaves = source * source_width + block % source_width
                arrives = target * target_width + block % target_width
                if leaves // node_size != arrives // node_size:
                    found[arrives // node_size] += rows

        wanted = [
            (rank, expert)
            for rank in range(ranks)
            for expert, kept in zip(self.experts_of(rank, step), had[rank], strict=True)
            if expert not in (kept, EMPTY)
        ]
        for at in range(len(widths) - 2, 0, -1):
            width, inner, held = widths[at], widths[at + 1], set[tuple[int, int]]()
            is_spread = at == 1 and home_slots > 0
            for target, expert in wanted:
                place = (expert // home_slots if is_spread else target * inner) // width
                send(place, width, target, inner)
                held.add((place, expert))
            wanted = []
            for place, expert in held:
                of_place = range(place * width, (0 if is_spread else place + 1) * width)
                slots = [rank for rank in of_place if expert in had[rank]]
                if slots:
                    send(slots[0], 1, place, width)
                else:
                    wanted.append((place, expert))
        for target, expert in wanted:
            send(expert // home_slots if home_slots else 0, widths[0], target, widths[1])
        return found
