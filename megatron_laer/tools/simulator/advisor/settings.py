"""Settings of FSEP among which `advise` chooses, as geometries and as flags.

Legend: N ranks of a group, E experts, C slots per rank, G ranks per node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_laer.choices import Auto, ExchangeAlgorithm, Restore, Sharding, TokenExchange
from megatron_laer.config import FSEPConfig, PlanMode, flag_name
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.layout import default_capacity

# Slots beyond the least that always allow balance.
_MORE_SLOTS = 2
_DEFAULTS = FSEPConfig()
_MODES = {restore: FSEPConfig(restore=restore).mode for restore in Restore}


@dataclass(frozen=True)
class Setting:
    """One way to run FSEP."""

    geometry: Geometry
    restore: Restore = Restore.LAYER
    algorithm: ExchangeAlgorithm | Auto = Auto.AUTO
    tokens: TokenExchange = TokenExchange.RANK

    @property
    def mode(self) -> PlanMode:
        """Return the plan mode that training takes by default."""
        return _MODES[self.restore]

    @property
    def changes(self) -> dict[str, str]:
        """Return the fields of `FSEPConfig` that differ from its defaults, with their words."""
        words = {
            "restore": self.restore,
            "restore_algorithm": self.algorithm,
            "token_exchange": self.tokens,
        }
        return {
            name: word.value for name, word in words.items() if word != getattr(_DEFAULTS, name)
        }

    @property
    def label(self) -> str:
        geometry = self.geometry
        sizes = f"EP{geometry.num_ranks} {geometry.sharding} C={geometry.capacity}"
        more = [f"{name.replace('_', ' ')} {word}" for name, word in self.changes.items()]
        return ", ".join([sizes, *more])

    @property
    def flags(self) -> list[str]:
        geometry = self.geometry
        words = ["--expert-parallel-mode", "fsep"]
        words += ["--expert-model-parallel-size", str(geometry.num_ranks)]
        words += [flag_name("sharding"), geometry.sharding.value]
        words += [flag_name("capacity"), str(geometry.capacity)]
        for name, word in self.changes.items():
            words += [flag_name(name), word]
        return words


def group_sizes(ranks: int, node_size: int, tensor: int) -> list[int]:
    """Return the sizes of groups that divide a stage's ranks and fill nodes, or divide one."""
    return [
        size
        for size in range(1, ranks + 1)
        if ranks % size == 0
        and size % tensor == 0
        and (size % node_size == 0 or node_size % size == 0)
    ]


def stock_sizes(ranks: int, num_experts: int) -> list[int]:
    both = math.gcd(ranks, num_experts)
    return [size for size in range(1, both + 1) if both % size == 0]


def geometries(num_experts: int, num_ranks: int, node_size: int) -> Iterator[Geometry]:
    """Yield the shardings and slots of a group.

    Slots are few, or so many that a node, or two, four and so on together, hold every expert.
    """
    fewest = -(-num_experts // num_ranks)
    least = default_capacity(num_ranks, num_experts)
    slots = {least + more for more in range(_MORE_SLOTS + 1)}
    if fewest * num_ranks > num_experts:
        slots.add(fewest)
    domain = node_size
    while domain < num_ranks:
        slots.add(-(-num_experts // domain) + 1)
        domain *= 2
    for sharding in Sharding:
        at_home = sharding == Sharding.EXPERTS
        if at_home and num_experts % num_ranks:
            continue
        for capacity in sorted(slots):
            if capacity <= num_experts and not (at_home and capacity == fewest):
                yield resolve_geometry(
                    num_experts, num_ranks, capacity, min(node_size, num_ranks), sharding=sharding
                )


def settings_of(geometry: Geometry, exchanges: Sequence[TokenExchange]) -> Iterator[Setting]:
    """Yield the settings of a geometry, training's defaults first.

    Homes have the faster exchange for each layout. Rows have one for all layouts, so that the other
    may be the faster in a whole run.
    """
    algorithms: list[ExchangeAlgorithm | Auto] = [Auto.AUTO]
    if geometry.num_nodes == 1:
        exchanges = exchanges[:1]
    elif geometry.sharding == Sharding.ROWS:
        algorithms += ExchangeAlgorithm
    for tokens in exchanges:
        for restore in Restore:
            for algorithm in algorithms:
                yield Setting(geometry, restore, algorithm, tokens)
