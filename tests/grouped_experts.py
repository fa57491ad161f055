"""Linear layers of grouped experts without Transformer Engine, for Megatron's own `TEGroupedMLP`.

They have Transformer Engine's names (`weight0`, `bias0`, …), arguments and results. As with its
fused accumulation, weights' gradients are added to main gradients in backward. Imports none of our
own code.

Legend: E experts of a layer here, T tokens, R rows of a matrix, K columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class GroupedLinear(torch.nn.Module):
    """Linear layers of E experts on consecutive rows of tokens; no tensor-parallel cuts."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self._returns_bias = num_gemms, skip_bias_add
        self.config, self._groups = config, pg_collection
        self._has_bias = bias
        for expert in range(num_gemms):
            weight = torch.empty(output_size, input_size, dtype=config.params_dtype)
            self.register_parameter(f"weight{expert}", torch.nn.Parameter(weight))
            init_method(weight)
            if bias:
                zeros = torch.zeros(output_size, dtype=config.params_dtype)
                self.register_parameter(f"bias{expert}", torch.nn.Parameter(zeros))
        for parameter in self.parameters():
            parameter.allreduce = not (is_expert and config.expert_model_parallel_size > 1)  # type: ignore[attr-defined]

    def forward(self, input_TK: torch.Tensor, splits_E: list[int]) -> tuple[torch.Tensor, Any]:
        """Return the output [T, R], and the biases of all experts if the caller adds them."""
        output_TR = _Products.apply(input_TK, splits_E, *self._all("weight"))
        if not self._has_bias:
            return output_TR, None
        biases = self._all("bias")
        if self._returns_bias:
            return output_TR, biases
        parts = zip(output_TR.split(splits_E), biases, strict=True)
        return torch.cat([part + bias for part, bias in parts]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the parameters, saved as those of a sequence of experts."""
        ranks, rank = self._groups.ep.size(), self._groups.ep.rank()
        found = {}
        for name, parameter in self.named_parameters():
            kind = name.rstrip("0123456789")
            expert = rank * self.num_gemms + int(name.removeprefix(kind))
            (entry,) = make_sharded_tensors_for_checkpoint(
                {kind: parameter},
                prefix,
                {},
                (*sharded_offsets, (len(sharded_offsets), expert, ranks * self.num_gemms)),
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            ).values()
            entry.replica_id = (*entry.replica_id[:2], self._groups.expt_dp.rank())
            found[f"{prefix}{name}"] = entry
        return found

    def backward_dw(self) -> None: ...

    def _all(self, kind: str) -> list[torch.nn.Parameter]:
        return [self.get_parameter(f"{kind}{expert}") for expert in range(self.num_gemms)]


class _Products(torch.autograd.Function):
    """Products of tokens and weights of all experts, one node as Transformer Engine's."""

    @staticmethod
    def forward(
        ctx: Any, input_TK: torch.Tensor, splits_E: Sequence[int], *weights: torch.nn.Parameter
    ) -> torch.Tensor:
        ctx.save_for_backward(input_TK)
        ctx.splits_E, ctx.weights = splits_E, weights
        parts = zip(input_TK.split(splits_E), weights, strict=True)
        return torch.cat([part_nK @ weight.t() for part_nK, weight in parts])

    @staticmethod
    def backward(ctx: Any, grad_TR: torch.Tensor) -> tuple[Any, ...]:
        (input_TK,) = ctx.saved_tensors
        grads = grad_TR.split(ctx.splits_E)
        grad_input_TK = torch.cat([g @ w for g, w in zip(grads, ctx.weights, strict=True)])
        of_weights = []
        for grad_nR, part_nK, weight in zip(
            grads, input_TK.split(ctx.splits_E), ctx.weights, strict=True
        ):
            if weight.requires_grad:
                weight.main_grad += grad_nR.t() @ part_nK
                weight.grad_added_to_main_grad = True
            of_weights.append(torch.zeros_like(weight) if weight.requires_grad else None)
        return grad_input_TK, None, *of_weights


@contextlib.contextmanager
def grouped() -> Iterator[None]:
    """Let layer specs without Transformer Engine build grouped experts in this context."""
    parts = GroupedMLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
    builder = partial(TEGroupedMLP, submodules=parts)
    with mock.patch.object(LocalSpecProvider, "grouped_mlp_modules", lambda *_: builder):
        yield
