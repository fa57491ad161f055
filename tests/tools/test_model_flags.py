import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laer.files.shipped import yaml_file
from megatron_laer.tools.model_flags import model_flags, model_values
from tests.processes import python_path

_ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted(path.stem for path in (_ROOT / "configs" / "models").glob("*.yaml"))


@pytest.fixture
def model(tmp_path):
    def write(text):
        path = tmp_path / "model.yaml"
        path.write_text(text)
        return path

    return write


def test_keys_become_flags_in_the_order_of_the_file(model):
    path = model("""
description: d
moe:
  num-experts: 8
architecture:
  swiglu: true
  norm-epsilon: 1.0e-5
  rotary_percent: 0.5
  position-embedding-type: "rope"
  cp-comm-type: [p2p, a2a]
""")
    assert " ".join(model_flags(path)) == (
        "--num-experts 8 --swiglu --norm-epsilon 1.0e-5 --rotary_percent 0.5 "
        "--position-embedding-type rope --cp-comm-type p2p a2a"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file holds None, expected a mapping"),
        ("- 1", r"holds \['1'\], expected a mapping"),
        ("{description: d, moe: {8-: 8}}", "'8-' is no flag"),
        ("{description: d, moe: {swiglu: No}}", "swiglu is 'No'; .* is left out"),
        ("{description: d, moe: {lr: [1, true]}}", r"lr is \['1', 'true'\]"),
        ("{description: d, moe: {num_experts: [1, 2]}}", r"num_experts is \['1', '2'\]; give one"),
        ("{description: d, moe: {lr: -.NaN}}", r"lr is '-\.NaN'; give a finite number"),
        ("{description: d, moe: {lr: 1e400}}", "lr is '1e400'; give a finite number"),
        ("{description: d, moe: {lr: 1}, data: {lr: 2}}", "lr is given twice"),
        ("{description: d, moe: {lr: 1, lr: 2}}", "line 1: the key 'lr' is given twice"),
        ("{description: d, moe: {lr: !!int x}}", "line 1: tags such as 'tag:yaml.*:int'"),
    ],
)
def test_content_that_does_not_fit_is_quoted(text, message, model):
    path = model(text)
    with pytest.raises(ValueError, match=message) as error:
        model_flags(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


def test_values_are_found_by_either_spelling_of_a_flag(model):
    path = model("{description: d, moe: {hidden_size: 8, swiglu: true, data-path: [a, b]}}")
    assert model_values(path) == {"--hidden-size": "8", "--swiglu": "", "--data-path": "a b"}


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown model 'gpt-5'; known are .*tiny-moe"):
        model_flags("gpt-5")


def test_a_name_is_found_in_the_repository():
    assert yaml_file("model", "tiny-moe") == _ROOT / "configs" / "models" / "tiny-moe.yaml"


# One process for all models, since importing Megatron takes seconds.
_PARSE = """
import json, sys
from megatron_laer.launch import prepare
prepare()
from megatron.training import arguments
from megatron_laer.tools.model_flags import model_flags, model_values
from megatron_laer.device import CPU_FLAGS

stdout, sys.stdout = sys.stdout, sys.stderr
names, run_flags = sys.argv[1].split(), sys.argv[2].split()
seen = {}
for name in names:
    sys.argv[1:] = [*model_flags(name), *CPU_FLAGS, *run_flags]
    args = arguments.parse_args()
    arguments.validate_args(args)
    config = arguments.core_transformer_config_from_args(args)
    seen[name] = {
        "mode": args.expert_parallel_mode,
        "layers": config.num_layers,
        "experts": config.num_moe_experts,
        "topk": config.moe_router_topk,
        "ffn": config.moe_ffn_hidden_size,
        "query_groups": config.num_query_groups,
        "head": config.kv_channels,
        "bf16": config.bf16,
    }
print(json.dumps(seen), file=stdout)
"""
_RUN_FLAGS = (
    "--micro-batch-size 1 --train-iters 1 --lr 1e-4 --expert-tensor-parallel-size 1 "
    "--expert-model-parallel-size 8 --expert-parallel-mode fsep"
)


@pytest.fixture(scope="module")
def parsed():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PARSE, " ".join(MODELS), _RUN_FLAGS],
        env=os.environ
        | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"}
        | {"RANK": "0", "WORLD_SIZE": "8"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    # Loggers that wrote to stdout before its redirection still do.
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_megatron_parses_and_validates_every_model(name, parsed):
    assert parsed[name]["mode"] == "fsep"


def test_the_mixtrals_have_the_sizes_of_the_paper(parsed):
    sizes = ("layers", "experts", "topk", "ffn", "query_groups", "head", "bf16")
    assert [parsed["mixtral-8x7b-e8k2"][key] for key in sizes] == [32, 8, 2, 14336, 8, 128, True]
    assert [parsed["mixtral-8x7b-e16k4"][key] for key in sizes] == [24, 16, 4, 7168, 8, 128, True]
