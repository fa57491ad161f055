"""Every refusal fires for a flag that Megatron's own parser knows, and none without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_laer.support import REFUSALS

pytestmark = pytest.mark.unit

# One command line for each refusal, in any order; the base line alone is fine.
BASE = (
    "--num-experts 8 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
    " --disable-bias-linear --transformer-impl local"
)
REFUSED = [
    "--num-experts 0",
    "--expert-model-parallel-size 1",
    "--expert-tensor-parallel-size 2",
    "--expert-tensor-parallel-num-weight-shards 2",
    "--moe-token-dispatcher-type flex",
    "--moe-expert-capacity-factor 1.0",
    "--moe-pad-expert-input-to-capacity",
    "--moe-expert-rank-capacity-factor 1.0",
    "--fp8-format hybrid",
    "--fp4-format e2m1",
    "--fp8-param-gather",
    "--fp4-param-gather",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
    "--mtp-use-repeated-layer",
    "--recompute-modules moe_act",
    "--cuda-graph-impl local",
    "--enable-cuda-graph",
    "--external-cuda-graph",
    "--delay-wgrad-compute",
    "--overlap-dispatch-backward-with-experts-wgrad",
    "--overlap-moe-expert-parallel-comm",
    "--optimizer muon",
    "WITHOUT --disable-bias-linear",
    "--moe-latent-size 8",
    "--moe-mlp-glu-interleave-size 8",
    "--moe-use-upcycling",
    "--transformer-impl inference_optimized",
    "--tensor-model-parallel-size 2",
]

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
    return [index for index, refusal in enumerate(REFUSALS) if refusal.given(args) is not None]

print(json.dumps({line: fired(line) for line in ["", *REFUSED]}))
"""


def test_every_refusal_fires_on_its_own_flag_and_on_no_other() -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"BASE = {BASE!r}\nREFUSED = {REFUSED!r}\n{PROGRAM}",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    fired: dict[str, list[int]] = json.loads(result.stdout.splitlines()[-1])
    assert fired.pop("") == []
    assert all(fired.values()), [line for line, found in fired.items() if not found]
    assert {index for found in fired.values() for index in found} == set(range(len(REFUSALS)))
