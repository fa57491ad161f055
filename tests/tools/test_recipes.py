"""Recipes are judged by training's table, and fields that cannot be judged are quoted."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_laer.support.refusal import LeftOut
from megatron_laer.support.table import REFUSALS
from megatron_laer.tools import cli
from megatron_laer.tools.cli.check_recipe import STATUS
from megatron_laer.tools.recipes.bridge_table import COLUMNS, judge_recipe
from megatron_laer.tools.recipes.families import IMPLIED, implied_by
from megatron_laer.tools.recipes.verdict import Verdict, judge

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

# Fields of a recipe; verdict, features without a row (None if no proof is known), quoted fields,
# and fields to remove.
JUDGED: dict[str, tuple[dict[str, str], Verdict, tuple[str, ...] | None, list[str], list[str]]] = {
    "as it is": ({}, Verdict.RUNS, (), [], []),
    "flex": ({"dispatcher": "flex"}, Verdict.RUNS, (), [], []),
    "tensor parallel": ({"TP": "2"}, Verdict.RUNS, (), [], []),
    "moe_act": (
        {"recompute": "selective", "recompute_modules": "['moe_act', 'moe']"},
        Verdict.RUNS,
        (),
        [],
        [],
    ),
    "unproved module": (
        {"recompute": "selective", "recompute_modules": "['moe', 'mhc']"},
        Verdict.REFUSED,
        None,
        ["--recompute-modules moe mhc: no test proves"],
        [],
    ),
    "latent attention": (
        {"recipe": KIMI, "recompute": "selective", "recompute_modules": "['mla_up_proj']"},
        Verdict.RUNS,
        (),
        [],
        [],
    ),
    "what no release of Megatron builds": (
        {"recipe": DEEPSEEK_V4, "precision": "fp8_mx"},
        Verdict.REFUSED,
        None,
        ["hash routing, compressed sparse attention and hyper-connections of DeepSeek-V4: mega"],
        [],
    ),
    "no expert parallelism": (
        {"EP": "", "ep_overlap": "True"},
        Verdict.SET_EP,
        None,
        ["--expert-model-parallel-size 1", "--overlap-moe-expert-parallel-comm"],
        ["--overlap-moe-expert-parallel-comm"],
    ),
    "overlap": (
        {"ep_overlap": "True", "delay_wgrad": "True", "dispatcher": "flex"},
        Verdict.SPEED_ONLY,
        (),
        ["--delay-wgrad-compute: ", "--overlap-moe-expert-parallel-comm: "],
        ["--delay-wgrad-compute", "--overlap-moe-expert-parallel-comm"],
    ),
    "graphs": (
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "['attn']"},
        Verdict.SPEED_ONLY,
        (),
        ["--cuda-graph-impl transformer_engine"],
        ["--cuda-graph-impl"],
    ),
    "graphs of whole layers": (
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "full"},
        Verdict.SPEED_ONLY,
        (),
        ["--cuda-graph-impl transformer_engine", "--cuda-graph-modules full"],
        ["--cuda-graph-impl", "--cuda-graph-modules"],
    ),
    "scope without graphs": ({"cuda_graph_scope": "full"}, Verdict.RUNS, (), [], []),
    "fp8": (
        {"precision": "fp8_mx", "delay_wgrad": "True"},
        Verdict.PRECISION,
        (),
        ["--fp8-format e4m3", "--delay-wgrad-compute"],
        ["--fp8-format", "--delay-wgrad-compute"],
    ),
    "fp4": (
        {"precision": "bf16_with_nvfp4_mixed"},
        Verdict.PRECISION,
        (),
        ["--fp4-format e2m1"],
        ["--fp4-format"],
    ),
    "gpt-oss in fp8": (
        {"recipe": GPT_OSS, "precision": "bf16_with_mxfp8_mixed"},
        Verdict.PRECISION,
        (),
        ["--fp8-format e4m3", "--moe-router-padding-for-quantization with fp8"],
        ["--fp8-format", "--moe-router-padding-for-quantization"],
    ),
    "Muon": ({"optimizer": "muon"}, Verdict.RUNS, (), [], []),
    "Muon, shared among replicas": (
        {"optimizer": "opt:distributed_muon_with_cosine_annealing"},
        Verdict.RUNS,
        (),
        [],
        [],
    ),
    "expert tensor parallel": (
        {"ETP": "2"},
        Verdict.REFUSED,
        None,
        ["--expert-tensor-parallel-size 2"],
        [],
    ),
    "HybridModel": (
        {"recipe": NANO},
        Verdict.RUNS,
        ("Mamba layers",),
        [],
        [],
    ),
    "repeated MTP": (
        {"recipe": SUPER},
        Verdict.RUNS,
        ("Mamba layers",),
        [],
        [],
    ),
    "sparse attention": ({"recipe": GLM5}, Verdict.RUNS, ("sparse attention",), [], []),
    "a performance recipe": ({"recipe": PERF_V3, "pool": "perf"}, Verdict.RUNS, (), [], []),
    "LoRA among performance recipes": (
        {"recipe": PERF_V3.replace("pretrain", "peft"), "pool": "perf"},
        Verdict.REFUSED,
        None,
        ["LoRA on linear_fc1 and linear_fc2"],
        [],
    ),
    "of a family that nobody has read": (
        {"recipe": "megatron.bridge.recipes.new.h100.new_7b:new_7b_pretrain_config"},
        Verdict.RUNS,
        None,
        ["its fields alone were judged"],
        [],
    ),
    "LoRA on attention": ({"pool": "peft"}, Verdict.RUNS, (), [], []),
    "LoRA on experts": (
        {"pool": "peft", "recipe": OLMOE},
        Verdict.REFUSED,
        None,
        ["LoRA on linear_fc1 and linear_fc2"],
        [],
    ),
}


@pytest.mark.parametrize("case", JUDGED)
def test_a_recipe_is_judged_by_its_fields_and_its_model(case: str) -> None:
    fields, verdict, proof, because, drop = JUDGED[case]
    found = judge_recipe(NONE | fields)
    no_row = found.proof.no_row if found.proof else None
    assert (found.verdict, no_row, list(found.drop)) == (verdict, proof, drop)
    assert len(found.because) == len(because), found.because
    assert all(map(str.startswith, found.because, because)), found.because


def test_dropping_what_is_named_is_what_the_verdict_promises() -> None:
    row = next(row for row in IMPLIED if "use_transformer_engine_op_fuser" in row.settings)
    recipe = f"qwen3_moe{row.recipes.strip('$')}"
    assert row in implied_by(recipe)
    found = judge_recipe(NONE | {"recipe": recipe})
    assert found.verdict is Verdict.SPEED_ONLY
    assert found.drop == ("--moe-mlp-glu-interleave-size", "--use-transformer-engine-op-fuser")


def test_a_dense_model_is_refused_and_not_sent_to_expert_parallelism() -> None:
    settings = Namespace(num_experts=None, expert_model_parallel_size=1)
    found = judge(settings)
    assert found.verdict is Verdict.REFUSED
    assert "no experts" in found.because[0]


def test_speed_only_are_the_settings_that_leave_the_model_as_it_is() -> None:
    of = {kind: {row.flag for row in REFUSALS if row.left_out is kind} for kind in LeftOut}
    assert of[LeftOut.SPEED] == {
        "--moe-expert-rank-capacity-factor",
        "--enable-cuda-graph",
        "--external-cuda-graph",
        "--cuda-graph-impl",
        "--cuda-graph-modules",
        "--delay-wgrad-compute",
        "--overlap-dispatch-backward-with-experts-wgrad",
        "--overlap-moe-expert-parallel-comm",
        "--moe-mlp-glu-interleave-size",
        "--use-transformer-engine-op-fuser",
        "--moe-use-grouped-tensor",
        "--use-grouped-gemm-for-shared-expert",
        "--moe-shared-expert-glu-interleave-size",
        "--moe-paged-stash",
    }
    assert of[LeftOut.PRECISION] == {
        "--fp8-format",
        "--fp4-format",
        "--fp8-param-gather",
        "--fp4-param-gather",
        "--moe-dispatch-fwd-dtype",
        "--moe-combine-bwd-dtype",
        "--moe-router-padding-for-quantization",
    }


# Fields without a column in the tables of recipes; their functions set them at 067f987d.
UNSAID = {
    "deepseek.gb200.deepseek_v3:deepseek_v3_pretrain_256gpu_gb200_fp8mx_partial_cg_dev_config": (
        "--fine-grained-activation-offloading"
    ),
    "deepseek.gb300.deepseek_v3:deepseek_v3_pretrain_128gpu_gb300_fp8mx_hsdp_config": (
        "--use-megatron-fsdp"
    ),
    "nemotronh.gb200.nemotronh:nemotron_3_ultra_pretrain_256gpu_gb200_fp8mx_config": (
        "--use-megatron-fsdp"
    ),
    "nemotronh.h100.nemotronh:nemotron_3_super_pretrain_64gpu_h100_bf16_config": (
        "--moe-expert-capacity-factor"
    ),
    "nemotronh.h100.nemotronh:nemotron_3_5_lightning_pretrain_16gpu_h100_bf16_config": (
        "--fine-grained-activation-offloading"
    ),
}


@pytest.mark.parametrize("recipe", UNSAID)
def test_settings_that_no_column_has_are_known_of_their_recipes(recipe: str) -> None:
    found = judge_recipe(NONE | {"recipe": f"{PERF}.{recipe}", "pool": "perf"})
    assert found.verdict is Verdict.REFUSED
    assert any(reason.startswith(UNSAID[recipe]) for reason in found.because), found.because


def test_a_verdict_names_the_settings_that_it_does_not_know() -> None:
    found = judge_recipe(NONE)
    assert {"moe_expert_capacity_factor", "use_megatron_fsdp"} < {*found.if_none_of}
    assert "moe_token_dispatcher_type" not in found.if_none_of
    assert judge_recipe(NONE | {"EP": "1"}).if_none_of == ()
    given = dict.fromkeys(found.if_none_of, "")
    assert judge_recipe(NONE | given).if_none_of == ()
    # Each of them would have changed the verdict.
    for name in found.if_none_of:
        value = "1.25" if "factor" in name else "32" if "size" in name or "num" in name else "True"
        # Router padding is for fp8 alone.
        fields = NONE | ({"precision": "fp8_mx"} if "padding_for" in name else {})
        before, after = judge_recipe(fields), judge_recipe(fields | {name: value})
        assert (before.verdict, before.drop) != (after.verdict, after.drop), name
        assert name not in after.if_none_of


def test_a_setting_that_is_no_value_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"use_megatron_fsdp 'maybe': give True, False, a number"):
        judge_recipe(NONE | {"use_megatron_fsdp": "maybe"})


@pytest.mark.parametrize("name", ["expert_model_parallel_size", "num_experts"])
def test_a_size_that_no_cluster_has_is_quoted(name: str) -> None:
    settings = {"num_experts": 8, "expert_model_parallel_size": 4} | {name: 10**18}
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} '1000000000000000000': more than there can be"):
        judge(Namespace(**settings))


BAD_FIELDS = {
    "pool": ("rl", "pool 'rl': unknown; known are pretrain, sft, peft, perf"),
    "EP": ("many", "EP 'many': give a number of ranks"),
    "TP": ("0", "TP '0': give a number of ranks"),
    "ETP": ("-1", "ETP '-1'"),
    "dispatcher": ("pigeon", "dispatcher 'pigeon': unknown; known are an empty text, alltoall"),
    "flex_backend": ("deepest", "flex_backend 'deepest'"),
    "precision": ("fp2", "precision 'fp2': unknown"),
    "cuda_graph_impl": ("magic", "cuda_graph_impl 'magic'"),
    "cuda_graph_scope": ("[attn", "cuda_graph_scope '[attn': give a list such as"),
    "recompute": ("some", "recompute 'some'"),
    "recompute_modules": ("['moe'", "recompute_modules \"['moe'\": give a list"),
    "ep_overlap": ("yes", "ep_overlap 'yes'"),
    "delay_wgrad": ("1", "delay_wgrad '1'"),
    "force_balance": ("on", "force_balance 'on'"),
    "optimizer": ("shampoo", "optimizer 'shampoo': no known one; give adam"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_field_that_means_nothing_is_quoted_with_its_recipe(name: str) -> None:
    value, says = BAD_FIELDS[name]
    with pytest.raises(ValueError) as refused:
        judge_recipe(NONE | {name: value})
    assert str(refused.value).startswith(f"recipe '{NAME}': {says}")


def test_the_fields_of_a_recipe_may_be_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    fields = NONE | {"recompute": "selective", "cuda_graph_impl": "local", "optimizer": "lion"}
    lines = [f"{name}: '{value}'" for name, value in fields.items() if name != "recompute_modules"]
    path.write_text("\n".join([*lines, "recompute_modules: [moe, mla_up_proj]"]))
    assert cli.main(["check-recipe", str(path)]) == STATUS[Verdict.SPEED_ONLY] == 3
    said = capsys.readouterr().out
    assert said.startswith(
        "runs without these speed-only flags: --cuda-graph-impl, if the recipe sets none of: expert"
    )
    assert "; their speed-up is lost, and no figure weighs it; each feature proved by a row" in said
    assert "  --cuda-graph-impl local: " in said
    path.write_text("recipe: x\n")
    assert cli.main(["check-recipe", str(path)]) == 2
    assert "no field pool" in capsys.readouterr().err


def test_every_verdict_has_a_status_of_its_own_and_none_is_that_of_an_error() -> None:
    assert set(STATUS) == set(Verdict)
    assert len(set(STATUS.values()) | {2}) == len(Verdict) + 1
    assert STATUS[Verdict.RUNS] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give one of FILE, --bridge-recipe NAME, --bridge-csv CSV and -- FLAGS"),
        (["x", "--", "--lr"], "give one of"),
        (["x", "--json", "y"], "--json 'y': only with --bridge-csv"),
        (["no/file"], "no/file"),
    ],
)
def test_a_command_that_asks_for_nothing_is_told_what_to_give(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check-recipe", *words]) == 2
    assert says in capsys.readouterr().err
