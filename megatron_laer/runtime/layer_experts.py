"""Restored experts of each pass of a layer, new ones or those of the step.

With M microbatches `--fsep-restore step` lets a layer's exchanges fall from 3·M to 2, or to 3 where
payloads serve one direction. In return a rank holds the restored matrices of every layer, and
float32 sums of their gradients, as long as the step runs. With experts at home these are replicas;
the homes' own gradients are stock's, microbatch by microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_laer.life import Kind, Kinds
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.share import Share


class LayerExperts:
    """Restored experts of all layers of a rank, for single passes or held over a step.

    `kinds` are those of the run.
    """

    def __init__(
        self, streams: ExchangeStreams, device: torch.device, geometry: Geometry, kinds: Kinds
    ) -> None:
        self.holds_step = Kind.STEP in kinds
        self.kinds = kinds
        self._streams = streams
        self._device = device
        self._geometry = geometry
        self._indexes: dict[str, LayoutIndex] = {}
        self._of_step: dict[str, RestoredExperts] = {}

    def of_pass(
        self, layer: LayerState, layout: ExpertLayout, *, training: bool
    ) -> RestoredExperts:
        index = self._index(layer, layout)
        if training and layer.name in self._of_step:
            return self._of_step[layer.name]
        restored = self._make(layer, index, self.kinds - {Kind.STEP})
        if not training:
            restored.expect_no_backward()
        return restored

    def change(self, experts: RestoredExperts, layout: ExpertLayout) -> None:
        experts.change(layout_index(replace(experts.index.placed, layout=layout), self._device))

    def begin_step(
        self, layouts: Sequence[tuple[LayerState, ExpertLayout]], num_microbatches: int | None
    ) -> None:
        """Upload index tensors of layers with known layouts, and begin to hold their experts."""
        indexes = [(layer, self._index(layer, layout)) for layer, layout in layouts]
        if not self.holds_step:
            return
        if num_microbatches is None:
            raise ValueError(
                "--fsep-restore step must know the microbatches of a step: give "
                "training_step(step, num_microbatches), or take --fsep-restore layer"
            )
        if not self._of_step:
            for layer, _ in indexes:
                check_main_grads(layer.name, layer.share)
            self._of_step = {
                layer.name: self._make(layer, index, self.kinds) for layer, index in indexes
            }
        for layer, index in indexes:
            self._of_step[layer.name].begin_step(index, num_microbatches * layer.passes)

    def end_step(self) -> None:
        for held in self._of_step.values():
            held.free()

    def memory_problem(
        self, layers: Sequence[LayerState], replica_slots: int, kept_gib: float
    ) -> str | None:
        """Describe why no layer's weights fit into the memory to keep them; None if they do."""
        if kept_gib == 0:
            return None
        least = min((layer.share.restored_bytes(replica_slots) for layer in layers), default=0)
        if kept_gib * 2**30 >= least:
            return None
        return (
            f"--fsep-restore {kept_gib}: keeps no layer's restored experts, which take "
            f"{least / 2**30:.6f} GiB; give as much for each layer and microbatch in flight, or "
            "leave it out"
        )

    def _make(self, layer: LayerState, index: LayoutIndex, kinds: Kinds) -> RestoredExperts:
        return RestoredExperts(layer.name, layer.share, index, self._streams, kinds, layer.late)

    def _index(self, layer: LayerState, layout: ExpertLayout) -> LayoutIndex:
        index = self._indexes.get(layer.name)
        if index is None or index.placed.layout != layout:
            index = layout_index(Placed(layout, self._geometry, layer.quantised), self._device)
            self._indexes[layer.name] = index
        return index


def check_main_grads(name: str, share: Share) -> None:
    """Refuse to hold a step's sums without main gradients: a bfloat16 `grad` would round them."""
    if not share.have_main_grads:
        raise ValueError(
            f"--fsep-restore step, {name}: adds gradients to Megatron's main gradients, and "
            "these parameters have none; wrap the model in Megatron's DistributedDataParallel, "
            "or take --fsep-restore layer"
        )
