"""Recipes are judged by training's table, and fields that cannot be judged are quoted."""

from __future__ import annotations

import pytest

from megatron_laer.choices import Unproven
from megatron_laer.tools.cli.check_recipe import STATUS
from megatron_laer.tools.recipes.verdict import Verdict
from tests.bridge_table import COLUMNS, judge_recipe

NAME = "megatron.bridge.recipes.qwen.h100.qwen3_moe:qwen3_30b_a3b_pretrain_8gpu_h100_bf16_config"
NONE = dict.fromkeys(COLUMNS, "") | {
    "pool": "pretrain",
    "recipe": NAME,
    "EP": "4",
    "precision": "bf16_mixed",
    "optimizer": "opt:distributed_fused_adam_with_cosine_annealing",
}
GPT_OSS = "megatron.bridge.recipes.gpt_oss.h100.gpt_oss:gpt_oss_20b_pretrain_fp8mx_config"
NANO = "megatron.bridge.recipes.nemotronh.h100.nemotron_3_nano:nemotron_3_nano_pretrain_config"
SUPER = "megatron.bridge.recipes.nemotronh.h100.nemotron_3_super:nemotron_3_super_sft_config"
KIMI = "megatron.bridge.recipes.kimi.h100.kimi_k2:kimi_k2_pretrain_config"
DEEPSEEK_V4 = "megatron.bridge.recipes.deepseek.h100.deepseek_v4:deepseek_v4_flash_sft_config"
GLM5 = "megatron.bridge.perf_recipes.glm_moe_dsa.h100.glm5:glm51_sft_416gpu_h100_bf16_config"
PERF = "megatron.bridge.perf_recipes"
PERF_V3 = f"{PERF}.deepseek.b200.deepseek_v3:deepseek_v3_pretrain_256gpu_b200_bf16_config"
OLMOE = "megatron.bridge.recipes.olmoe.h100.olmoe_7b:olmoe_7b_peft_1gpu_h100_bf16_config"

SELECTIVE = {"recompute": "selective"}
GRAPHS = {"cuda_graph_impl": "transformer_engine"}
PADDING = "--moe-router-padding-for-quantization"

# Recipes that run and have a row for each feature.
RUN: dict[str, dict[str, str]] = {
    "as it is": {},
    "flex": {"dispatcher": "flex"},
    "combined 1F1B": {"ep_overlap": "True", "delay_wgrad": "True", "dispatcher": "flex"},
    "tensor parallel": {"TP": "2"},
    "moe_act": SELECTIVE | {"recompute_modules": "['moe_act', 'moe']"},
    "latent attention": SELECTIVE | {"recipe": KIMI, "recompute_modules": "['mla_up_proj']"},
    "scope without graphs": {"cuda_graph_scope": "full"},
    "fp8, current scaling": {"precision": "fp8_cs"},
    "mxfp8": {"precision": "bf16_with_mxfp8_mixed"},
    "fp8 by blocks": {"precision": "bf16_with_fp8_subchannel_scaling_mixed"},
    "graphs": GRAPHS | {"cuda_graph_scope": "['attn', 'moe_router', 'moe_preprocess']"},
    "Muon": {"optimizer": "muon"},
    "Muon, distributed": {"optimizer": "opt:distributed_muon_with_cosine_annealing"},
    "a performance recipe": {"recipe": PERF_V3, "pool": "perf"},
    "LoRA on attention": {"pool": "peft"},
    "LoRA on experts": {"pool": "peft", "recipe": OLMOE},
    "LoRA on all": {"recipe": PERF_V3.replace("pretrain", "peft"), "pool": "perf"},
}
# Recipes that run but have a feature without a row.
UNPROVED = {NANO: "Mamba layers", SUPER: "Mamba layers", GLM5: "sparse attention"}
# Fields, verdict, quoted fields, and those of them to remove: all, or these.
OTHERS: dict[str, tuple[dict[str, str], Verdict, list[str], list[str] | None]] = {
    "unproved module": (
        SELECTIVE | {"recompute_modules": "['moe', 'mhc']"},
        Verdict.REFUSED,
        ["--recompute-modules moe mhc with --recompute-granularity selective: no test"],
        [],
    ),
    "what no release of Megatron builds": (
        {"recipe": DEEPSEEK_V4, "precision": "fp8_mx"},
        Verdict.REFUSED,
        ["hash routing, compressed sparse attention and hyper-connections of DeepSeek-V4: mega"],
        [],
    ),
    "no expert parallelism": (
        {"EP": "", "cuda_graph_impl": "local"},
        Verdict.SET_EP,
        ["--expert-model-parallel-size 1", "--cuda-graph-impl local"],
        ["--cuda-graph-impl"],
    ),
    "overlap and graphs": (
        GRAPHS | {"ep_overlap": "True", "delay_wgrad": "True", "cuda_graph_scope": "['attn']"},
        Verdict.SPEED_ONLY,
        [
            "--cuda-graph-impl transformer_engine: nobody",
            "--cuda-graph-modules attn: losses blew up",
        ],
        ["--cuda-graph-impl", "--cuda-graph-modules"],
    ),
    "graphs of whole layers": (
        GRAPHS | {"cuda_graph_scope": "full"},
        Verdict.SPEED_ONLY,
        ["--cuda-graph-impl transformer_engine", "--cuda-graph-modules full"],
        None,
    ),
    "fp8": (
        {"precision": "fp8_ds"},
        Verdict.PRECISION,
        ["--fp8-format hybrid", "--fp8-recipe delayed with --fp8-format hybrid and --fsep-allow"],
        ["--fp8-format"],
    ),
    "fp4": (
        {"precision": "bf16_with_nvfp4_mixed"},
        Verdict.PRECISION,
        ["--fp4-format e2m1"],
        None,
    ),
    "gpt-oss in fp8": (
        {"recipe": GPT_OSS, "precision": "fp8_ds"},
        Verdict.PRECISION,
        ["--fp8-format hybrid", f"{PADDING} with fp8", "--fp8-recipe delayed"],
        ["--fp8-format", PADDING],
    ),
    "expert tensor parallel": (
        {"ETP": "2"},
        Verdict.REFUSED,
        ["--expert-tensor-parallel-size 2"],
        [],
    ),
    "LoRA on experts, combined 1F1B": (
        {"pool": "peft", "recipe": OLMOE, "ep_overlap": "True"},
        Verdict.REFUSED,
        ["LoRA on linear_fc1 and linear_fc2, which experts have too, with --overlap-moe"],
        [],
    ),
}


