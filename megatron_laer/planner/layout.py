"""Layout: the assignment of experts to slots that planner, runtime and checkpoints share.

This file does not choose layouts (see `planner`) or move weights (see `runtime`). It imports
neither torch nor Megatron.

Legend: N ranks of the FSEP group, E experts, C slots per rank, S = N*C slots. Slot s is slot s % C
of rank s // C.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64

# Slots in the layout broadcast are little-endian int16 on every machine.
_SLOT_DTYPE = np.dtype("<i2")
MAX_EXPERTS = int(np.iinfo(_SLOT_DTYPE).max)
# Content of a slot without an expert.
EMPTY = -1


@dataclass(frozen=True)
class ExpertLayout:
    """Assignment of experts to the S = N*C slots of an FSEP group.

    Immutable, equal and hashable by content, so that ranks can compare layouts and tables can be
    cached by layout. Every expert has at least one slot, or the layout cannot be built. It may have
    two on one rank (wasteful, not wrong). A slot may be `EMPTY`; only layouts of home experts have
    such slots (`Geometry.check_layout`). `from_slots` makes `slot_bytes`, S little-endian int16.
    """

    num_ranks: int
    capacity: int
    num_experts: int
    slot_bytes: bytes

    def __post_init__(self) -> None:
        check_shape(self.num_ranks, self.capacity, self.num_experts)
        _check_slots(self.num_ranks, self.capacity, self.num_experts, self.slot_expert_S)

    @classmethod
    def from_slots(
        cls,
        num_ranks: int,
        capacity: int,
        num_experts: int,
        slots: Sequence[int] | npt.NDArray[np.integer],
    ) -> ExpertLayout:
        """Build a layout from S expert numbers, or `EMPTY`, rank by rank."""
        check_shape(num_ranks, capacity, num_experts)
        slot_expert_S = np.asarray(slots)
        if slot_expert_S.ndim != 1 or (
            slot_expert_S.size > 0 and slot_expert_S.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"slots must be a flat sequence of integers, got shape {slot_expert_S.shape} of "
                f"{slot_expert_S.dtype}; pass N*C = {num_ranks * capacity} expert numbers"
            )
        # Checked before the cast, which would wrap an expert number beyond int16 into a legal one.
        _check_slots(num_ranks, capacity, num_experts, slot_expert_S)
        return cls(num_ranks, capacity, num_experts, slot_expert_S.astype(_SLOT_DTYPE).tobytes())

    @classmethod
    def static(
        cls, num_ranks: int, capacity: int, num_experts: int, node_size: int = 1
    ) -> ExpertLayout:
        """Return the layout without a planner, in which no rank holds an expert twice.

        Where slots are spare and a node's suffice for all experts, each node has them all, so that
        no token leaves it. Slot c then has one of the c-th C-th of the experts, in turn over the
        ranks, as in LAER-MoE's FSDP+EP. Elsewhere rank r hosts C experts from r*E//N on, mod E. The
        first E/N are stock Megatron's placement where N divides E. Neighbouring starts are at most
        ceil(E/N) <= C apart, so every expert is covered.
        """
        check_shape(num_ranks, capacity, num_experts)
        rank_N1 = np.arange(num_ranks)[:, None]
        if node_size * capacity >= num_experts < num_ranks * capacity:
            bounds = np.arange(capacity + 1) * num_experts // capacity
            slot_expert_NC = bounds[:-1] + rank_N1 % node_size % np.diff(bounds)
        else:
            start_N1 = rank_N1 * num_experts // num_ranks
            slot_expert_NC = (start_N1 + np.arange(capacity)) % num_experts
        return cls.from_slots(num_ranks, capacity, num_experts, slot_expert_NC.reshape(-1))

    @classmethod
    def random(
        cls, num_ranks: int, capacity: int, num_experts: int, seed: tuple[int, ...]
    ) -> ExpertLayout:
        """Return a random legal layout for worst cases, the same on every machine for one seed."""
        check_shape(num_ranks, capacity, num_experts)
        num_slots = num_ranks * capacity
        bits = _random_bits(seed)
        spare = bits.random_raw(num_slots - num_experts) % np.uint64(num_experts)
        experts_S = np.concatenate([np.arange(num_experts), spare.astype(np.int64)])
        order_S = np.argsort(bits.random_raw(num_slots), kind="stable")
        return cls.from_slots(num_ranks, capacity, num_experts, experts_S[order_S])

    @classmethod
    def at_home(cls, num_ranks: int, capacity: int, num_experts: int) -> ExpertLayout:
        """Return stock's placement: E/N home experts on each rank, the other slots empty."""
        check_home(num_ranks, capacity, num_experts)
        slot_expert_NC = np.full((num_ranks, capacity), EMPTY)
        home = num_experts // num_ranks
        slot_expert_NC[:, :home] = np.arange(num_experts).reshape(num_ranks, home)
        return cls.from_slots(num_ranks, capacity, num_experts, slot_expert_NC.reshape(-1))

    @classmethod
    def random_at_home(
        cls, num_ranks: int, capacity: int, num_experts: int, seed: tuple[int, ...]
    ) -> ExpertLayout:
        """Return stock's placement with random replicas, the same on every machine for one seed.

        A fifth of the layouts has no replica, and another fifth has one in each replica slot.
        """
        check_home(num_ranks, capacity, num_experts)
        bits = _random_bits(seed)
        home = num_experts // num_ranks
        replicas = capacity - home
        fullness = int(bits.random_raw()) % 5  # of 4 slots, this many have a replica
        away = num_experts - home
        order_NA = np.argsort(
            bits.random_raw(num_ranks * away).reshape(num_ranks, away), axis=1, kind="stable"
        )
        first_N1 = np.arange(1, num_ranks + 1)[:, None] * home
        replica_NR = (first_N1 + order_NA[:, :replicas]) % num_experts
        drawn_NR = bits.random_raw(num_ranks * replicas).reshape(num_ranks, replicas)
        replica_NR[drawn_NR % np.uint64(4) >= np.uint64(fullness)] = EMPTY
        slot_expert_NC = cls.at_home(num_ranks, capacity, num_experts).slot_expert_S.reshape(
            num_ranks, capacity
        )
        slot_expert_NC = np.concatenate([slot_expert_NC[:, :home], replica_NR], axis=1)
        return cls.from_slots(num_ranks, capacity, num_experts, slot_expert_NC.reshape(-1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (N, C, E), the first arguments of `static` and `random`."""
        return self.num_ranks, self.capacity, self.num_experts

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.capacity

    @property
    def slot_expert_S(self) -> npt.NDArray[np.int16]:
        """Return the expert of each slot, or `EMPTY`, int16 [S], a read-only view of the bytes."""
        return np.frombuffer(self.slot_bytes, dtype=_SLOT_DTYPE)

    @cached_property
    def replicas_E(self) -> Int64:
        """Return the number of slots per expert, int64 [E], read-only, all at least 1."""
        filled = self.slot_expert_S[self.slot_expert_S != EMPTY]
        replicas_E = np.bincount(filled, minlength=self.num_experts).astype(np.int64)
        replicas_E.setflags(write=False)
        return replicas_E

    @cached_property
    def digest(self) -> int:
        """Return a signed 64-bit fingerprint of N, C, E and the slots, equal on every machine."""
        shape = struct.pack("<qqq", self.num_ranks, self.capacity, self.num_experts)
        digest = hashlib.blake2b(shape + self.slot_bytes, digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def changed_from(self, before: ExpertLayout) -> Bool:
        """Return the slots that get another expert, bool [S]; not those that become empty."""
        if before.shape != self.shape:
            shapes = [before.shape, self.shape]
            raise ValueError(f"layouts of different (ranks, capacity, experts): {shapes}")
        filled_S = self.slot_expert_S != EMPTY
        return np.asarray(filled_S & (self.slot_expert_S != before.slot_expert_S))

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Return the C experts of a rank, or `EMPTY`, in slot order."""
        check_rank(self.num_ranks, rank)
        first = rank * self.capacity
        return tuple(self.slot_expert_S[first : first + self.capacity].tolist())

    def to_list(self) -> list[int]:
        """Return the experts of all slots as plain integers, for `from_slots`."""
        experts: list[int] = self.slot_expert_S.tolist()
        return experts


def default_capacity(num_ranks: int, num_experts: int, multiple: int = 1) -> int:
    """Return min(E, ceil(E/N) + 1), the fewest slots per rank that always allow perfect balance.

    With ceil(E/N) + 1 slots, any loads can be split so that all ranks carry the same (for E = N
    this is Walker's alias method). With E slots, every rank hosts all experts. If up to E slots
    allow it, N·C is a multiple of `multiple`.
    """
    if num_ranks < 1 or num_experts < 1:
        raise ValueError(
            f"num_ranks and num_experts must be at least 1, got {num_ranks} and {num_experts}"
        )
    fewest = min(num_experts, -(-num_experts // num_ranks) + 1)
    fitting = (c for c in range(fewest, num_experts + 1) if c * num_ranks % multiple == 0)
    return next(fitting, fewest)


def stock_owner_E(num_ranks: int, num_experts: int) -> Int64:
    """Return each expert's rank in contiguous placement (stock's where N divides E): e*N // E."""
    if num_ranks < 1 or num_experts < 1:
        raise ValueError(
            f"num_ranks and num_experts must be at least 1, got {num_ranks} and {num_experts}"
        )
    return np.arange(num_experts, dtype=np.int64) * num_ranks // num_experts


def check_shape(
    num_ranks: int, capacity: int, num_experts: int, flag: str = "capacity", multiple: int = 1
) -> None:
    """Reject N, C, E for which no layout exists, or where a rank would hold an expert twice."""
    if num_ranks < 1 or capacity < 1 or num_experts < 1:
        raise ValueError(
            f"num_ranks, capacity and num_experts must be at least 1, got {num_ranks}, {capacity} "
            f"and {num_experts}"
        )
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"num_experts must be at most {MAX_EXPERTS}, got {num_experts}")
    fewest = -(-num_experts // num_ranks)
    if not fewest <= capacity <= num_experts:
        default = default_capacity(num_ranks, num_experts, multiple)
        raise ValueError(
            f"{flag} {capacity}: the slots of {num_ranks} ranks must hold each of {num_experts} "
            f"experts, and a rank none twice; use {fewest} to {num_experts} (default {default})"
        )


def check_home(num_ranks: int, capacity: int, num_experts: int, flag: str = "capacity") -> None:
    """Reject N, C, E without E/N home experts and at least one replica slot on each rank."""
    if num_experts % num_ranks != 0:
        sharding = flag.replace("capacity", "sharding")  # of the same command
        raise ValueError(
            f"{num_experts} experts cannot be at home on {num_ranks} ranks in equal numbers; give "
            f"{sharding} rows, or a number of ranks that divides them"
        )
    home = num_experts // num_ranks
    if not home < capacity <= num_experts:
        most = f"{home + 1} to {num_experts}" if home < num_experts else "more than one rank"
        raise ValueError(
            f"{flag} {capacity}: each rank has {home} home experts and needs a slot for replicas; "
            f"use {most}"
        )


def check_rank(num_ranks: int, rank: int) -> None:
    """Reject a rank outside 0..N-1; NumPy would count a negative one from the end."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be in 0..{num_ranks - 1}, got {rank}")


def _random_bits(seed: tuple[int, ...]) -> np.random.PCG64:
    """Return raw words: NumPy promises stable streams for these, but not for Generator (NEP 19)."""
    if any(part < 0 for part in seed):
        raise ValueError(f"seed must hold non-negative integers, got {seed}")
    return np.random.PCG64(np.random.SeedSequence(seed))


def _check_slots(
    num_ranks: int, capacity: int, num_experts: int, slot_expert_S: npt.NDArray[np.integer]
) -> None:
    num_slots = num_ranks * capacity
    if slot_expert_S.size != num_slots:
        raise ValueError(
            f"got {slot_expert_S.size} slots, but {num_ranks} ranks with {capacity} slots each "
            f"need {num_slots}"
        )
    low, high = int(slot_expert_S.min()), int(slot_expert_S.max())
    if low < EMPTY or high >= num_experts:
        wrong = low if low < EMPTY else high
        raise ValueError(
            f"slots hold expert {wrong}; experts must be in 0..{num_experts - 1}, or {EMPTY} where "
            "a slot is empty"
        )
    filled = slot_expert_S[slot_expert_S != EMPTY].astype(np.int64)
    replicas_E = np.bincount(filled, minlength=num_experts)
    missing = np.flatnonzero(replicas_E == 0)
    if missing.size > 0:
        shown = ", ".join(str(expert) for expert in missing[:8])
        more = f" and {missing.size - 8} more" if missing.size > 8 else ""
        raise ValueError(
            f"no slot holds expert {shown}{more}; every expert in 0..{num_experts - 1} needs one"
        )
