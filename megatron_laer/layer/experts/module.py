"""Module of a layer's experts: it owns the slices and computes with restored experts.

It replaces the local experts of Megatron's MoE layer. The activation, its fusions, clamps and the
routing probabilities are those of Megatron's own `MLP`, whose two linear layers are identities.

Legend: E experts, C slots per rank, T tokens received, H hidden, r rows of a slice, K columns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from megatron_laer.layer.experts.gemm import check_gemm, slot_gemm
from megatron_laer.layer.experts.main_grads import MegatronMainGrads
from megatron_laer.layer.experts.slices import SliceSpec, initialise, sharded_slice
from megatron_laer.layer.experts.slot_linear import slot_bias, slot_linear
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.layer import Slices

_EXTRA_STATE = "._extra_state"

# Maximum number of foreign modules per message.
_SHOWN = 4

# Reason to refuse changed experts.
ADAPTED = (
    "FSEP computes experts from slices, and their two linear layers are no modules that could be "
    "wrapped, so adapters such as LoRA cannot be on them; give as targets layers of attention "
    "alone, such as linear_qkv and linear_proj, or leave out --expert-parallel-mode fsep"
)


class FSEPExperts(MegatronModule):
    """Slices of every expert of a layer, and the compute with the C experts in this rank's slots.

    Must be *called*: Megatron's distributed optimizer waits for updated parameters in a pre-call
    hook of the module that owns them.

    Args:
        activation_builder: Transformer Engine's activation from the module spec, or None.
        stock_is_grouped: whether stock would build grouped experts, which determines the names of
            their parameters.
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
        stock_is_grouped: bool = False,
    ) -> None:
        # Like Megatron's SequentialMLP: MLP reads the FFN width of an expert from ffn_hidden_size.
        config = copy.copy(config)
        config.ffn_hidden_size = config.moe_ffn_hidden_size
        super().__init__(config=config)
        self._rank, self._num_ranks = groups.rank, groups.size
        self._expert_dp_group = pg_collection.expt_dp
        self._layer_name: str | None = None
        self.stock_is_grouped = stock_is_grouped
        self._gemm = slot_gemm(gemm)
        # Stock's grouped experts too recompute nothing without this granularity.
        self._recomputes_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        matrices: list[SliceSpec] = []

        def builder(name: str) -> Any:
            """Return a builder that describes a linear layer of Megatron's MLP and adds none."""

            def build(input_size: int, output_size: int, **options: Any) -> _PassOn:
                sizes = config.num_moe_experts, output_size, input_size
                ranks = {"rank": self._rank, "num_ranks": self._num_ranks}
                init_method = options["init_method"]
                matrices.append(SliceSpec.for_rank(name, *sizes, **ranks, init_method=init_method))
                return _PassOn()

            return build

        self._activation = MLP(
            config,
            MLPSubmodules(
                linear_fc1=builder("linear_fc1"),
                linear_fc2=builder("linear_fc2"),
                activation_func=activation_builder,
            ),
            is_expert=True,
            ffn_hidden_size=config.moe_ffn_hidden_size,
            tp_group=pg_collection.expt_tp,
        )
        sizes = [size for spec in matrices for size in (spec.rows, spec.columns)]
        check_gemm(gemm, device, config.params_dtype, sizes)
        # A layer's bias is restored right after its matrix, before the next layer's.
        self._has_bias = config.add_bias_linear
        self._specs = tuple(
            spec
            for matrix in matrices
            for spec in ([matrix, matrix.of_bias()] if self._has_bias else [matrix])
        )
        device = torch.device("cpu") if config.use_cpu_initialization else device
        for spec in self._specs:
            self.register_parameter(
                spec.parameter_name, spec.new_parameter(config.params_dtype, device)
            )
        self._built = self._parts()

    def initialise(self, layer_name: str, seed: int) -> None:
        self._layer_name = layer_name
        if self.config.perform_initialization:
            for slice_ErK, spec in zip(self.slices(), self._specs, strict=True):
                initialise(slice_ErK, spec, seed, layer_name)

    def slices(self) -> list[torch.nn.Parameter]:
        return [getattr(self, spec.parameter_name) for spec in self._specs]

    def local_slices(self) -> Slices:
        rows = tuple(spec.rows for spec in self._specs)
        return Slices(tuple(self.slices()), rows, MegatronMainGrads())

    @property
    def specs(self) -> tuple[SliceSpec, ...]:
        return self._specs

    def what_changed(self) -> str | None:
        """Describe modules and parameters that were not built here; None if there are none."""
        parts = self._parts()
        others = [name for name, kind in parts.items() if self._built.get(name) is not kind]
        if not others:
            return None
        listed = ", ".join(f"{name} ({parts[name].__name__})" for name in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        return f"its experts have {listed}{more}, which FSEP did not build: {ADAPTED}"

    def forward(
        self, input_TH: torch.Tensor, probs_T: torch.Tensor, plan: MicrobatchPlan
    ) -> torch.Tensor:
        assert self._layer_name is not None, "the experts' weights were never initialised"
        if self.config.moe_apply_probs_on_input:
            input_TH = (probs_T.unsqueeze(-1) * input_TH).to(input_TH.dtype)
            probs_T = torch.ones_like(probs_T)

        restored = plan.restored
        placeholders = restored.weight_placeholders()
        input_TH, probs_T = restored.before_compute(input_TH, probs_T)

        def linear(
            layer: int, input_TK: torch.Tensor, bias_scale_T: torch.Tensor | None = None
        ) -> torch.Tensor:
            at, tokens_C = layer * (1 + self._has_bias), plan.quotas.tokens_C
            output_TR = slot_linear(input_TK, placeholders[at], restored, at, tokens_C, self._gemm)
            if not self._has_bias:
                return output_TR
            return slot_bias(
                output_TR, bias_scale_T, placeholders[at + 1], restored, at + 1, tokens_C
            )

        # As in Megatron's grouped experts, the first bias precedes a clamp. The second one is
        # multiplied by the probability, which the activation's output already includes.
        hidden_TF = linear(0, input_TH)
        if self._recomputes_activation and torch.is_grad_enabled():
            checkpoint = CheckpointWithoutOutput()
            activated_TF = checkpoint.checkpoint(self._activate, hidden_TF, probs_T)
            output_TH = linear(1, activated_TF, probs_T)
            checkpoint.discard_output_and_register_recompute(output_TH)
        else:
            output_TH = linear(1, self._activate(hidden_TF, probs_T), probs_T)
        return restored.after_compute(output_TH, backward_follows=plan.backward_follows)

    def backward_dw(self) -> None:
        """Do nothing: delayed weight gradients are refused at start."""

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
            # Stock's linear layers need an extra state per expert, which is empty without fp8. One
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

    def _parts(self) -> dict[str, type]:
        return {
            name: type(part)
            for name, part in (*self.named_modules(), *self.named_parameters())
            if part is not self
        }

    def _activate(self, hidden_TF: torch.Tensor, probs_T: torch.Tensor) -> torch.Tensor:
        output_TF, bias = self._activation(hidden_TF, probs_T)
        assert bias is None
        activated: torch.Tensor = output_TF
        return activated

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and _EXTRA_STATE in key]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _PassOn(torch.nn.Module):
    """Identity in place of a linear layer of Megatron's MLP; refuses adapters such as LoRA."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"a linear layer of experts has no {name!r}: {ADAPTED}") from error

    def forward(self, input_TK: torch.Tensor) -> tuple[torch.Tensor, None]:
        return input_TK, None
