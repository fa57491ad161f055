"""`check-recipe --bridge-recipe` judges recipes of a checkout of Megatron-Bridge by name."""

from __future__ import annotations

import contextlib
import io
from typing import Any
from unittest import mock

from megatron_laer.tools import cli
from tests.distributed.test_bridge import bridge, pytestmark

__all__ = ["pytestmark"]

# Hugging Face's class by the name that Megatron-Bridge requests; only its defaults are needed.
MODELS = {
    "deepseek-ai/DeepSeek-V3": "DeepseekV3",
    "openai/gpt-oss-20b": "GptOss",
    "Qwen/Qwen3-30B-A3B": "Qwen3Moe",
}
# Exit status and a text of the output, by recipe.
JUDGED = {
    "olmoe_7b_pretrain_config": (0, "runs"),
    "olmoe_7b_peft_config": (5, "uses no expert parallelism"),
    "deepseek_v3_pretrain_config": (0, "runs"),
    "gpt_oss_20b_pretrain_config": (0, "runs"),
    "gpt_oss_20b_pretrain_fp8_current_scaling_config": (4, "--fp8-format"),
    "qwen3_30b_a3b_pretrain_config": (0, "runs, with --fsep-allow-unproven te-graphs, which no"),
    "megatron.bridge.recipes.qwen.h100.qwen3_moe:qwen3_30b_a3b_sft_8gpu_h100_bf16_config": (
        0,
        "runs",
    ),
    "vanilla_gpt_pretrain_config": (1, "there are no experts to shard"),
    "olmoe_7b_pretrain_confg": (2, ", did you mean olmoe_7b_pretrain_config?"),
}


def judge_recipes(names: list[str]) -> list[tuple[int, str]]:
    import transformers

    def config_of(name: str, *_: Any, **__: Any) -> Any:
        (kind,) = [kind for model, kind in MODELS.items() if name.startswith(model)]
        return getattr(transformers, f"{kind}Config")(architectures=[f"{kind}ForCausalLM"])

    found = []
    with bridge(), mock.patch.object(transformers.AutoConfig, "from_pretrained", config_of):
        for name in names:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = cli.main(["check-recipe", "--bridge-recipe", name])
            found.append((status, said.getvalue()))
    return found


def test_recipes_of_bridge_are_judged_by_name(ranks):
    found = ranks(2).run(judge_recipes, list(JUDGED))[0]
    for (name, (status, text)), (ended, said) in zip(JUDGED.items(), found, strict=True):
        assert ended == status and text in said, f"{name}: {ended}\n{said}"
