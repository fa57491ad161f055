"""Settings of FSEP among which `advise` chooses, as geometries and as flags.

Legend: N ranks of a group, E experts, C slots per rank, G ranks per node.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from megatron_laer.choices import Dispatch, Restore, Sharding, TokenExchange
from megatron_laer.config import FSEPConfig, setting
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.layout import default_capacity
from megatron_laer.support.arguments import buffer_problems
from megatron_laer.tools.simulator.output import setting_label

# Slots beyond the least that always allow balance.
_MORE_SLOTS = 2
_DEFAULTS = FSEPConfig()


@dataclass(frozen=True)
class Setting:
    """One way to run FSEP."""

    geometry: Geometry
    restore: Restore = Restore.LAYER
    tokens: Dispatch = Dispatch.RANK
    combined: bool = False

    @property
    def config(self) -> FSEPConfig:
        by_node = self.tokens == Dispatch.NODE
        return FSEPConfig(
            sharding=self.geometry.sharding,
            capacity=self.geometry.capacity,
            restore=self.restore,
            token_exchange=TokenExchange.NODE if by_node else TokenExchange.RANK,
        )

    @property
    def label(self) -> str:
        return setting_label(self.geometry, self.tokens, self.restore, combined=self.combined)

    @property
    def flags(self) -> list[str]:
        """Return Megatron's flags, and those of settings that are not training's defaults."""
        config = self.config
        words = ["--expert-parallel-mode", "fsep"]
        dispatcher = "flex" if self.is_flex else "alltoall"
        words += group_flags(self.geometry.num_ranks, dispatcher, self.combined)
        for name in ("sharding", "capacity", "restore", "token_exchange"):
            if (value := getattr(config, name)) != getattr(_DEFAULTS, name):
                words += setting(name, value).split()
        return words

    @property
    def is_flex(self) -> bool:
        return self.tokens == Dispatch.FLEX


def group_flags(size: int, dispatcher: str, combined: bool = False) -> list[str]:
    """Return Megatron's flags for a group's size, its dispatcher of tokens and its schedule."""
    return [
        *("--expert-model-parallel-size", str(size)),
        *("--moe-token-dispatcher-type", dispatcher),
        *(["--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"] if combined else []),
    ]


def group_sizes(ranks: int, node_size: int, tensor: int) -> list[int]:
    """Return the sizes of groups that divide a stage's ranks and fill nodes, or divide one."""
    return [
        size
        for size in range(1, ranks + 1)
        if ranks % size == 0
        and size % tensor == 0
        and (size % node_size == 0 or node_size % size == 0)
    ]


def geometries(
    num_experts: int, num_ranks: int, node_size: int, shardings: Sequence[Sharding]
) -> Iterator[Geometry]:
    """Yield the shardings and slots of a group.

    Slots are few, or enough that a node holds every expert. Training's half-way number is there
    too.
    """
    fewest = -(-num_experts // num_ranks)
    least = default_capacity(num_ranks, num_experts)
    slots = {least + more for more in range(_MORE_SLOTS + 1)}
    if fewest * num_ranks > num_experts:
        slots.add(fewest)
    if node_size < num_ranks:
        whole = -(-num_experts // node_size) + 1
        slots |= {whole, (least + whole) // 2}
    for sharding in shardings:
        at_home = sharding == Sharding.EXPERTS
        if at_home and num_experts % num_ranks:
            continue
        for capacity in sorted(slots):
            if capacity <= num_experts and not (at_home and capacity == fewest):
                yield resolve_geometry(
                    num_experts, num_ranks, capacity, min(node_size, num_ranks), sharding=sharding
                )


def settings_of(
    geometry: Geometry,
    dispatches: Sequence[Dispatch],
    topk: int,
    flex_backend: str,
    overlaps: Sequence[bool],
) -> Iterator[Setting]:
    """Yield the settings of a geometry, training's defaults first.

    Training chooses the exchange of experts. `overlaps` are possible values of combined 1F1B, which
    would hide nothing of what `node` sends inside nodes.
    """
    for tokens in dispatches:
        if tokens == Dispatch.FLEX and _flex_problems(geometry, topk, flex_backend):
            continue
        for restore, combined in product(Restore, overlaps):
            if not (combined and tokens == Dispatch.NODE):
                yield Setting(geometry, restore, tokens, combined)


def _flex_problems(geometry: Geometry, topk: int, backend: str) -> list[str]:
    settings = Namespace(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend=backend,
        expert_model_parallel_size=geometry.num_ranks,
        num_experts=geometry.num_experts,
        moe_router_topk=topk,
    )
    return buffer_problems(settings, geometry)
