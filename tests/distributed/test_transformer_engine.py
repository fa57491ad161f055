"""Transformer Engine's layers accept ours, as far as this shows without a GPU: nothing is computed.

Skipped, with the reason, where Transformer Engine is not installed or cannot be imported.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.processes import finished

pytestmark = pytest.mark.nightly

_PACKAGE = "transformer_engine"
LINEAR_LAYERS = {"TELayerNormColumnParallelLinear", "TERowParallelLinear"}


@pytest.fixture(scope="module", autouse=True)
def needs_transformer_engine() -> None:
    """Import it in a process of its own, since it loads CUDA libraries."""
    if importlib.util.find_spec(_PACKAGE) is None:
        pytest.skip("Transformer Engine is not installed")
    found = finished("-c", f"import {_PACKAGE}.pytorch")
    if found.returncode:
        pytest.skip(f"Transformer Engine cannot be imported: {found.stderr.strip()[-500:]}")


def describe(fp8: str | None) -> dict[str, Any]:
    """Build a model with two MoE layers, and Transformer Engine's on the meta device."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.cuda_graphs import _layer_is_graphable
    from megatron.core.transformer.enums import CudaGraphModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    import megatron_laer
    from megatron_laer.cpu.training import fresh_megatron
    from megatron_laer.layer.moe_layer import FSEPMoELayer

    model: list[torch.nn.Module] = []
    with fresh_megatron(model):
        torch.distributed.init_process_group("gloo")
        words = ["te-graphs"] + (["dense-fp8"] if fp8 else [])
        settings = megatron_laer.FSEPConfig(sharding="rows", allow_unproven=words)
        megatron_laer.enable(settings, seed=1)
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            ffn_hidden_size=96,
            num_moe_experts=8,
            moe_ffn_hidden_size=96,
            moe_router_topk=2,
            moe_token_dispatcher_type="alltoall",
            moe_shared_expert_intermediate_size=32,
            expert_model_parallel_size=2,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            normalization="RMSNorm",
            bf16=True,
            params_dtype=torch.bfloat16,
            init_model_with_meta_device=True,
            fp8=fp8,
            cuda_graph_impl="transformer_engine",
            cuda_graph_modules=[CudaGraphModule.attn, CudaGraphModule.moe_router],
        )
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
        built = GPTModel(config, spec, vocab_size=128, max_sequence_length=32)
        model.append(built)

        layers = [part for part in built.modules() if isinstance(part, FSEPMoELayer)]
        experts = [layer.experts for layer in layers]
        return {
            "MoE layers": len(layers),
            "of Transformer Engine": _parts_of(built, _PACKAGE),
            "devices": sorted(
                {
                    weight.device.type
                    for part in built.modules()
                    if type(part).__name__ in LINEAR_LAYERS
                    for weight in part.parameters()
                }
            ),
            "in experts": [_parts_of(module, _PACKAGE) for module in experts],
            "slices": [[tuple(part.shape) for part in module.slices()] for module in experts],
            "dtypes": sorted({str(part.dtype) for m in experts for part in m.slices()}),
            "graphable": sum(_layer_is_graphable(layer, config) for layer in built.decoder.layers),
            "hooked": [type(block).__name__ for block in _chunk_of(built)],
        }


def _parts_of(module: Any, package: str) -> list[str]:
    return sorted(
        {
            type(part).__name__
            for part in module.modules()
            if any(kind.__module__.startswith(package) for kind in type(part).__mro__)
        }
    )


def _chunk_of(built: Any) -> Any:
    from megatron_laer.plugin.steps import _chunk

    return _chunk(built).blocks


@pytest.mark.parametrize("fp8", [None, "hybrid"], ids=["bf16", "fp8"])
def test_layers_of_transformer_engine_are_built_around_ours(
    fp8: str | None, ranks: RankPools
) -> None:
    for found in ranks(2).run(describe, fp8):
        assert found["MoE layers"] == 2
        assert set(found["of Transformer Engine"]) >= LINEAR_LAYERS
        assert found["devices"] == ["meta"]
        # Only modules of Transformer Engine compute in fp8.
        assert found["in experts"] == [[], []]
        assert found["slices"] == [[(8, 96, 64), (8, 32, 96)]] * 2
        assert found["dtypes"] == ["torch.bfloat16"]
        assert found["graphable"] == 2
        assert found["hooked"] == [], "Transformer Engine captures no module with hooks"
