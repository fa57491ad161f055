"""`check-recipe` and `advise` parse flags as Megatron does: in a process that may patch torch."""

from __future__ import annotations

import json

import pytest

from tests.processes import python

PROGRAM = """
import contextlib, io, json, sys
from megatron_laer.tools import cli
from megatron_laer.tools.cli import progress
progress.EVERY_S = 1e6
def end(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(words)
    return [status, out.getvalue(), err.getvalue()]
commands, advised = json.load(sys.stdin)
ended = {name: end(["check-recipe", *words]) for name, words in commands.items()}
model = end(["flags", "tiny-moe"])[1].split()
for name, words in advised.items():
    ended[name] = end(["advise", *words])
    for place, line in enumerate(ended[name][1].splitlines()):
        if " --expert-parallel-mode fsep " in line:
            flags = [*model, *words[words.index("--") + 1 :], *line.removeprefix("flags:").split()]
            ended[f"{name}, line {place}"] = end(["check-recipe", "--", *flags])
print(json.dumps(ended))
"""
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4"
OF_EXPERTS = (
    "--num-experts 8 --expert-model-parallel-size 4 --bf16 --lr 1e-4 --swiglu --disable-bias-linear"
)
BASE = f"{MODEL} {OF_EXPERTS}"
SLOW = (
    "--moe-paged-stash --moe-mlp-glu-interleave-size=32 --use-transformer-engine-op-fuser"
    " --moe-expert-rank-capacity-factor 1.5"
)
FAST = (
    "--delay-wgrad-compute --overlap-moe-expert-parallel-comm --cuda-graph-impl transformer_engine"
    " --cuda-graph-modules moe_router moe_preprocess"
)
ALLOWED = "--fsep-allow-unproven te-graphs"
PADDED = "--moe-router-padding-for-quantization"
EARLY = "--overlap-dispatch-backward-with-experts-wgrad --overlap-grad-reduce"

