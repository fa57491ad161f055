"""Products in fp8 by Transformer Engine with delayed scaling.

A scale follows from the largest absolute values (amax) of earlier microbatches, which the modules
of home experts keep. Megatron reduces them over a group that contains the FSEP group, so homes with
one number have one scale on all ranks. A replica takes this rank's quantisers of its home's number:
they have its scale. Their amax is a maximum over all calls, and replicas' tokens and gradients join
it before the reduction. A checkpoint's re-run has the scales of the first pass and leaves amax as
it is, as in the modules. Backward may change scales after a module's own: homes compute first in
forward, and so after replicas in backward. An input without a gradient would turn this order round,
so that `homes.py` refuses it.

Legend: C slots, T tokens received. R rows of a matrix (output features), K columns.
"""

from __future__ import annotations

import copy
import importlib
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from megatron_laer.layer.experts.fp8.padding import padded, padded_sizes
from megatron_laer.layer.experts.fp8.te import TENSORS, Needs, PerTensor

_INPUT, _WEIGHT, _GRAD = ("scaling_fwd", 0), ("scaling_fwd", 1), ("scaling_bwd", 0)
# Quantisers of one GEMM, by Transformer Engine's modules: input, weight, output; gradients of both.
_PER_GEMM = {"scaling_fwd": 3, "scaling_bwd": 2}


class Delayed(PerTensor):
    """Per-tensor scales by the state of stock's modules of home experts."""

    _module = f"{TENSORS}.float8_tensor"
    _checkpoints = "transformer_engine.pytorch.distributed"
    needs: ClassVar[Needs] = {
        (_module, "Float8Quantizer"): {"scale", "amax", "fp8_dtype", "rowwise", "columnwise"},
        **{key: value for key, value in PerTensor.needs.items() if "Storage" in key[1]},
        (_checkpoints, "is_fp8_activation_recompute_enabled"): set(),
        (_checkpoints, "in_fp8_activation_recompute_phase"): set(),
    }

    def __init__(self, config: Any, rows: int, columns: int) -> None:
        super().__init__(config, rows, columns)
        self._modules: Sequence[Any] = ()
        self._homes_C: Sequence[int] = ()
        self._input_scales: list[torch.Tensor] = []
        # Of first passes of checkpoints whose re-runs are to come; copies of this object share it.
        self._kept_scales: deque[list[torch.Tensor]] = deque()

    def attach(self, modules: Sequence[torch.nn.Module]) -> None:
        self._modules = modules

    def for_slots(self, homes_C: Sequence[int]) -> Delayed:
        one_pass = copy.copy(self)
        one_pass._homes_C = homes_C
        return one_pass

    def end_step(self) -> None:
        self._kept_scales.clear()

    def pack(self, weight_RK: torch.Tensor, home: int = 0) -> torch.Tensor:
        """Return the payload of the weight that the home uses in this step.

        The step's first microbatch quantises it, and later ones keep these bytes, though the scale
        changes. A parameter in fp8 has its own.
        """
        own: Any = weight_RK
        if isinstance(weight_RK, self._tensors.Float8Tensor):
            return self._form.pack(own._data, own._scale_inv)
        module, gemm = self._module_of(home)
        kept = module._fp8_workspaces.get(f"weight{gemm}" if self._is_grouped else "weight")
        if kept is not None and not module.is_first_microbatch:
            return self._form.pack(kept._data, kept._scale_inv)
        quantise = self._quantiser_of(home, _WEIGHT, weight_RK.device)
        quantise.set_usage(rowwise=True, columnwise=False)
        made = quantise(weight_RK)
        return self._form.pack(made._data, made._scale_inv)

    def _inputs(
        self, input_TK: torch.Tensor, tokens_C: Sequence[int], *, by_columns: bool = False
    ) -> list[Any]:
        device = input_TK.device
        quantisers = [self._quantiser_of(home, _INPUT, device) for home in self._homes_C]
        checkpoints = importlib.import_module(self._checkpoints)
        is_rerun = checkpoints.in_fp8_activation_recompute_phase()
        if not by_columns:
            is_first = not is_rerun and checkpoints.is_fp8_activation_recompute_enabled()
            self._input_scales = (
                self._kept_scales.popleft()
                if is_rerun
                else [quantise.scale.clone() for quantise in quantisers]
            )
            if is_first:
                self._kept_scales.append(self._input_scales)
        # Backward's operand is forward's, whose scale may have changed since.
        if by_columns or is_rerun:
            for quantise, scale in zip(quantisers, self._input_scales, strict=True):
                quantise.scale, quantise.amax = scale, torch.zeros_like(quantise.amax)
        return self._by_slot(quantisers, input_TK, tokens_C, by_columns)

    def _grads(
        self, grad_TR: torch.Tensor, tokens_C: Sequence[int], *, by_columns: bool = False
    ) -> list[Any]:
        device = grad_TR.device
        quantisers = [self._quantiser_of(home, _GRAD, device) for home in self._homes_C]
        return self._by_slot(quantisers, grad_TR, tokens_C, by_columns)

    def _by_slot(
        self,
        quantisers: Sequence[Any],
        tokens_TK: torch.Tensor,
        tokens_C: Sequence[int],
        by_columns: bool,
    ) -> list[Any]:
        padded_UK = padded(tokens_TK, tokens_C, self.multiple)
        parts = padded_UK.split(padded_sizes(tokens_C, self.multiple))
        for quantise in quantisers:
            quantise.set_usage(rowwise=True, columnwise=by_columns)
        pairs = zip(quantisers, parts, strict=True)
        return [quantise(part_nK) for quantise, part_nK in pairs if len(part_nK)]

    def _quantiser_of(self, home: int, which: tuple[str, int], device: torch.device) -> Any:
        """Return a copy with the scale and amax of a home's own, whose usage stays as it is."""
        module, gemm = self._module_of(home)
        direction, at = which
        if found := module.quantizers[direction]:
            own = found[gemm * _PER_GEMM[direction] + at]
            scale, amax = own.scale, own.amax
        else:  # modules make theirs at their first forward, with these values
            scale = torch.ones(1, dtype=torch.float32, device=device)
            amax = torch.zeros_like(scale)
        kind = self._backward_kind if which == _GRAD else self._forward_kind
        return self._tensors.Float8Quantizer(
            scale=scale, amax=amax, fp8_dtype=kind, rowwise=True, columnwise=True
        )

    @property
    def _is_grouped(self) -> bool:
        return hasattr(self._modules[0], "num_gemms")

    def _module_of(self, home: int) -> tuple[Any, int]:
        """Return the home's module, and the number of its GEMM there."""
        return (self._modules[0], home) if self._is_grouped else (self._modules[home], 0)
