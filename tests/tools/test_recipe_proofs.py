"""A run is proved by a row that has its features together, and the rows are those of the table."""

from __future__ import annotations

from argparse import Namespace

from megatron_laer.tools.recipes.proof import FILE, proof_of, proved_rows
from tests import proved_rows as today


def test_the_shipped_rows_are_those_of_the_parity_table():
    text = FILE.read_text(encoding="utf-8")
    assert text == today.text(), "python -m tests.proved_rows writes the file of today"


def test_a_row_proves_a_run_whose_features_it_has_together():
    found = proof_of(Namespace(tensor_model_parallel_size=2, use_distributed_optimizer=True))
    assert (found.row, found.is_replaced) == ("qwen3", True)
    assert str(found).startswith("proved by row 'qwen3' on the CPU, where replacements")
    plain = proof_of(Namespace())
    assert str(plain) == "proved by row 'plain' on the CPU"


def test_without_such_a_row_the_pairs_are_named_that_no_row_has():
    settings = {"bf16": True, "moe_router_load_balancing_type": "sinkhorn"}
    found = proof_of(Namespace(**settings))
    assert (found.row, found.no_row) == ("", ())
    assert found.no_row_together == ("bf16 + sinkhorn router",)
    assert str(found).endswith("; 1 pair of them without a row: bf16 + sinkhorn router")
    sparse = proof_of(Namespace(**settings, experimental_attention_variant="dsa"))
    assert sparse.no_row == ("sparse attention",)
    assert sparse.no_row_together == found.no_row_together
    assert str(sparse).startswith("no row has sparse attention; each other feature proved by a row")


def test_pairs_alone_prove_no_run():
    rows = [row for row in proved_rows() if {"bf16", "pipeline"} <= row.features]
    balanced = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
    found = proof_of(Namespace(bf16=True, pipeline_model_parallel_size=2, **balanced))
    assert rows and (found.row, found.no_row_together) == ("", ())
    assert str(found).endswith("; no row has all of them")


def test_many_pairs_stay_on_one_line():
    found = proof_of(Namespace(bf16=True, fp16=True, mtp_num_layers=1))
    assert found.no_row == ("fp16",)
    parallel = ("tensor_model", "pipeline_model", "context")
    sizes = {f"{name}_parallel_size": 2 for name in parallel}
    switches = dict.fromkeys("bf16 multi_latent_attention moe_permute_fusion".split(), True)
    many = proof_of(Namespace(**sizes, **switches))
    assert len(many.no_row_together) > 6
    assert str(many).endswith(f" and {len(many.no_row_together) - 6} more")
    assert str(many).count(" + ") == 6


def test_a_recipe_of_fp8_proves_no_other():
    in_mx, by_blocks = (
        Namespace(fp8="e4m3", fp8_recipe=recipe) for recipe in ("mxfp8", "blockwise")
    )
    assert (proof_of(in_mx).row, proof_of(by_blocks).row) == ("fp8-mx", "fp8-flex")
    assert proof_of(Namespace(fp8="hybrid")).no_row == ("fp8 delayed",)
    assert proof_of(Namespace(fp8="hybrid", fp8_recipe="custom")).no_row == ("fp8 custom",)
    kept = Namespace(fp8="hybrid", fp8_recipe="tensorwise", fp8_param_gather=True)
    assert proof_of(kept).no_row_together == ("fp8 tensorwise + parameters in fp8",)
