"""CPU fixes of Megatron's paths that need Transformer Engine or Apex; needs `cuda.py` before."""

import contextlib
import copy
import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch

from megatron_laer.releases import INFERENCE_LINEARS

_async_loop: Callable[..., None] | None = None


def fix() -> None:
    """Apply all fixes. Imports `megatron.core`."""
    _fix_norm()
    _fix_hybrid_norm()
    _fix_attention()
    _fix_latent_projections()
    _fix_multi_token_prediction()
    _fix_expert_bias()
    _fix_output_discarding()
    _fix_optimizer_load()
    _fix_async_saves()
    _fix_warnings()


def _fix_norm() -> None:
    from megatron.core.transformer import torch_norm

    stock = torch_norm.WrappedTorchNorm.__new__

    # Megatron's torch norm refuses sequence parallelism because nothing marks its parameters. With
    # the mark, their gradients are summed over the tensor-parallel group like the fused norms'.
    @functools.wraps(stock)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        norm: torch.nn.Module = stock(cls, unsplit, *args, **kwargs)
        parameter: Any
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = staticmethod(new)


def _fix_hybrid_norm() -> None:
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # HybridModel's final norm is always Transformer Engine's.
    hybrid_block.TENorm = WrappedTorchNorm


def _fix_attention() -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    stock_init, stock_forward = DotProductAttention.__init__, DotProductAttention.forward

    # Without Transformer Engine, attention refuses a sequence that is cut over context-parallel
    # ranks. With keys and values of the whole sequence it works: Megatron cuts the mask by its
    # queries. It also lacks the sizes of a head's keys and values, which differ in latent
    # attention. Its computation fits any, and its outputs are as wide as values.
    @functools.wraps(stock_init)
    def init(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        uncut = copy.copy(config)
        uncut.context_parallel_size = 1
        stock_init(self, uncut, *args, **kwargs)
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    @functools.wraps(stock_forward)
    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.config.context_parallel_size > 1:
            assert mask is not None, "context parallelism on the CPU needs masks from the loader"
            group = parallel_state.get_context_parallel_group()
            key, value = _whole_sequence(key, group), _whole_sequence(value, group)
        output: torch.Tensor = stock_forward(self, query, key, value, mask, *args, **kwargs)
        return output

    DotProductAttention.__init__ = init
    DotProductAttention.forward = forward


def _whole_sequence(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Gather the sequence `[s, …]`; rank r of n holds pieces r and 2n - 1 - r of 2n."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    gathered = gather_from_sequence_parallel_region(part.contiguous(), group=group)
    pieces = gathered.chunk(2 * group.size())
    return torch.cat([*pieces[0::2], *reversed(pieces[1::2])])


def _fix_latent_projections() -> None:
    from megatron.core.transformer.moe import moe_layer

    if moe_layer.HAVE_TE:
        return
    # Megatron requires Transformer Engine's linear layer for projections to a latent space.
    moe_layer.HAVE_TE = True
    moe_layer.TELinear = DuplicatedLinear


def _fix_multi_token_prediction() -> None:
    from megatron.core.tensor_parallel import inference_layers

    if inference_layers.HAVE_TE or not INFERENCE_LINEARS.is_in(inference_layers):
        return
    # Megatron tests for instances of these names, which are no classes without Transformer Engine.
    inference_layers.InferenceColumnParallelLinear = ()
    inference_layers.InferenceLayerNormColumnParallelLinear = ()


def _fix_expert_bias() -> None:
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    stock = RowParallelLinear.__init__

    # Under sequence parallelism Megatron adds up the gradients of marked biases over tensor ranks.
    # Unlike Transformer Engine's, its own linear layers also mark biases of experts, which differ
    # between these ranks.
    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if self.is_expert and self.bias is not None:
            self.bias.sequence_parallel = False

    RowParallelLinear.__init__ = init


def _fix_output_discarding() -> None:
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE:
        return
    # Recomputation of norms asks Transformer Engine for fp8, even if it is not installed.
    random.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = lambda **_: contextlib.nullcontext()
    random.fp8_autocast = lambda **_: contextlib.nullcontext()


class DuplicatedLinear(torch.nn.Module):
    """Replacement of Transformer Engine's linear layer for latent projections; not sharded."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, **_: Any
    ) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype)
        )
        self.weight = weight
        if config.perform_initialization:
            init_method(self.weight)
        # With sequence parallelism each rank has only its own tokens' gradient.
        weight.sequence_parallel = config.sequence_parallel
        weight.allreduce = True

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the output, and None for the bias, by Megatron's convention."""
        return torch.nn.functional.linear(input, self.weight), None


def _fix_optimizer_load() -> None:
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    stock_state_dict = optimizer.state_dict
    stock_load = optimizer.load_state_dict
    stock_set = optimizer._set_main_param_and_optimizer_states

    # Before a load Megatron reads the step from torch's Adam, which has none until its first step.
    # A text key passes through Adam's state_dict; it is removed again at once.
    @functools.wraps(stock_state_dict)
    def state_dict(self: Any) -> Any:
        state = self.optimizer.state
        if state or not any(group["params"] for group in self.optimizer.param_groups):
            return stock_state_dict(self)
        state["not stepped yet"] = {"step": torch.zeros(())}
        try:
            return stock_state_dict(self)
        finally:
            state.clear()

    # Megatron gives all parameters one step tensor, which Adam would then count up once for each.
    # Its fp32 shards are views of parameters, so autograd forbids the copy without `no_grad`.
    @functools.wraps(stock_load)
    @torch.no_grad()
    def load_state_dict(self: Any, loaded: Any) -> None:
        stock_load(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    # The step comes from the parameter groups; checkpoints have none per parameter, or a stale one.
    # Megatron does not load values that are no tensors.
    @functools.wraps(stock_set)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        stock_set(self, model_param, tensors | {"step": None})

    optimizer.state_dict = state_dict
    optimizer.load_state_dict = load_state_dict
    optimizer._set_main_param_and_optimizer_states = set_states


def _fix_async_saves() -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    global _async_loop
    _async_loop = PersistentAsyncCaller.async_loop
    PersistentAsyncCaller.async_loop = staticmethod(_run_async_worker)


def _run_async_worker(*args: Any) -> None:
    """Replace `torch.cuda`, then run the worker of async saves, which is pickled by this name."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from megatron_laer.cpu import cuda

    cuda.replace()
    (_async_loop or PersistentAsyncCaller.async_loop)(*args)


def _fix_warnings() -> None:
    # One generator stands for both here, so every draw for "the GPU" changes the CPU's.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
