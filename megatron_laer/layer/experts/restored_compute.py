"""Compute of a rank's restored experts: their GEMMs, with Megatron's own activation between.

The activation, its fusions, clamps and the routing probabilities are those of Megatron's `MLP`,
whose two linear layers are identities.

Legend: C restored experts, T tokens received, H hidden, F expert FFN width, K columns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from megatron_laer.layer.experts import fp8
from megatron_laer.layer.experts.adapters import Adapter
from megatron_laer.layer.experts.built_parts import ADAPTED
from megatron_laer.layer.experts.gemm import SlotGemm, check_gemm, slot_gemm
from megatron_laer.layer.experts.slot_linear import slot_bias, slot_linear
from megatron_laer.rules import WITH_ADAPTERS, problems_by
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.share import Packers


class Linear(NamedTuple):
    """One linear layer of an expert, as Megatron would build it: R rows, K columns."""

    name: str
    rows: int
    columns: int
    init_method: Any


class RestoredCompute:
    """Forward of restored experts on the tokens of their slots.

    Args:
        activation_builder: Transformer Engine's activation from the module spec, or None.
        quantised: whether restored matrices are payloads, by the config's recipe.

    Attributes:
        config: of Megatron's `MLP`, which reads the FFN width of an expert from `ffn_hidden_size`.
        linears: the two linear layers of an expert.
        activation: Megatron's `MLP` without linear layers.
        packers: of both layers' home experts if they are in fp8, else empty.
        adapters: of both layers, where home experts have them.
    """

    def __init__(
        self,
        config: Any,
        *,
        tp_group: Any,
        device: torch.device,
        gemm: str,
        activation_builder: Any,
        quantised: bool = False,
    ) -> None:
        self.config = copy.copy(config)  # like Megatron's SequentialMLP
        self.config.ffn_hidden_size = config.moe_ffn_hidden_size
        self.has_bias = config.add_bias_linear
        self._gemm = gemm
        self.linears: list[Linear] = []
        # Stock's grouped experts too recompute nothing without this granularity.
        self._recomputes_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )

        def builder(name: str) -> Any:
            """Return a builder that describes a linear layer of Megatron's MLP and adds none."""

            def build(input_size: int, output_size: int, **options: Any) -> _PassOn:
                self.linears.append(Linear(name, output_size, input_size, options["init_method"]))
                return _PassOn()

            return build

        self.activation = MLP(
            self.config,
            MLPSubmodules(
                linear_fc1=builder("linear_fc1"),
                linear_fc2=builder("linear_fc2"),
                activation_func=activation_builder,
            ),
            is_expert=True,
            ffn_hidden_size=config.moe_ffn_hidden_size,
            tp_group=tp_group,
        )
        self.packers: list[Packers] = []
        self.adapters: list[Adapter | None] = [None] * len(self.linears)
        self._trains_shared = False
        self._gemms: list[SlotGemm] = []
        if quantised:
            fp8.check_card(config, device)
            for linear in self.linears:
                product = fp8.quantised_gemm(config, linear.rows, linear.columns, device)
                self.packers.append(product.packers)
                self._gemms.append(product)
            return
        sizes = [size for linear in self.linears for size in (linear.rows, linear.columns)]
        check_gemm(gemm, device, config.params_dtype, sizes)
        self._gemms = [slot_gemm(gemm)] * len(self.linears)

    def adapt(self, adapters: Sequence[Adapter | None]) -> None:
        """Add the adapters of home experts to what their replicas compute."""
        present = [adapter for adapter in adapters if adapter is not None]
        if present and self.packers:
            raise ValueError(
                "fp8 experts have them, and replicas add no adapter to payloads; leave "
                "fp8-experts out of --fsep-allow-unproven and train in bf16"
            )
        settings = SimpleNamespace(**vars(self.config) | {"adapts_experts": bool(present)})
        if problems := problems_by(WITH_ADAPTERS, settings):
            raise ValueError(problems[0])
        matrices = [matrix[0] for adapter in present for matrix in adapter.homes]
        sizes = [size for matrix in matrices for size in matrix.shape[-2:]]
        for matrix in matrices:
            check_gemm(self._gemm, matrix.device, matrix.dtype, sizes)
        self.adapters = [*adapters]
        self._trains_shared = any(adapter.trains_shared for adapter in present)

    def __call__(
        self,
        input_TH: torch.Tensor,
        probs_T: torch.Tensor,
        restored: RestoredExperts,
        tokens_C: Sequence[int],
    ) -> torch.Tensor:
        if self.config.moe_apply_probs_on_input:
            input_TH = (probs_T.unsqueeze(-1) * input_TH).to(input_TH.dtype)
            probs_T = torch.ones_like(probs_T)
        needs_grad = restored.trains or input_TH.requires_grad or probs_T.requires_grad
        if self._trains_shared and not needs_grad:
            # No other gradient would end the use of the restored weights in backward.
            input_TH = input_TH.detach().requires_grad_(torch.is_grad_enabled())
        (input_TH, probs_T), placeholders = restored.before_compute(input_TH, probs_T)

        def product(input_TK: torch.Tensor, at: int, gemm: SlotGemm) -> torch.Tensor:
            return slot_linear(input_TK, placeholders[at], restored, at, tokens_C, gemm)

        def linear(
            layer: int, input_TK: torch.Tensor, bias_scale_T: torch.Tensor | None = None
        ) -> torch.Tensor:
            at = self._first_matrix(layer)
            output_TR = product(input_TK, at, self._gemms[layer])
            if (adapter := self.adapters[layer]) is not None:
                first, gemm = at + 1 + self.has_bias, self._gemms[layer]
                added_TR = adapter.output(
                    input_TK, lambda hidden, index: product(hidden, first + index, gemm)
                )
                output_TR = output_TR if added_TR is None else output_TR + added_TR
            if not self.has_bias:
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
            return output_TH
        return linear(1, self._activate(hidden_TF, probs_T), probs_T)

    def _first_matrix(self, layer: int) -> int:
        """Return the position of a layer's matrix, which its bias and adapters follow."""
        before = [adapter for adapter in self.adapters[:layer] if adapter is not None]
        return layer * (1 + int(self.has_bias)) + sum(len(adapter.homes) for adapter in before)

    def _activate(self, hidden_TF: torch.Tensor, probs_T: torch.Tensor) -> torch.Tensor:
        if not len(hidden_TF):  # torch compiles Megatron's fused activations anew for no rows
            return hidden_TF[:, : self.linears[1].columns].clone()
        output_TF, bias = self.activation(hidden_TF, probs_T)
        assert bias is None
        activated: torch.Tensor = output_TF
        return activated


class _PassOn(torch.nn.Module):
    """Identity in place of a linear layer of Megatron's MLP; refuses adapters such as LoRA."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"a linear layer of experts has no {name!r}: {ADAPTED}") from error

    def forward(self, input_TK: torch.Tensor) -> tuple[torch.Tensor, None]:
        return input_TK, None