REFUSED = 1, "refused, because", None
# Flags; the status, a text on the first line, and the last line.
LINES = {
    "runs": (BASE, 0, "runs; proved by row 'bf16' on the CPU", None),
    "flex": (f"{BASE} --moe-token-dispatcher-type flex", 0, "where replacements stand for", None),
    "script": (f"pretrain_gpt.py {BASE}", 0, "runs", None),
    "hybrid": (f"{BASE} --hybrid-layer-pattern ME*E", 0, "where replacements stand for", None),
    "speed-only": (
        f"{BASE} {FAST} {SLOW}",
        3,
        "; their speed-up is lost, and no figure weighs it",
        f"{BASE} {FAST} {ALLOWED}",
    ),
    "precision": (
        f"{BASE} --fp8-format hybrid {PADDED} {FAST} {SLOW}",
        4,
        "; the speed-up of fp8 or fp4 and of these is lost, and no figure weighs it; ",
        f"{BASE} {PADDED} {FAST} {ALLOWED}",
    ),
    "an early reduce": (
        f"{BASE} {EARLY}",
        3,
        "speed-only flags: --overlap-dispatch-backward-with-experts-wgrad;",
        f"{BASE} --overlap-grad-reduce",
    ),
    "an early reduce of rows": (f"{BASE} {EARLY} --fsep-sharding rows", 0, "runs", None),
    "kept mxfp8": (
        f"{BASE} --fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather",
        4,
        "runs in bf16, without these flags: --fp8-format --fp8-param-gather",
        BASE,
    ),
    "custom fp8": (f"{BASE} --fp8-format e4m3 --fp8-recipe custom", 4, "runs in bf16", BASE),
    "allowed fp8": (
        f"{BASE} --fp8-format hybrid --fsep-allow-unproven dense-fp8",
        0,
        "runs; nothing proves it yet",
        None,
    ),
    "allowed mxfp8 experts": (
        f"{BASE} --fp8-format e4m3 --fp8-recipe mxfp8 --fsep-sharding experts "
        "--fsep-allow-unproven fp8-experts",
        0,
        "proved by row 'fp8-mx-homes'",
        None,
    ),
    "fp8 in rows": (
        f"{BASE} --fp8-format hybrid --fp8-recipe tensorwise --fsep-sharding rows",
        *REFUSED,
    ),
    "set-ep": ("--num-experts 8", 5, "uses no expert parallelism", None),
    "dense": ("--num-layers 2", *REFUSED),
    "refused": (f"{BASE} --optimizer soap {SLOW}", *REFUSED),
    "our flags": (f"{BASE} --fsep-capacity 0 {SLOW}", *REFUSED),
    "an unknown planner": (f"{BASE} --fsep-planner magic", *REFUSED),
    "our flags together": (
        f"{BASE} --fsep-restore step --fsep-plan-mode adaptive",
        *REFUSED,
    ),
    "Megatron-FSDP": (
        f"{BASE} --use-megatron-fsdp --fsep-sharding rows --fsep-node-size 3",
        *REFUSED,
    ),
    "a file for a folder": (f"{BASE} --fsep-record /etc/passwd trace", *REFUSED),
    "a cluster that is none": (f"{BASE} --fsep-set cluster=moon", *REFUSED),
    "ranks of whole groups": (
        f"--ranks 8 -- {BASE} --tensor-model-parallel-size 2",
        0,
        "runs",
        None,
    ),
    "ranks of half a group": (f"--ranks 6 -- {BASE}", *REFUSED),
    "ranks of half a pipeline": (
        f"--ranks 12 -- {BASE} --pipeline-model-parallel-size 8",
        *REFUSED,
    ),
    "weights of a checkpoint": (f"{OF_EXPERTS} --use-checkpoint-args", 0, "runs", None),
    "too many slots": (
        "--num-experts 4096 --expert-model-parallel-size 8 --moe-token-dispatcher-type flex",
        *REFUSED,
    ),
}
ERRORS = {
    "unknown": (f"{BASE} --warp-speed 9", "'--warp-speed 9': neither Megatron nor FSEP"),
    "value": ("--num-experts many", "invalid int value: 'many'"),
    "abbreviated": ("--num-expert 8", "'--num-expert 8'"),
    "no model": (
        OF_EXPERTS,
        "without --num-layers, --hidden-size, --num-attention-heads the flags",
    ),
    "a vast batch": (
        f"{BASE} --global-batch-size 1{'0' * 20}",
        f"--global-batch-size '1{'0' * 20}' is no integer in 1..16777216",
    ),
    "no batch": (
        f"{BASE} --micro-batch-size 0",
        "--micro-batch-size '0' is no integer in 1..65536",
    ),
    "a vast model": (f"{BASE} --num-layers 4097", "--num-layers '4097' is no integer in 0..4096"),
    "a vast seed": (f"{BASE} --seed 1{'0' * 20}", f"--seed '1{'0' * 20}' is no integer in -9"),
    "a list of flags": (f"{BASE} ${{ARGS[@]}}", "'${ARGS[@]}': shell variables are not expanded"),
    "flags after a value": (f"{BASE} --data-path $A $B", "'$B': shell variables are not expanded"),
    "flags after a switch": (f"{BASE} --bf16 $B", "'$B': shell variables are not expanded"),
    "a variable number": (
        f"{BASE} --num-experts $E",
        "--num-experts: invalid int value: '$E'; shell variables are not expanded",
    ),
    "no line": ("--help", "'--help': neither Megatron nor FSEP"),
    "a file instead": (f"{BASE} --yaml-cfg x.yaml", "--yaml-cfg 'x.yaml': Megatron's settings"),
    "a power": (f"{BASE} --moe-layer-freq 9**9**9", "'9**9**9': no pattern of layers"),
    "a bomb": (f"{BASE} --moe-layer-freq=([0]*9999)*9999", "'([0]*9999)*9999': no pattern"),
}
# Words of `advise` with the flags of a run; the shape that they give, or the error.
TINY = "--model tiny-moe --cluster h100-8 --gpus 8"
OF_TINY = "--bf16 --seq-length 64 --micro-batch-size 2 --num-layers 4"
ADVISED = {
    "a pipeline": (
        f"{TINY} -- {OF_TINY} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
        " --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 16"
        " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "64 tokens per rank and microbatch, 4 microbatches; tensor 2, pipeline 2 x 2; recompute f",
    ),
    "graphs": (
        f"{TINY} -- {OF_TINY} --cuda-graph-impl transformer_engine --cuda-graph-modules moe_router",
        "128 tokens per rank",
    ),
    "another model": (f"{TINY} -- --num-experts 16", "--num-experts '16': --model has 8; "),
    "fewer layers": (f"{TINY} -- --num-layers 2", "--num-layers '2': --model has 4; "),
    "a hybrid": (f"{TINY} -- --hybrid-layer-pattern ME*E", "-pattern 'ME*E': --model has None"),
    "too vast a batch": (
        f"{TINY} -- --global-batch-size 99999999",
        "'99999999' is no integer in 1..1677",
    ),
    "a group of three": (
        f"{TINY} -- --expert-model-parallel-size 3",
        "--expert-model-parallel-size 3: 8 ranks are no multiple of 3",
    ),
    "more experts of a token": (f"{TINY} -- --moe-router-topk 4", "--moe-router-topk '4': --model"),
    "dropped tokens": (
        f"{TINY} -- --moe-expert-capacity-factor 1.0",
        "cannot run: --moe-expert-capacity-factor 1.0",
    ),
    "fp4": (f"{TINY} -- --fp4-format e2m1", "cannot run: --fp4-format e2m1"),
    "split experts": (
        f"{TINY} -- --tensor-model-parallel-size 2 --expert-tensor-parallel-size 2",
        "cannot run: --expert-tensor-parallel-size 2",
    ),
    "FSEP's own": (
        f"{TINY} -- --fsep-restore step",
        "--fsep-restore step: advise chooses FSEP's settings",
    ),
    "no flag": (f"{TINY} -- --warp-speed 9", "'--warp-speed 9': neither Megatron nor FSEP"),
}


