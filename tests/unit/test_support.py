"""Every refusal fires for a flag that Megatron's own parser knows, and none without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_laer.support import REFUSALS
from tests.releases import refused_flags

pytestmark = [pytest.mark.unit, pytest.mark.releases]

# The base line alone is fine; added to it, each of the others is refused for its setting.
BASE = (
    "--num-experts 8 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
    " --disable-bias-linear --transformer-impl local"
)
REFUSED = {
    "--num-experts absent": ["--num-experts 0"],
    "--expert-model-parallel-size 1": ["--expert-model-parallel-size 1"],
    "--expert-tensor-parallel-size above 1": [
        "--expert-tensor-parallel-size 2",
        "--tensor-model-parallel-size 2",
    ],
    "--expert-tensor-parallel-num-weight-shards": ["--expert-tensor-parallel-num-weight-shards 2"],
    "--moe-token-dispatcher-type other than alltoall": [
        "--moe-token-dispatcher-type flex",
        "--moe-token-dispatcher-type allgather",
    ],
    "--moe-expert-capacity-factor": ["--moe-expert-capacity-factor 1.0"],
    "--moe-pad-expert-input-to-capacity": ["--moe-pad-expert-input-to-capacity"],
    "--moe-expert-rank-capacity-factor": ["--moe-expert-rank-capacity-factor 1.0"],
    "--fp8-format": ["--fp8-format hybrid"],
    "--fp4-format": ["--fp4-format e2m1"],
    "--fp8-param-gather": ["--fp8-param-gather"],
    "--fp4-param-gather": ["--fp4-param-gather"],
    "--use-megatron-fsdp": ["--use-megatron-fsdp"],
    "--use-torch-fsdp2": ["--use-torch-fsdp2"],
    "--mtp-use-repeated-layer": ["--mtp-use-repeated-layer"],
    "--recompute-modules moe_act": ["--recompute-modules core_attn moe_act"],
    "--cuda-graph-impl other than none": ["--cuda-graph-impl local"],
    "--enable-cuda-graph": ["--enable-cuda-graph"],
    "--external-cuda-graph": ["--external-cuda-graph"],
    "--delay-wgrad-compute": ["--delay-wgrad-compute"],
    "--overlap-dispatch-backward-with-experts-wgrad": [
        "--overlap-dispatch-backward-with-experts-wgrad"
    ],
    "--overlap-moe-expert-parallel-comm": ["--overlap-moe-expert-parallel-comm"],
    "--optimizer other than adam, sgd, lion": ["--optimizer muon"],
    "--disable-bias-linear absent": ["WITHOUT --disable-bias-linear"],
    "--moe-mlp-glu-interleave-size": ["--moe-mlp-glu-interleave-size 8"],
    "--moe-single-grouped-weight": ["--moe-single-grouped-weight"],
    "--moe-router-padding-for-quantization": ["--moe-router-padding-for-quantization"],
    "--moe-router-padding-for-fp8": ["--moe-router-padding-for-fp8"],
    "--moe-paged-stash": ["--moe-paged-stash"],
    "--fine-grained-activation-offloading": [
        "--fine-grained-activation-offloading --offload-modules core_attn"
    ],
    "--cpu-offloading-num-layers": ["--cpu-offloading-num-layers 1"],
    "--moe-use-upcycling": ["--moe-use-upcycling"],
    "--transformer-impl other than local, transformer_engine": [
        "--transformer-impl inference_optimized"
    ],
}

PROGRAM = """
import json, sys
from megatron_laer.launch import prepare
prepare()
from megatron.training import arguments
from megatron_laer.support import REFUSALS

def fired(line):
    words = BASE.split()
    if line.startswith("WITHOUT "):
        words.remove(line.split()[1])
    else:
        words += line.split()
    sys.argv = ["script", *words]
    args = arguments.parse_args()
    return [refusal.setting for refusal in REFUSALS if refusal.given(args) is not None]

print(json.dumps({line: fired(line) for line in LINES}))
"""


def test_every_refusal_fires_on_its_own_flags_and_on_no_other() -> None:
    every = [line for lines in REFUSED.values() for line in lines]
    unknown = refused_flags([line for line in every if not line.startswith("WITHOUT ")])
    lines = ["", *(line for line in every if line not in unknown)]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"BASE = {BASE!r}\nLINES = {lines!r}\n{PROGRAM}"],
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    fired: dict[str, list[str]] = json.loads(result.stdout.splitlines()[-1])
    assert fired.pop("") == []
    expected = {line: [setting] for setting, lines in REFUSED.items() for line in lines}
    assert fired == {line: expected[line] for line in lines[1:]}


def test_every_refusal_is_listed_here_once() -> None:
    settings = [refusal.setting for refusal in REFUSALS]
    assert sorted(settings) == sorted(REFUSED)
