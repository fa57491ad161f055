"""`LayerExperts` gives each pass of a layer its restored experts, new ones or those of the step."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slices import SlicedLayer
from megatron_laer.runtime.weights.step_experts import StepExperts


class LayerExperts:
    """Makes restored experts for single passes, and holds those of a step by the layer's name."""

    def __init__(self, streams: ExchangeStreams) -> None:
        self._streams = streams
        self._of_step: dict[str, StepExperts] = {}

    def of_pass(self, layer: SlicedLayer, index: LayoutIndex, *, training: bool) -> RestoredExperts:
        """Return the experts of a layer's next pass, restored under this layout if need be."""
        if training and layer.name in self._of_step:
            return self._of_step[layer.name]
        return RestoredExperts(layer.name, layer.slices, index, self._streams)

    def begin_step(
        self, indexes: Sequence[tuple[SlicedLayer, LayoutIndex]], num_microbatches: int | None
    ) -> None:
        """Begin a step over which every layer's experts are held, under these layouts.

        Raises:
            ValueError: the number of microbatches is not known, or slices have no main gradients.
        """
        if num_microbatches is None:
            raise ValueError(
                "--fsep-restore step must know the microbatches of a step: give "
                "training_step(step, num_microbatches), or take --fsep-restore layer"
            )
        if not self._of_step:
            self._of_step = {
                layer.name: StepExperts(layer.name, layer.slices, index, self._streams)
                for layer, index in indexes
            }
        for layer, index in indexes:
            self._of_step[layer.name].begin_step(index, num_microbatches * layer.passes)

    def end_step(self, *, weights_changed: bool) -> None:
        """End the step; experts that are held must be restored anew once weights changed."""
        for experts in self._of_step.values():
            experts.end_step(weights_changed=weights_changed)