@pytest.mark.parametrize("case", RUN)
def test_a_recipe_that_runs_has_a_row_for_each_feature(case):
    found = judge_recipe(NONE | RUN[case])
    assert found.verdict is Verdict.RUNS and found.proof and found.proof.no_row == ()
    assert (*found.because, *found.drop) == ()


@pytest.mark.parametrize("precision", ["fp8_cs", "fp8_sc", "fp8_mx"])
def test_experts_in_fp8_run_with_their_word(precision):
    found = judge_recipe(NONE | {"precision": precision})
    assert found.verdict is Verdict.RUNS and found.allow == (Unproven.FP8_EXPERTS,)


@pytest.mark.parametrize("recipe", UNPROVED)
def test_a_recipe_that_runs_without_a_row_is_said_to(recipe):
    found = judge_recipe(NONE | {"recipe": recipe})
    assert (found.verdict, found.drop, found.because) == (Verdict.RUNS, (), ())
    assert found.proof.no_row == (UNPROVED[recipe],)


@pytest.mark.parametrize("case", OTHERS)
def test_a_recipe_that_cannot_run_as_it_is_quotes_the_fields(case):
    fields, verdict, because, drop = OTHERS[case]
    found = judge_recipe(NONE | fields)
    flags = [reason.partition(" ")[0].rstrip(":") for reason in because]
    assert (found.verdict, [*found.drop]) == (verdict, flags if drop is None else drop)
    assert len(found.because) == len(because), found.because
    assert all(map(str.startswith, found.because, because)), found.because
    has_proof = verdict in (Verdict.SPEED_ONLY, Verdict.PRECISION)
    assert (found.proof is not None and found.proof.no_row == ()) is has_proof


@pytest.mark.parametrize(
    "recipe",
    [
        "recipes.qwen.gb200.qwen3_moe:qwen3_30b_a3b_pretrain_8gpu_gb200_fp8mx_functional_config",
        "perf_recipes.nemotronh.vr200.nemotronh:nemotron_3_super_pretrain_64gpu_vr200_fp8mx_config",
    ],
)
def test_dropping_what_is_named_is_what_the_verdict_promises(recipe):
    found = judge_recipe(NONE | {"recipe": f"megatron.bridge.{recipe}", "precision": "fp8_mx"})
    assert found.verdict is Verdict.SPEED_ONLY
    assert found.drop == ("--moe-mlp-glu-interleave-size", "--use-transformer-engine-op-fuser")


def test_gradients_that_are_reduced_early_are_told_from_those_that_are_not():
    name = "overlap_dispatch_backward_with_experts_wgrad"
    found = judge_recipe(NONE | {name: "True"})
    assert (found.verdict, *found.drop) == (Verdict.SPEED_ONLY, f"--{name.replace('_', '-')}")
    found = judge_recipe(NONE | {name: "True", "overlap_grad_reduce": "False"})
    assert found.verdict is Verdict.RUNS
    recipe = f"{PERF}.qwen_vl.h100.qwen35_vl:qwen35_vl_35b_a3b_pretrain_16gpu_h100_bf16_config"
    found = judge_recipe(NONE | {"recipe": recipe})
    assert found.verdict is Verdict.RUNS
    assert any("behind the dispatch" in pair for pair in found.proof.no_row_together)


# Fields without a column in the tables of recipes; their functions set them at 067f987d.
OFFLOADING, FSDP = "--fine-grained-activation-offloading", "--use-megatron-fsdp"
UNSAID = {
    "deepseek.gb200.deepseek_v3:deepseek_v3_pretrain_256gpu_gb200_fp8mx_partial_cg_dev": OFFLOADING,
    "deepseek.gb300.deepseek_v3:deepseek_v3_pretrain_128gpu_gb300_fp8mx_hsdp": FSDP,
    "nemotronh.gb200.nemotronh:nemotron_3_ultra_pretrain_256gpu_gb200_fp8mx": FSDP,
    "nemotronh.h100.nemotronh:nemotron_3_super_pretrain_64gpu_h100_bf16": (
        "--moe-expert-capacity-factor"
    ),
    "nemotronh.h100.nemotronh:nemotron_3_5_lightning_pretrain_16gpu_h100_bf16": OFFLOADING,
}


@pytest.mark.parametrize("recipe", UNSAID)
def test_settings_that_no_column_has_are_known_of_their_recipes(recipe):
    found = judge_recipe(NONE | {"recipe": f"{PERF}.{recipe}_config", "pool": "perf"})
    assert found.verdict is Verdict.REFUSED
    assert any(reason.startswith(UNSAID[recipe]) for reason in found.because), found.because


def test_every_verdict_has_a_status_of_its_own_and_none_is_that_of_an_error():
    assert set(STATUS) == set(Verdict)
    assert len(set(STATUS.values()) | {2}) == len(Verdict) + 1
    assert STATUS[Verdict.RUNS] == 0