@pytest.fixture(scope="module")
def ended():
    words = {
        name: case[0].split() if " -- " in case[0] else ["--", *case[0].split()]
        for name, case in (LINES | ERRORS).items()
    }
    advised = {name: case[0].split() for name, case in ADVISED.items()}
    printed = python("-c", PROGRAM, stdin=json.dumps([words, advised]))
    found: dict[str, tuple[int, str, str]] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", LINES)
def test_a_command_line_is_judged(name, ended):
    _, status, says, left = LINES[name]
    got, out, err = ended[name]
    assert (got, err) == (status, ""), out + err
    first, *_, last = [*out.splitlines(), out.splitlines()[0]] if left is None else out.splitlines()
    assert says in first
    assert left is None or last == left


def test_reasons_are_those_of_training(ended):
    reasons = ended["speed-only"][1].splitlines()[1:-1]
    assert len(reasons) == len(SLOW.split("--")) - 1
    assert all(reason.endswith("(it is speed-only)") for reason in reasons)
    for name, parts in {
        "too many slots": ["DeepEP takes at most 128"],
        "kept mxfp8": ["give --reuse-grad-buf-for-mxfp8-param-ag"],
        "custom fp8": ["fp8-experts with --fp8-recipe tensorwise, blockwise or mxfp8, or leave"],
        "a file for a folder": ["--fsep-record '/etc/passwd': '/etc/passwd' is no folder"],
        "a cluster that is none": ["cluster='moon': unknown cluster 'moon'"],
        "ranks of half a group": [
            "--expert-model-parallel-size 4: 6 ranks are no multiple of 4; give other sizes"
        ],
        "ranks of half a pipeline": ["--pipeline-model-parallel-size 8: 12 ranks are no multiple"],
        "our flags": ["--fsep-capacity 0: must be at least 1"],
        "Megatron-FSDP": [
            "--use-megatron-fsdp with --fsep-sharding rows",
            "with fused gradient accumulation",
            "--ckpt-format torch_dist",
            "--fsep-node-size 3 does not divide the 4 ranks",
        ],
    }.items():
        assert [part for part in parts if part not in ended[name][1]] == []


@pytest.mark.parametrize("name", ERRORS)
def test_flags_that_cannot_be_judged_are_quoted(name, ended):
    status, out, err = ended[name]
    assert (status, out) == (2, "")
    assert ERRORS[name][1] in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ADVISED)
def test_advice_reads_flags_and_gives_flags_that_run(name, ended):
    _, says = ADVISED[name]
    status, out, err = ended[name]
    if status == 2:
        assert says in err and err.count("\n") == 1
        return
    assert says in " ".join(out.split()) and (status, err) == (0, "")
    lines = [found for key, found in ended.items() if key.startswith(f"{name}, line ")]
    assert len(lines) >= 3 and {status for status, _, _ in lines} == {0}
    assert (ALLOWED in out) == (name == "graphs")
    assert all(out.startswith("runs") for _, out, _ in lines)
