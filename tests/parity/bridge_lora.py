"""LoRA on experts as Megatron-Bridge adds it, without Megatron-Bridge.

Classes have its names, attributes and results, as far as FSEP and Megatron use them. The nightly
`tests/distributed/test_bridge_lora.py` runs the same rows with Megatron-Bridge's own classes.

Legend: h home experts, T tokens, R output features, K input features, q the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tests.parity.adapted import let_layers_be_checkpoints, lora_on_attention

RANK, ALPHA = 4, 8


class LoRALinear(torch.nn.Module):
    """Linear layer with an adapter, whose parameters keep the layer's names in checkpoints."""

    def __init__(self, to_wrap: torch.nn.Module, adapter: torch.nn.Module) -> None:
        super().__init__()
        self.to_wrap, self.adapter = to_wrap, adapter
        self._adapter_enabled = True

    def forward(self, input: torch.Tensor, *args: Any) -> Any:
        output, bias = self.to_wrap(input, *args)
        return (output + self.added(input, *args) if self._adapter_enabled else output), bias

    def added(self, input: torch.Tensor, *args: Any) -> torch.Tensor:
        added: torch.Tensor = self.adapter(input, *args)
        return added

    def sharded_state_dict(self, prefix: str = "", **more: Any) -> dict[str, Any]:
        inner: Any = self.to_wrap
        outer: Any = self.adapter
        return {
            **inner.sharded_state_dict(prefix, **more),
            **outer.sharded_state_dict(f"{prefix}adapter.", **more),
        }

    def state_dict(self, *, destination: Any, prefix: str, keep_vars: bool) -> Any:  # type: ignore[override]
        self.to_wrap.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        self.adapter.state_dict(
            destination=destination, prefix=f"{prefix}adapter.", keep_vars=keep_vars
        )
        return destination


class LoRALinearSplitFC1UpGate(LoRALinear):
    def added(self, input: torch.Tensor, *args: Any) -> torch.Tensor:
        adapters: Any = self.adapter
        parts = [adapters[name](input, *args) for name in ("adapter_gate", "adapter_up")]
        return torch.cat(parts, dim=-1)


class _Adapters(torch.nn.ModuleDict):
    def sharded_state_dict(self, prefix: str = "", **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, adapter in self.items():
            part: Any = adapter
            found |= part.sharded_state_dict(f"{prefix}{name}.", **more)
        return found


class _Adapter(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.alpha = RANK, ALPHA
        self.activation = torch.nn.Identity()
        self.dropout = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()


class ParallelLinearAdapter(_Adapter):
    """Adapter of one expert, or with `shared` of all experts of all ranks."""

    def __init__(
        self,
        columns: int,
        rows: int,
        config: Any,
        *,
        shared: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dropout)
        self.linear_in = _narrow(columns, RANK, config, gathers=True)
        self.linear_out = _narrow(RANK, rows, config)
        if shared:
            for parameter in self.parameters():
                parameter.register_hook(_sum_over_experts)

    def forward(self, input: torch.Tensor, *_: Any) -> torch.Tensor:
        hidden, _ = self.linear_in(self.dropout(input))
        output, _ = self.linear_out(hidden)
        scaled: torch.Tensor = output * (self.alpha / self.dim)
        return scaled

    def sharded_state_dict(self, prefix: str = "", **more: Any) -> dict[str, Any]:
        return {
            **self.linear_in.sharded_state_dict(f"{prefix}linear_in.", **more),
            **self.linear_out.sharded_state_dict(f"{prefix}linear_out.", **more),
        }


class GroupedExpertLinearAdapter(_Adapter):
    """Adapters of the grouped experts of a rank, one for each expert."""

    def __init__(self, columns: int, rows: int, config: Any, num_experts: int) -> None:
        super().__init__()
        self.linear_in = _Packed(num_experts, RANK, columns, config)
        self.linear_out = _Packed(num_experts, rows, RANK, config)

    def forward(self, input_TK: torch.Tensor, splits_h: Sequence[int]) -> torch.Tensor:
        output_TR: torch.Tensor = self.linear_out(self.linear_in(input_TK, splits_h), splits_h)
        return output_TR * (self.alpha / self.dim)


class _Packed(torch.nn.Module):
    def __init__(self, num_experts: int, rows: int, columns: int, config: Any) -> None:
        super().__init__()
        weight_hRK = torch.zeros(num_experts, rows, columns, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight_hRK)
        self.weight.allreduce = False  # type: ignore[attr-defined]

    def forward(self, input_TK: torch.Tensor, splits_h: Sequence[int]) -> torch.Tensor:
        parts = zip(input_TK.split(list(splits_h)), self.weight, strict=True)
        return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts])


def _narrow(columns: int, rows: int, config: Any, *, gathers: bool = False) -> Any:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear

    return ColumnParallelLinear(
        columns,
        rows,
        config=config,
        bias=False,
        gather_output=gathers,
        init_method=torch.nn.init.zeros_,
        is_expert=True,
        tp_group=parallel_state.get_expert_tensor_parallel_group(),
    )


def _sum_over_experts(grad: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state

    summed = grad.clone()
    dist.all_reduce(summed, group=parallel_state.get_expert_model_parallel_group())
    return summed


def adapt_experts(
    model: torch.nn.Module,
    linears: Sequence[str] = ("linear_fc1", "linear_fc2"),
    *,
    canonical: bool = False,
    shared: bool = False,
    dropout: float = 0.0,
) -> None:
    """Freeze a model, and adapt these linear layers of its experts.

    Args:
        canonical: adapt both halves of a gated first layer apart, of experts in a sequence.
        shared: let grouped experts share one adapter.
    """
    model.requires_grad_(False)
    for name, module in [*model.named_modules()]:
        if ".experts" not in name or not (hasattr(module, "linear_fc1")):
            continue
        parent: Any = module
        for linear in linears:
            inner = getattr(parent, linear)
            setattr(parent, linear, _wrapped(linear, inner, canonical, shared, dropout))


def _wrapped(name: str, linear: Any, canonical: bool, shared: bool, dropout: float) -> LoRALinear:
    is_grouped = hasattr(linear, "num_gemms")
    rows, columns = (linear.weight0 if is_grouped else linear.weight).shape
    config = linear.config
    if is_grouped and not shared:
        packed = GroupedExpertLinearAdapter(columns, rows, config, linear.num_gemms)
        return LoRALinear(linear, packed)
    if canonical and name == "linear_fc1":
        parts = {
            part: ParallelLinearAdapter(columns, rows // 2, config, dropout=dropout)
            for part in ("adapter_up", "adapter_gate")
        }
        return LoRALinearSplitFC1UpGate(linear, _Adapters(parts))
    adapter = ParallelLinearAdapter(columns, rows, config, shared=shared, dropout=dropout)
    return LoRALinear(linear, adapter)


# The rows' changes of a model: functions of their own, since rows go by these names.


def lora_on_experts(model: torch.nn.Module) -> None:
    adapt_experts(model)


def lora_of_each_kind(model: torch.nn.Module) -> None:
    """Adapt attention, and experts' first matrices, their second ones, or canonically both."""
    lora_on_attention(model)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers: Any = model.get_submodule("decoder.layers")
    adapt_experts(layers[0], ["linear_fc1"])
    adapt_experts(layers[1], ["linear_fc2"])
    adapt_experts(layers[2], canonical=True)
    for parameter in adapters:
        parameter.requires_grad_()


def lora_on_experts_under_recompute(model: torch.nn.Module) -> None:
    """Adapt experts where layers are checkpoints, which need an input that needs a gradient."""
    adapt_experts(model)
    let_layers_be_checkpoints(model)
