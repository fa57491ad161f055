"""Megatron's own linear layers with the delayed weight gradients of Transformer Engine's.

A layer's backward keeps its weight gradients, and `backward_dw` hands them over and runs the hooks
of Megatron's data-parallel wrapper, in the order of Transformer Engine. Imports none of our own
code.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from tests.doubles.fusions import mark_added

FLAGS = {
    "--delay-wgrad-compute": "delay_wgrad_compute",
    "--overlap-dispatch-backward-with-experts-wgrad": (
        "overlap_dispatch_backward_with_experts_wgrad"
    ),
}


class _Keep(torch.autograd.Function):
    """Identity of a weight, whose gradient is kept."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, kept: deque[torch.Tensor], fuses: bool
    ) -> torch.Tensor:
        ctx.kept, ctx.fused = kept, weight if fuses else None
        return weight.detach()  # in fp8 still, where it is

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.kept.append(grad)
        if ctx.fused is None:
            return None, None, None
        return mark_added(ctx.fused, grad), None, None


class _Delaying:
    """First base of a linear layer; the second is Megatron's."""

    weight: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: deque[torch.Tensor] = deque()
        self._hooks: list[Callable[[], None]] = []
        config = kwargs["config"]
        self._delays = config.delay_wgrad_compute or (
            kwargs["is_expert"] and config.overlap_dispatch_backward_with_experts_wgrad
        )
        self._fuses = config.gradient_accumulation_fusion
        if self._delays:
            self.weight.skip_backward_post_hook = True

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def backward_dw(self) -> None:
        if not self._delays or not self._kept:
            return
        grad, weight = self._kept.popleft(), self.weight
        if self._fuses or not self._hooks:
            weight.main_grad.add_(grad)
            weight.grad_added_to_main_grad = True
        else:
            weight.grad = grad
        for hook in self._hooks:
            hook()

    def _with_kept_grad(self, weight: Any) -> Any:
        delays = self._delays and weight.requires_grad
        return _Keep.apply(weight, self._kept, self._fuses) if delays else weight


class _OfMegatron(_Delaying):
    def _forward_impl(self, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        megatrons: Any = super()
        if self._delays:  # its product is not to add anything by itself
            kwargs["gradient_accumulation_fusion"] = False
        return megatrons._forward_impl(input, self._with_kept_grad(weight), *args, **kwargs)


class ColumnLinear(_OfMegatron, layers.ColumnParallelLinear): ...


class RowLinear(_OfMegatron, layers.RowParallelLinear): ...


class _OfLatent(_Delaying):
    """That of a projection of latent MoE."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(input, self._with_kept_grad(self.weight)), None


@contextlib.contextmanager
def delayed_weights() -> Iterator[None]:
    """Let Megatron accept its flags of delayed weight gradients, and build these layers."""
    from megatron.core.transformer import multi_latent_attention, transformer_config
    from megatron.core.transformer.moe import moe_layer
    from megatron.training import arguments

    def experts(provider: Any, *_: Any) -> Any:
        parts = MLPSubmodules(
            linear_fc1=ColumnLinear,
            linear_fc2=RowLinear,
            activation_func=provider.activation_func(),
        )
        return partial(SequentialMLP, submodules=parts)

    def accepting(validate: Callable[..., Any]) -> Callable[..., Any]:
        def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
            given = {name: getattr(args, name) for name in FLAGS.values()}
            args.delay_wgrad_compute = False  # needs --transformer-impl transformer_engine
            validated = validate(args, *rest, **kwargs)
            vars(validated).update(given)
            return validated

        return validate_args

    with contextlib.ExitStack() as stack:
        for name, replacement in (
            ("column_parallel_linear", lambda _: ColumnLinear),
            ("row_parallel_linear", lambda _: RowLinear),
            ("grouped_mlp_modules", experts),
        ):
            stack.enter_context(mock.patch.object(LocalSpecProvider, name, replacement))
        stack.enter_context(
            mock.patch.object(transformer_config, "is_te_min_version", lambda *_, **__: True)
        )
        # Projections of latent MoE, and of latent attention, which accepts classes that it knows.
        latent = type("LatentLinear", (_OfLatent, moe_layer.TELinear), {})
        for module, name, replacement in (
            (moe_layer, "TELinear", latent),
            (multi_latent_attention, "ColumnParallelLinear", ColumnLinear),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        changed = accepting(arguments.validate_args)
        stack.enter_context(mock.patch.object(arguments, "validate_args", changed))
        yield
