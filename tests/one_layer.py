"""One FSEP layer, or several, on one rank alone or on all of a pool, for a GPU or none.

Command lines refuse a single rank, since no other rank shares the experts. A layer built by itself
runs all its code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

EXPERTS, CAPACITY, HIDDEN, TOKENS = 4, 4, 32, 24

# Host operations for the device in a layer's forward and backward pass.
HostWork = tuple[list[str], list[str]]

# Kinds of layers in which Megatron's part differs.
MODELS: dict[str, dict[str, Any]] = {
    "no shared experts": {},
    "shared experts": {"moe_shared_expert_intermediate_size": 16},
    "shared experts that overlap": {
        "moe_shared_expert_intermediate_size": 16,
        "moe_shared_expert_overlap": True,
    },
}


WAIT, UPLOAD = "the host waits", "upload"
FOR_TOKEN_SIZES = "for the sizes of token exchanges"

EXPECTED: dict[str, HostWork] = {
    "rank": ([WAIT, UPLOAD], []),
    "node": ([WAIT, UPLOAD, FOR_TOKEN_SIZES, WAIT, UPLOAD], []),
}
"""By the exchange of tokens.

In a forward pass the host waits for counts and uploads what it planned. Tokens that go through
nodes need another wait, for sizes, and another upload behind it. In backward there is nothing.
"""


class _Chunk(torch.nn.Module):
    """Layers one after the other, whose restores run ahead; perhaps the last one twice."""

    def __init__(self, layers: list[torch.nn.Module], *, repeats: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self._passed = [*layers, layers[-1]] if repeats else layers

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        for layer in self._passed:
            hidden = torch.tanh(layer(hidden)[0])
        return hidden, None


@contextlib.contextmanager
def one_layer(
    backend: str,
    model: str,
    token_exchange: str = "rank",
    *,
    layers: int = 1,
    repeats: bool = False,
    **more: Any,
) -> Iterator[Any]:
    """Build a layer in Megatron's data-parallel wrapper; `more` are fields of `FSEPConfig`.

    Args:
        layers: of them; 0 for one outside of the wrapper, whose gradients autograd keeps.
        repeats: whether the last one is passed twice, as in multi-token prediction.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    import megatron_laer

    size = int(os.environ.get("WORLD_SIZE", "1"))
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **(alone if size == 1 else {}))
    settings: dict[str, Any] = {"capacity": CAPACITY, "token_exchange": token_exchange, **more}
    megatron_laer.enable(megatron_laer.FSEPConfig(node_size=1, **settings), seed=1)
    try:
        parallel_state.initialize_model_parallel(expert_model_parallel_size=size)
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=layers or 1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            num_moe_experts=EXPERTS,
            moe_ffn_hidden_size=HIDDEN,
            moe_router_topk=2,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=1e-2,
            moe_token_dispatcher_type="alltoall",
            add_bias_linear=False,
            expert_model_parallel_size=size,
            expert_tensor_parallel_size=1,
            params_dtype=torch.float32,
            mtp_num_layers=2 if repeats else None,
            mtp_use_repeated_layer=repeats,
            **MODELS[model],
        )
        spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
        numbers = range(1, config.num_layers + 1)
        of_mtp = [repeats and number == layers for number in numbers]
        parts = [
            build_module(spec, config=config, layer_number=number, is_mtp_layer=is_mtp).mlp.cuda()
            for number, is_mtp in zip(numbers, of_mtp, strict=True)
        ]
        chunk = parts[0] if len(parts) == 1 else _Chunk(parts, repeats=repeats)
        ddp_config = DistributedDataParallelConfig()
        yield DistributedDataParallel(config, ddp_config, chunk) if layers else chunk
    finally:
        megatron_laer.disable()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def naming_token_sizes(done: list[str]) -> Iterator[None]:
    """Append a name before the wait for the sizes of token exchanges."""
    from megatron_laer.runtime.comm.collectives import TokenSizesExchange

    wait = TokenSizesExchange._wait_for_token_sizes

    def named(exchange: Any, read: Any) -> Any:
        done.append(FOR_TOKEN_SIZES)
        return wait(exchange, read)

    with mock.patch.object(TokenSizesExchange, "_wait_for_token_sizes", named):
        yield


def host_work(
    layer: Any, watched: Callable[[], AbstractContextManager[list[str]]], steps: int = 3
) -> list[HostWork]:
    """Train the layer; return the host's operations in each step but the first.

    The first step is not watched: it makes buffers, and Megatron's scale of auxiliary losses.
    `watched` is a context in which waits and uploads are appended to its list.
    """
    import megatron_laer

    device = torch.cuda.current_device()
    found = []
    for step in range(steps + 1):
        hidden = torch.randn(TOKENS, 1, HIDDEN, device=device, requires_grad=True)
        grad = torch.ones_like(hidden)
        with megatron_laer.training_step(step, 1):
            layer.zero_grad_buffer()
            with watched() if step else contextlib.nullcontext([]) as done:
                output, _ = layer(hidden)
                forward = [*done]
                output.backward(grad)
            found.append((forward, done[len(forward) :]))
        assert hidden.grad is not None and bool(hidden.grad.any())
    return found[1:]
