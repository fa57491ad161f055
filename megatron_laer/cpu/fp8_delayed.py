"""Replacement of Transformer Engine's delayed scaling in experts on the CPU.

A scale follows from largest absolute values (amax) of earlier microbatches. They are maxima
over Megatron's group. As in Transformer Engine, forward's scales change where the outermost context
of fp8 ends, and backward's after the first linear layer's backward. A checkpoint's re-run has the
scales of the first pass and adds to no amax, but it is such a context itself. Weights are quantised
once per step. Saved models have scales and histories in Megatron's `_extra_state`.

Legend: R rows of a matrix (output features), K columns, n tokens of one expert.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_laer.cpu import fp8
from megatron_laer.cpu.fp8_parameters import Fp8Parameter

_LARGEST = torch.finfo(torch.float32).max
# Scales of tokens in first passes of checkpoints, for their re-runs; None for the scale in force.
KeptScales = deque[Sequence[torch.Tensor | None]]


class Scaling:
    """Scale of one operand and its last amaxes, the present one first."""

    def __init__(self, dtype: torch.dtype, history: int) -> None:
        self.dtype = dtype
        self.scale = torch.ones(1)
        self.amaxes = torch.zeros(history)

    def quantised(self, matrix_RK: torch.Tensor) -> fp8.Quantised:
        """Quantise by the scale in force, and note the amax for the next one."""
        self.move_to(matrix_RK.device)
        if matrix_RK.numel():
            amax = matrix_RK.detach().abs().amax().float()
            self.amaxes[0] = torch.maximum(self.amaxes[0], amax)
        return fp8.by_scale(matrix_RK, self.scale, self.dtype)

    def update(self, algorithm: str, margin: int) -> None:
        amax = self.amaxes.max() if algorithm == "max" else self.amaxes[0].clone()
        self.amaxes = torch.roll(self.amaxes, -1)
        self.amaxes[0] = 0.0
        # A number over a tensor would be rounded twice.
        scale = torch.full_like(amax, torch.finfo(self.dtype).max) / amax / 2.0**margin
        scale = scale.clamp(max=_LARGEST).view(1)
        self.scale = torch.where((amax > 0) & amax.isfinite(), scale, self.scale)

    def move_to(self, device: torch.device) -> None:
        """Follow the model, which Megatron moves after it has built it."""
        if self.scale.device != device:
            self.scale, self.amaxes = self.scale.to(device), self.amaxes.to(device)


class LinearScalings:
    """State of one home expert's linear layer: scalings of its operands, and its weight in fp8.

    Replicas of experts at the same place of other ranks use it too.
    """

    def __init__(self, layer: Any, forward: torch.dtype, backward: torch.dtype) -> None:
        history = layer.config.fp8_amax_history_len
        self._layer = layer
        self.input, self.weight = Scaling(forward, history), Scaling(forward, history)
        self.grad = Scaling(backward, history)
        self.kept_scales: KeptScales = deque()
        self._of_step: fp8.Quantised | None = None

    @property
    def _all(self) -> tuple[Scaling, ...]:
        return self.input, self.weight, self.grad

    def at_home(self, weight_RK: torch.Tensor) -> fp8.Quantised:
        """Return the step's weight, quantised by its first microbatch or by the optimizer."""
        if isinstance(weight_RK, Fp8Parameter):
            return weight_RK.in_fp8()
        if self._of_step is None or self._layer.is_first_microbatch:
            self._of_step = self.weight.quantised(weight_RK)
            self._layer.is_first_microbatch = False
        return self._of_step

    def sent(self, weight_RK: torch.Tensor) -> fp8.Quantised:
        """Return the weight that the home has used in this step, or is about to use."""
        if isinstance(weight_RK, Fp8Parameter):
            return weight_RK.in_fp8()
        if self._of_step is None or self._layer.is_first_microbatch:
            return self.weight.quantised(weight_RK)
        return self._of_step

    def saved(self) -> torch.Tensor:
        return torch.cat([part for each in self._all for part in (each.scale, each.amaxes)])

    def load(self, saved: torch.Tensor) -> None:
        for each, part in zip(self._all, saved.chunk(len(self._all)), strict=True):
            each.scale, each.amaxes = part[:1].clone(), part[1:].clone()


@dataclass(frozen=True)
class DelayedParameter:
    """Recipe of a parameter in fp8, by the scale in force."""

    scaling: Scaling
    weight: None = None
    backward_weight: None = None

    @property
    def forward(self) -> torch.dtype:
        return self.scaling.dtype

    def quantised(self, weight_RK: torch.Tensor, _dtype: Any, _block: Any) -> fp8.Quantised:
        return self.scaling.quantised(weight_RK)


