"""Comparison, before the first step, of the inputs to decisions on the ranks of an FSEP group.

After the gate every rank computes layouts and splits from the same counts. Different settings,
hardware constants or code could lead to different decisions. Each exchange of counts compares the
decisions (`collectives`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_laer.config import FIELDS, FSEPConfig, flag_name
from megatron_laer.life import Kind
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.native_core import native
from megatron_laer.rules import value_text
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.version import __version__

# Paths may differ between ranks. Of a cluster, its constants are compared. Single ranks write the
# recordings.
_PATHS = ("cluster", "homes", "record_layouts", "record_metrics", "record_trace")
# Cluster fields that no decision reads: descriptions, spreads and provenance.
_TEXTS = ("name", "source", "assumed", "back_ends", "spreads", "figures", "measured")
# Kinds of a run by Megatron's settings; those by FSEP's are compared as flags.
_KINDS = {
    Kind.PARTS: "--overlap-moe-expert-parallel-comm",
    Kind.DELAYED: "--delay-wgrad-compute or --overlap-dispatch-backward-with-experts-wgrad",
    Kind.SYNCHRONISED: "batch_p2p_sync of a pipeline",
}
# Maximum differing values, and ranks per value, in one message.
_SHOWN = 8


def summarise(
    config: FSEPConfig, geometry: Geometry, costs: CostModel, seed: int
) -> dict[str, str]:
    """Return the inputs to a rank's decisions, as texts by name; floats have all their digits."""
    values = {name: getattr(config, name) for name in FIELDS if name not in _PATHS}
    return {
        **{
            flag_name(name): "not given" if value is None else value_text(value)
            for name, value in values.items()
        },
        **{text: "on" if kind in costs.kinds else "off" for kind, text in _KINDS.items()},
        **dict(_texts(geometry)),
        **dict(_texts(costs)),
        "seed": str(seed),
        "megatron_laer": __version__,
        "native core": native.sources[:16],
        "NumPy": np.__version__,
    }


def difference(summary: Mapping[str, str], groups: FSEPGroups) -> str | None:
    """Compare the summaries of the FSEP group's ranks; return one text for all. Collective."""
    summaries: list[Mapping[str, str]] = [{}] * groups.size
    dist.all_gather_object(summaries, summary, group=groups.tokens)
    return describe_difference(summaries, groups.ranks)


Held = tuple[Mapping[str, Any], str]


def settings_of_all(held: Held | None) -> tuple[Mapping[str, Any], str | None]:
    """Return the first group's settings in force, and one text for all ranks where groups differ.

    Collective over the world. Ranks of several groups share their experts' gradients, so their
    sharding and their homes must be the same. Rank 0, whose arguments are saved, may have no MoE
    layer.

    Args:
        held: settings in force and homes of this rank's experts; None on a rank without MoE layers.
    """
    held_by_rank: list[Held | None] = [None] * dist.get_world_size()
    dist.all_gather_object(held_by_rank, held)
    having = {rank: its for rank, its in enumerate(held_by_rank) if its is not None}
    names = flag_name("sharding"), f"the content of {flag_name('homes')}"
    of_ranks = [(settings["sharding"], homes) for settings, homes in having.values()]
    for name, values in zip(names, zip(*of_ranks, strict=True), strict=False):
        if len({*values}) > 1:
            return {}, (
                f"{name} is {_by_value(values, [*having])}: ranks of other groups would have other "
                "experts in the same places; give all ranks the same"
            )
    return next((settings for settings, _ in having.values()), {}), None


def describe_difference(summaries: Sequence[Mapping[str, str]], ranks: Sequence[int]) -> str | None:
    found = []
    for name in dict.fromkeys(chain.from_iterable(summaries)):
        values = [summary.get(name, "missing") for summary in summaries]
        if len(set(values)) > 1:
            found.append(f"{name} is {_by_value(values, ranks)}")
    if not found:
        return None
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"the ranks of its FSEP group differ: {'; '.join(found[:_SHOWN])}{more}. Every rank works "
        "out layouts and splits for itself, so these would not fit together: give all ranks the "
        "same flags, the same constants in the file of --fsep-set cluster, and the same "
        "installation of megatron_laer and NumPy"
    )


def _by_value(values: Sequence[str], ranks: Sequence[int]) -> str:
    """Return "0.5 on rank 1 and 0.2 on ranks 0, 2, 3", the rarest value first."""
    parts = []
    for value, count in reversed(Counter(values).most_common()):
        having = [str(rank) for rank, its in zip(ranks, values, strict=True) if its == value]
        more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
        noun = "rank" if count == 1 else "ranks"
        parts.append(f"{value} on {noun} {', '.join(having[:_SHOWN])}{more}")
    return " and ".join(parts)


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the numbers of nested dataclasses, as ("cluster.solve.base_s", "3.65e-05")."""
    if not dataclasses.is_dataclass(value):
        yield name, str(value)
        return
    for spec in dataclasses.fields(value):
        if spec.name not in (*_TEXTS, "kinds"):
            below = f"{name}.{spec.name}" if name else spec.name
            yield from _texts(getattr(value, spec.name), below)
