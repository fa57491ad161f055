"""Modes that `--fsep-allow-unproven` names, in Megatron's loop with Transformer Engine's layers.

These tests have not been run yet.
"""

from __future__ import annotations

import pytest
import torch

from megatron_laer.layer.experts.gemm import gemm_names, slot_gemm
from tests.gpu.two_ranks import RECOMPUTE, Train, trainer
from tests.slot_gemm import COLUMNS, ROWS, SPLITS, check_back_end, check_weight_grad

WARMUP = 3
# The first layer is dense.
MODEL = (
    "--transformer-impl transformer_engine --num-layers 3 --moe-layer-freq ([0]*1+[1]*2)"
    " --moe-ffn-hidden-size 512 --no-gradient-accumulation-fusion --no-rope-fusion"
)
HOMES = " --fsep-sharding experts --fsep-set restore_algorithm="
GRAPHS = (
    " --fsep-allow-unproven te-graphs --cuda-graph-impl transformer_engine"
    f" --cuda-graph-warmup-steps {WARMUP} --cuda-graph-modules "
)
FP8 = " --fsep-allow-unproven dense-fp8 --fp8-format hybrid --fp8-recipe "
BOTH = " --fsep-allow-unproven te-graphs dense-fp8"  # of several, the last one counts


@pytest.fixture(autouse=True)
def needs_transformer_engine() -> None:
    """Import it here, since every session collects this file."""
    pytest.importorskip("transformer_engine.pytorch")


@pytest.fixture(scope="module")
def train(text_data: str) -> Train:
    return trainer(text_data, MODEL)


@pytest.mark.parametrize(
    ("modules", "extra"),
    [("attn", ""), ("attn", RECOMPUTE), ("moe_router", ""), ("attn moe_router mlp", "")],
)
def test_graphs_change_losses_by_rounding_at_most(modules: str, extra: str, train: Train) -> None:
    plain, _ = train(extra)
    graphed, output = train(extra + GRAPHS + modules)
    assert "Time spent in CUDA Graphs capture" in output
    assert "--fsep-allow-unproven te-graphs: nobody has run" in output
    assert graphed == pytest.approx(plain, rel=5e-3)
    assert graphed[-1] < 0.9 * graphed[0]


@pytest.mark.parametrize("gemm", ["", " --moe-grouped-gemm"], ids=["sequential", "grouped"])
@pytest.mark.parametrize("algorithm", ["flat", "node"])
def test_experts_at_home_train_as_stock_does(algorithm: str, gemm: str, train: Train) -> None:
    stock, _ = train(f" --expert-parallel-mode standard{gemm}")
    at_home, _ = train(HOMES + algorithm + gemm)
    assert at_home == pytest.approx(stock, rel=5e-3)
    assert at_home[-1] < 0.9 * at_home[0]


def cannot_compute(recipe: str) -> str | None:
    """Return the reason why this card cannot compute in fp8 by this recipe; None if it can."""
    from transformer_engine.pytorch import fp8

    asked = {
        "delayed": fp8.check_fp8_support,
        "tensorwise": fp8.check_fp8_support,
        "blockwise": fp8.check_fp8_block_scaling_support,
        "mxfp8": fp8.check_mxfp8_support,
    }
    can, why = asked[recipe]()
    return None if can else why


@pytest.mark.parametrize("extra", ["", RECOMPUTE], ids=["plain", "recompute"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_of_dense_layers_trains_as_bf16_does(recipe: str, extra: str, train: Train) -> None:
    if why := cannot_compute(recipe):
        pytest.skip(why)
    plain, _ = train(extra)
    losses, output = train(extra + FP8 + recipe)
    assert "--fsep-allow-unproven dense-fp8: nobody has run" in output
    assert losses != plain, "fp8 had no effect"
    assert losses == pytest.approx(plain, rel=5e-2)
    assert losses[-1] < 0.9 * losses[0]


def test_fp8_and_graphs_train_together(train: Train) -> None:
    if why := cannot_compute("tensorwise"):
        pytest.skip(why)
    losses, output = train(GRAPHS + "attn moe_router" + FP8 + "tensorwise" + BOTH)
    assert "Time spent in CUDA Graphs capture" in output
    assert losses == pytest.approx(train("")[0], rel=5e-2)


@pytest.mark.parametrize("name", gemm_names())
def test_fp8_does_not_reach_the_products_of_experts(name: str) -> None:
    from transformer_engine.pytorch import fp8_autocast

    if why := cannot_compute("delayed"):
        pytest.skip(why)
    device, gemm = torch.device("cuda"), slot_gemm(name)
    if (problem := gemm.problem(device, torch.bfloat16, (ROWS, COLUMNS))) is not None:
        pytest.skip(f"{name}: {problem}")
    for tokens_C in SPLITS.values():
        with fp8_autocast(enabled=True):
            check_back_end(gemm, torch.bfloat16, device, tokens_C)
            for out_dtype in (torch.bfloat16, torch.float32):
                check_weight_grad(gemm, torch.bfloat16, out_dtype, device, tokens_C)