class DelayedPass:
    """Products of one pass through an expert's linear layer, with the methods of `Recipe`.

    Backward multiplies the operands of forward, whose scales may have changed since. `scale` is
    that of tokens in a checkpoint's re-run.
    """

    def __init__(self, scalings: LinearScalings, scale: torch.Tensor | None = None) -> None:
        self._scalings, self._scale = scalings, scale
        self._input: torch.Tensor | None = None

    def weight_again(self, weight_RK: torch.Tensor, *, in_backward: bool = False) -> torch.Tensor:
        scalings = self._scalings
        of_step = scalings.sent if in_backward else scalings.at_home
        return fp8.dequantised(of_step(weight_RK))

    def product(self, input_nK: torch.Tensor, weight_RK: torch.Tensor) -> torch.Tensor:
        of_input = self._scalings.input
        self._input = fp8.dequantised(
            of_input.quantised(input_nK)
            if self._scale is None
            else fp8.by_scale(input_nK, self._scale, of_input.dtype)
        )
        return (self._input @ weight_RK.t()).to(input_nK.dtype)

    def input_grad(self, grad_nR: torch.Tensor, weight_RK: torch.Tensor) -> torch.Tensor:
        return (self._grad(grad_nR) @ weight_RK).to(grad_nR.dtype)

    def weight_grad(self, grad_nR: torch.Tensor, input_nK: torch.Tensor) -> torch.Tensor:
        assert self._input is not None, "backward without forward"
        return (self._grad(grad_nR).t() @ self._input).to(grad_nR.dtype)

    def _grad(self, grad_nR: torch.Tensor) -> torch.Tensor:
        return fp8.dequantised(self._scalings.grad.quantised(grad_nR))


class ScalingContext:
    """All scalings of this rank, and the contexts of fp8 at whose ends they change."""

    def __init__(self) -> None:
        self._layers: list[LinearScalings] = []
        self._config: Any = None
        self._device = torch.device("cpu")
        self._depth = 0
        self._awaits_first = False
        self._awaited_first: deque[bool] = deque()  # in first passes of checkpoints
        self._is_checkpointed = self._is_rerun = False

    def add(self, scalings: LinearScalings, config: Any) -> None:
        self._layers.append(scalings)
        self._config = config

    def end_step(self) -> None:
        """Forget first passes whose re-runs never came."""
        self._awaited_first.clear()
        for scalings in self._layers:
            scalings.kept_scales.clear()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self._awaits_first |= self._depth == 0
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0 and torch.is_grad_enabled():
            self._update([each for of in self._layers for each in (of.input, of.weight)])

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Run a checkpoint's function in this context, first without autograd and again with it."""
        if not self._layers:  # another recipe
            yield
            return
        self._is_checkpointed, self._is_rerun = True, torch.is_grad_enabled()
        if self._is_rerun:
            self._awaits_first = self._awaited_first.popleft()
        else:
            self._awaited_first.append(self._awaits_first)
        try:
            with self.entered() if self._is_rerun else contextlib.nullcontext():
                yield
        finally:
            self._is_checkpointed = self._is_rerun = False

    def passes(self, of: Sequence[LinearScalings], kept: KeptScales) -> list[DelayedPass]:
        """Return a pass through each linear layer; a re-run has the scales kept by the first."""
        scales: Sequence[torch.Tensor | None] = [None] * len(of)
        if self._is_rerun:
            scales = kept.popleft()
        elif self._is_checkpointed:
            kept.append([each.input.scale.clone() for each in of])
        return [DelayedPass(*both) for both in zip(of, scales, strict=True)]

    def before_linear(self, input: torch.Tensor) -> torch.Tensor:
        """Mark the input of a context's first linear layer, whose gradient is backward's last."""
        self._device = input.device
        if not self._awaits_first or not (input.requires_grad and torch.is_grad_enabled()):
            return input
        self._awaits_first = False
        marked: torch.Tensor = _UpdateInBackward.apply(input, self)
        return marked

    def update_backward(self) -> None:
        self._update([of.grad for of in self._layers])

    def _update(self, scalings: list[Scaling]) -> None:
        from megatron.core import parallel_state

        if not scalings:
            return
        group = parallel_state.get_amax_reduction_group(
            with_context_parallel=True, tp_only_amax_red=self._config.tp_only_amax_red
        )
        for each in scalings:
            each.move_to(self._device)
        amaxes = torch.stack([each.amaxes[0] for each in scalings])
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
        for each, amax in zip(scalings, amaxes, strict=True):
            each.amaxes[0] = amax
            each.update(self._config.fp8_amax_compute_algo, self._config.fp8_margin)


class _UpdateInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, scalings: ScalingContext) -> torch.Tensor:
        ctx.scalings = scalings
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.scalings.update_backward()
        return grad, None
