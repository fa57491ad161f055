"""Module of a layer's experts: it owns the slices and computes with restored experts.

It replaces the local experts of Megatron's MoE layer.

Legend: E experts, C slots per rank, T tokens received, H hidden, r rows of a slice, K columns.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from megatron_laer.layer.experts.built_parts import BuiltParts
from megatron_laer.layer.experts.restored_compute import RestoredCompute
from megatron_laer.layer.experts.slices import SliceSpec, initialise, sharded_slice
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.share import Share

_EXTRA_STATE = "._extra_state"


class FSEPExperts(MegatronModule):
    """Slices of every expert of a layer, and the compute with the C experts in this rank's slots.

    Must be *called*: Megatron's distributed optimizer waits for updated parameters in a pre-call
    hook of the module that owns them.

    Args:
        activation_builder: Transformer Engine's activation from the module spec, or None.
    """

    def __init__(
        self,
        config: Any,
        *,
        groups: FSEPGroups,
        pg_collection: Any,
        device: torch.device,
        gemm: str,
        activation_builder: Any = None,
    ) -> None:
        compute = RestoredCompute(
            config,
            tp_group=pg_collection.expt_tp,
            device=device,
            gemm=gemm,
            activation_builder=activation_builder,
        )
        super().__init__(config=compute.config)
        self._rank, self._num_ranks = groups.rank, groups.size
        self._expert_dp_group = pg_collection.expt_dp
        self._layer_name: str | None = None
        self._compute = compute
        self._activation = compute.activation
        matrices = [
            SliceSpec.for_rank(
                linear.name,
                config.num_moe_experts,
                linear.rows,
                linear.columns,
                rank=self._rank,
                num_ranks=self._num_ranks,
                init_method=linear.init_method,
            )
            for linear in compute.linears
        ]
        # A layer's bias is restored right after its matrix, before the next layer's.
        self._specs = tuple(
            spec
            for matrix in matrices
            for spec in ([matrix, matrix.of_bias()] if compute.has_bias else [matrix])
        )
        device = torch.device("cpu") if config.use_cpu_initialization else device
        for spec in self._specs:
            self.register_parameter(
                spec.parameter_name, spec.new_parameter(config.params_dtype, device)
            )
        self.built_parts = BuiltParts(self)

    def initialise(self, layer_name: str, seed: int) -> None:
        self._layer_name = layer_name
        if self.config.perform_initialization:
            for slice_ErK, spec in zip(self.slices(), self._specs, strict=True):
                initialise(slice_ErK, spec, seed, layer_name)

    def what_changed(self) -> str | None:
        return self.built_parts.what_changed()

    @property
    def adapters(self) -> str:
        return ""  # slices have no linear layers to adapt

    def slices(self) -> list[torch.nn.Parameter]:
        return [getattr(self, spec.parameter_name) for spec in self._specs]

    @property
    def share(self) -> Share:
        return Share.of_slices(self.slices(), [spec.rows for spec in self._specs])

    @property
    def specs(self) -> tuple[SliceSpec, ...]:
        return self._specs

    def forward(
        self, input_TH: torch.Tensor, probs_T: torch.Tensor, plan: MicrobatchPlan
    ) -> torch.Tensor:
        assert self._layer_name is not None, "the experts' weights were never initialised"
        restored = plan.restored
        output_TH = self._compute(input_TH, probs_T, restored, plan.quotas.tokens_C)
        return restored.after_compute(output_TH)

    def backward_dw(self) -> None:
        """Do nothing: the layer computes delayed weight gradients (`FSEPMoELayer.backward_dw`)."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the slices, named and shaped as stock Megatron saves its experts."""
        replica_id = (0, 0, self._expert_dp_group.rank())
        state: dict[str, Any] = {}
        for slice_ErK, spec in zip(self.slices(), self._specs, strict=True):
            saved_as = f"{prefix}experts.{spec.saved_as}"
            state[f"{prefix}{spec.parameter_name}"] = sharded_slice(
                slice_ErK, spec, saved_as, sharded_offsets, replica_id
            )
            if spec.is_bias:
                continue
            # Stock's linear layers need an extra state per expert, empty unless they quantise. One
            # rank writes each.
            for expert in range(self._rank, spec.num_experts, self._num_ranks):
                state[f"{prefix}{spec.name}{_EXTRA_STATE}.{expert}"] = (
                    make_sharded_object_for_checkpoint(
                        None,
                        f"{prefix}experts.{spec.name}{_EXTRA_STATE}",
                        (*sharded_offsets, (len(sharded_offsets), expert, spec.num_experts)),
                        replica_id,
                    )
                )
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and _EXTRA_STATE in key]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
