"""`check-recipe` parses flags as Megatron does: in another process, which may patch torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.processes import python_path

PROGRAM = """
import contextlib, io, json, sys
from megatron_laer.tools import cli
ended = {}
for name, words in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["check-recipe", *words])
    ended[name] = [status, out.getvalue(), err.getvalue()]
print(json.dumps(ended))
"""
BASE = (
    "--num-experts 8 --expert-model-parallel-size 4 --bf16 --lr 1e-4 --swiglu --disable-bias-linear"
)
SLOW = (
    "--delay-wgrad-compute --overlap-moe-expert-parallel-comm --moe-paged-stash"
    " --moe-mlp-glu-interleave-size=32 --cuda-graph-impl transformer_engine"
    " --cuda-graph-modules moe_router moe_preprocess --use-transformer-engine-op-fuser"
    " --moe-expert-rank-capacity-factor 1.5"
)

# Flags; the status, a text on the first line, and the last line.
LINES = {
    "runs": (BASE, 0, "runs; proved by row 'bf16' on the CPU", None),
    "flex": (f"{BASE} --moe-token-dispatcher-type flex", 0, "where replacements stand for", None),
    "script": (f"pretrain_gpt.py {BASE}", 0, "runs", None),
    "hybrid": (f"{BASE} --hybrid-layer-pattern ME*E", 0, "where replacements stand for", None),
    "speed-only": (f"{BASE} {SLOW}", 3, "; their speed-up is lost, and no figure weighs it", BASE),
    "precision": (
        f"{BASE} --fp8-format hybrid --moe-router-padding-for-quantization {SLOW}",
        4,
        "; the speed-up of fp8 or fp4 and of these is lost, and no figure weighs it; ",
        BASE,
    ),
    "allowed fp8": (
        f"{BASE} --fp8-format hybrid --fsep-allow-unproven dense-fp8",
        0,
        "runs; nothing proves it yet",
        None,
    ),
    "set-ep": ("--num-experts 8", 5, "uses no expert parallelism", None),
    "dense": ("--num-layers 2", 1, "refused, because", None),
    "refused": (f"{BASE} --optimizer soap {SLOW}", 1, "refused, because", None),
    "too many slots": (
        "--num-experts 4096 --expert-model-parallel-size 8 --moe-token-dispatcher-type flex",
        1,
        "refused, because",
        None,
    ),
}
ERRORS = {
    "unknown": (f"{BASE} --warp-speed 9", "'--warp-speed 9': neither Megatron nor FSEP"),
    "value": ("--num-experts many", "invalid int value: 'many'"),
    "abbreviated": ("--num-expert 8", "'--num-expert 8'"),
    "no line": ("--help", "'--help': neither Megatron nor FSEP"),
    "a file instead": (f"{BASE} --yaml-cfg x.yaml", "--yaml-cfg 'x.yaml': Megatron's settings"),
    "a power": (f"{BASE} --moe-layer-freq 9**9**9", "'9**9**9': no pattern of layers"),
    "a bomb": (f"{BASE} --moe-layer-freq=([0]*9999)*9999", "'([0]*9999)*9999': no pattern"),
    "a size of nobody's": (
        f"--num-experts 8 --expert-model-parallel-size {10**18}",
        f"--expert-model-parallel-size '{10**18}': more than there can be; give at most 1000000",
    ),
    "ours": (f"{BASE} --fsep-capacity 0", "fsep-capacity"),
}


@pytest.fixture(scope="module")
def ended():
    words = {name: ["--", *case[0].split()] for name, case in (LINES | ERRORS).items()}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"},
        input=json.dumps(words),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, tuple[int, str, str]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", LINES)
def test_a_command_line_is_judged(name, ended):
    _, status, says, left = LINES[name]
    got, out, err = ended[name]
    assert (got, err) == (status, ""), out + err
    first, *_, last = [*out.splitlines(), out.splitlines()[0]] if left is None else out.splitlines()
    assert says in first
    if left is not None:
        assert last.startswith(left)
        assert last.removeprefix(left).strip() in ("", "--moe-router-padding-for-quantization")


def test_reasons_are_those_of_training(ended):
    reasons = ended["speed-only"][1].splitlines()[1:-1]
    assert len(reasons) == len(SLOW.split("--")) - 1
    assert all(reason.endswith("(it is speed-only)") for reason in reasons)
    assert "DeepEP takes at most 128" in ended["too many slots"][1]


@pytest.mark.parametrize("name", ERRORS)
def test_flags_that_cannot_be_judged_are_quoted(name, ended):
    status, out, err = ended[name]
    assert (status, out) == (2, "")
    assert ERRORS[name][1] in err and err.count("\n") == 1
