"""Format of `--fsep-record DIR layouts`, one file per FSEP group: `files.records` of one kind.

A record has a step at which layouts changed, and the new layout of every layer. That is the expert
of each slot, or -1 for an empty one. With --fsep-homes the header's `homes` are the experts at each
home position, layer by layer.

Legend: N ranks, C slots per rank, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.choices import Sharding
from megatron_laer.files.checks import naming, open_input, quoted
from megatron_laer.files.recording import RecordingFile
from megatron_laer.files.records import MAX_RANKS, Field, Format, Records
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import MAX_EXPERTS, ExpertLayout

LAYOUTS = Format(
    "megatron_laer-layouts",
    "recording of --fsep-record DIR layouts",
    "layouts",
    {"num_ranks": MAX_RANKS, "num_experts": MAX_EXPERTS, "capacity": MAX_RANKS},
    {"layouts": (Field("slots_LNC", "<i2", ("layers", "num_ranks", "capacity")),)},
    has_every_step=False,
)


class LayoutRecorder(RecordingFile):
    """Recording of every applied set of layouts.

    `signature` has settings of the run for the header, by name. A resumed run, or a step back,
    moves the records from that step on to another file.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        signature: Mapping[str, Any],
        layers: Sequence[str],
        first_step: int,
        run: str | None = None,
    ) -> None:
        fields = {
            "num_ranks": geometry.num_ranks,
            "num_experts": geometry.num_experts,
            "capacity": geometry.capacity,
            "sharding": geometry.sharding.value,
            **signature,
            "layers": [*layers],
        }
        self._homes = _homes(fields)
        super().__init__(path, LAYOUTS, fields, first_step, run)

    def record(self, step: int, layouts: Sequence[ExpertLayout]) -> None:
        """Write the layouts, one per layer, that took effect with `step`; once per step."""
        by_expert = [
            home.layout_of_experts(layout)
            for home, layout in zip(self._homes, layouts, strict=True)
        ]
        slots_LNC = [of.slot_expert_S.reshape(of.num_ranks, of.capacity) for of in by_expert]
        self.add("layouts", step, slots_LNC=slots_LNC)


def read_layouts(path: Path) -> Iterator[tuple[int, list[ExpertLayout]]]:
    """Yield a recording's steps with all layers' layouts; skip an incomplete last record."""
    with open_input(path) as file, naming(path):
        records = Records.of(file, path, LAYOUTS)
        try:
            geometry, homes = _geometry(records.fields), _homes(records.fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}, line 1: {error}") from error
        for frame, values in records.read(file, path):
            try:
                layouts = [
                    ExpertLayout.from_slots(*geometry.shape, slots_NC.reshape(-1))
                    for slots_NC in values["slots_LNC"]
                ]
                for home, layout in zip(homes, layouts, strict=True):
                    geometry.check_layout(home.layout_of_positions(layout))
            except ValueError as error:
                raise frame.problem(path, error) from error
            yield frame.step, layouts


def _geometry(fields: Mapping[str, Any]) -> Geometry:
    word = str(fields.get("sharding"))
    if word not in [*Sharding]:
        raise ValueError(f"sharding {quoted(word)} must be one of {', '.join(Sharding)}")
    # Layouts do not depend on the node size.
    num_ranks, num_experts, capacity = (
        fields[name] for name in ("num_ranks", "num_experts", "capacity")
    )
    return Geometry(num_ranks, num_experts, capacity, num_ranks, Sharding(word))


def _homes(fields: Mapping[str, Any]) -> list[HomeOrder]:
    """Return the homes of each layer; raise ValueError for others than permutations."""
    given, num_layers = fields.get("homes"), len(fields["layers"])
    if given is None:
        return [HomeOrder.stock(fields["num_experts"])] * num_layers
    found = [HomeOrder(np.array(experts, dtype=np.int64)) for experts in given]
    sizes = {len(home.expert_E) for home in found}
    if len(found) != num_layers or sizes != {fields["num_experts"]}:
        raise ValueError(f"homes {quoted(given)} must be those of every layer's experts")
    return found
