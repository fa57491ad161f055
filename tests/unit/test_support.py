"""Every refusal fires for a flag that Megatron's own parser knows, and none without one.

What FSEP needs and nobody gave is filled in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laer.support.fields import PROVED_RECOMPUTE
from megatron_laer.support.table import REFUSALS
from tests import processes
from tests.releases import refused_flags

pytestmark = pytest.mark.releases

OUR_SCRIPT = Path(__file__).resolve().parents[2] / "pretrain_gpt.py"

# The base line alone is fine; added to it, each of the others is refused for its setting.
BASE = (
    "--expert-parallel-mode fsep --num-experts 8 --expert-model-parallel-size 2"
    " --transformer-impl local"
)
GRAPHS = "--fsep-allow-unproven te-graphs --cuda-graph-impl transformer_engine"
REFUSED = {
    "--num-experts absent": ["--num-experts 0", "--num-experts -4"],
    "--expert-model-parallel-size 1": ["--expert-model-parallel-size 1"],
    "--moe-dispatch-fwd-dtype other than bf16": ["--moe-dispatch-fwd-dtype mxfp8"],
    "--moe-combine-bwd-dtype other than bf16": ["--moe-combine-bwd-dtype mxfp8"],
    "--expert-tensor-parallel-size above 1": ["--expert-tensor-parallel-size 2"],
    "--expert-tensor-parallel-num-weight-shards": ["--expert-tensor-parallel-num-weight-shards 2"],
    "--moe-token-dispatcher-type other than alltoall, flex": [
        "--moe-token-dispatcher-type allgather",
    ],
    "--moe-flex-dispatcher-backend other than deepep, hybridep": [
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
    ],
    "--moe-expert-capacity-factor": ["--moe-expert-capacity-factor 1.0"],
    "--moe-pad-expert-input-to-capacity": ["--moe-pad-expert-input-to-capacity"],
    "--moe-expert-rank-capacity-factor": ["--moe-expert-rank-capacity-factor 1.0"],
    "--fp8-format": [
        "--fp8-format hybrid",
        "--fp8-format e4m3",
        f"--fp8-format hybrid {GRAPHS} --cuda-graph-modules attn",
    ],
    "--fp4-format": ["--fp4-format e2m1"],
    "--fp8-param-gather": ["--fp8-param-gather"],
    "--fp4-param-gather": ["--fp4-param-gather"],
    "--use-megatron-fsdp": ["--use-megatron-fsdp"],
    "--use-torch-fsdp2": ["--use-torch-fsdp2"],
    "--cuda-graph-impl other than none": [
        "--cuda-graph-impl local",
        "--cuda-graph-impl full_iteration",
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn",
        "--cuda-graph-impl local --cuda-graph-modules attn --fsep-allow-unproven te-graphs",
    ],
    "--cuda-graph-modules other than attn, moe_router, mlp": [
        GRAPHS,
        f"{GRAPHS} --cuda-graph-modules attn moe",
        f"{GRAPHS} --cuda-graph-modules attn moe_router moe_preprocess",
        f"{GRAPHS} --cuda-graph-modules mamba",
        f"{GRAPHS} --cuda-graph-scope full",
    ],
    "--enable-cuda-graph": ["--enable-cuda-graph"],
    "--external-cuda-graph": ["--external-cuda-graph"],
    "--delay-wgrad-compute": ["--delay-wgrad-compute"],
    "--overlap-dispatch-backward-with-experts-wgrad": [
        "--overlap-dispatch-backward-with-experts-wgrad"
    ],
    "--overlap-moe-expert-parallel-comm": ["--overlap-moe-expert-parallel-comm"],
    "--optimizer other than adam, sgd, lion, muon": ["--optimizer soap"],
    "--moe-mlp-glu-interleave-size": ["--moe-mlp-glu-interleave-size 8"],
    "--moe-use-grouped-tensor": ["--moe-use-grouped-tensor"],
    "--use-grouped-gemm-for-shared-expert": [
        "--use-grouped-gemm-for-shared-expert --moe-shared-expert-intermediate-size 32"
    ],
    "--moe-shared-expert-glu-interleave-size": ["--moe-shared-expert-glu-interleave-size 8"],
    "--moe-single-grouped-weight": ["--moe-single-grouped-weight"],
    "--moe-single-grouped-bias": ["--moe-single-grouped-bias"],
    "--moe-router-padding-for-quantization with fp8": [
        f"--fp8-format hybrid --fsep-allow-unproven dense-fp8 {padding}"
        for padding in (
            "--moe-router-padding-for-quantization",
            "--moe-router-padding-for-fp8",
        )
    ],
    "--use-transformer-engine-op-fuser": ["--use-transformer-engine-op-fuser"],
    "--moe-paged-stash": ["--moe-paged-stash"],
    f"--recompute-modules other than {', '.join(sorted(PROVED_RECOMPUTE))}": [
        "--recompute-granularity selective --recompute-modules moe mhc"
    ],
    "--fine-grained-activation-offloading": [
        "--fine-grained-activation-offloading --offload-modules core_attn"
    ],
    "--cpu-offloading-num-layers": ["--cpu-offloading-num-layers 1"],
    "--moe-use-upcycling": ["--moe-use-upcycling"],
    "--transformer-impl other than local, transformer_engine": [
        "--transformer-impl inference_optimized"
    ],
}

# Not refused: allowed by name, off for Megatron, the size of what is not the experts, or without
# effect beside what is refused.
TAKEN = [
    f"{GRAPHS} --cuda-graph-modules attn",
    f"{GRAPHS} --cuda-graph-modules attn moe_router mlp",
    "--fp8-format hybrid --fsep-allow-unproven dense-fp8",
    "--fp8-format e4m3 --fp8-recipe tensorwise --fsep-allow-unproven dense-fp8",
    "--cuda-graph-modules moe",
    "--tensor-model-parallel-size 2",
    "--moe-token-dispatcher-type flex",
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
    "--moe-expert-capacity-factor -1.0",
    "--moe-router-padding-for-quantization",
    "--moe-router-padding-for-fp8",
    "--recompute-modules core_attn moe_act",
    "--recompute-granularity full --recompute-modules moe_act",
    "--recompute-granularity full --recompute-modules mhc",
    "--recompute-granularity selective --recompute-modules mla_up_proj gdn_norm_out",
    "--recompute-granularity selective --recompute-modules core_attn moe_act",
]

PROGRAM = """
import json, sys
from megatron_laer.launch import prepare
prepare()
from megatron.training import arguments
from megatron_laer.support.arguments import fill_in
from megatron_laer.support.table import REFUSALS

def fired(line):
    sys.argv = ["script", *BASE.split(), *line.split()]
    args = arguments.parse_args()
    fill_in(args, {})
    allowed = args.fsep_allow_unproven or ()
    return [row.setting for row in REFUSALS if row.problem_with_flag(args, allowed) is not None]

print(json.dumps({line: fired(line) for line in LINES}))
"""


def test_every_refusal_fires_on_its_own_flags_and_on_no_other() -> None:
    every = [line for lines in REFUSED.values() for line in lines]
    unknown = refused_flags(every)
    lines = ["", *TAKEN, *(line for line in every if line not in unknown)]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"BASE = {BASE!r}\nLINES = {lines!r}\n{PROGRAM}"],
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    fired: dict[str, list[str]] = json.loads(result.stdout.splitlines()[-1])
    assert [line for line in ["", *TAKEN] if fired.pop(line)] == []
    expected = {line: [setting] for setting, lines in REFUSED.items() for line in lines}
    assert fired == {line: expected[line] for line in lines if line in expected}


# What Megatron makes of the settings that FSEP needs: from the command line, a script's defaults
# (args_defaults and its own parser), and a checkpoint's arguments.
SETTINGS_PROGRAM = """
import contextlib, io, json, sys
from unittest import mock
from megatron_laer.launch import prepare
prepare()
from argparse import Namespace
from megatron.training import arguments, checkpointing
import megatron.training.global_vars
from megatron_laer import plugin

REST = ("--num-layers 2 --hidden-size 48 --num-attention-heads 4 --seq-length 48"
        " --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 4 --train-iters 1"
        " --lr 1e-3 --disable-bias-linear --transformer-impl local --tensor-model-parallel-size 2"
        " --sequence-parallel --num-experts 8 --expert-model-parallel-size 2").split()

def outcome(line, of_script, of_parser, of_checkpoint):
    sys.argv = ["script", *REST, *line.split()]
    loaded = ({"args": Namespace(**of_checkpoint), "iteration": 1}, "", False, None)
    def provider(parser):
        parser.set_defaults(**of_parser)
        return parser
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        mock.patch.object(checkpointing, "_load_base_checkpoint", lambda *_, **__: loaded),
        mock.patch.object(arguments, "set_global_variables", lambda args: None),
    ):
        try:
            args = arguments.parse_and_validate_args(provider, args_defaults=of_script)
        except ValueError as error:
            return str(error)
        finally:
            plugin.disable()
    said = [line for line in output.getvalue().splitlines() if line.startswith("FSEP ")]
    if args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8:
        said.append("router padding is on")
    return [args.moe_token_dispatcher_type, args.expert_tensor_parallel_size, said]

print(json.dumps([outcome(*case) for case in json.load(sys.stdin)]))
"""

FSEP = "--expert-parallel-mode fsep"
DISPATCHER = "--moe-token-dispatcher-type"
PADDING = "--moe-router-padding-for-quantization"
RESUMED = f"{FSEP} --use-checkpoint-args --load there"
SAID = (
    "FSEP takes --moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1, "
    "which it needs"
)

Case = tuple[str, dict[str, object], dict[str, object], dict[str, object]]

# Where the model stays as it is, nobody need give them.
SETTINGS_TAKEN: dict[str, tuple[Case, list[object]]] = {
    "mode alone": ((FSEP, {}, {}, {}), ["alltoall", 1, [SAID]]),
    "mode with =": (("--expert-parallel-mode=fsep", {}, {}, {}), ["alltoall", 1, [SAID]]),
    "given": (
        (f"{DISPATCHER} alltoall --expert-tensor-parallel-size 1 {FSEP}", {}, {}, {}),
        ["alltoall", 1, []],
    ),
    "script's": (
        (FSEP, {"expert_tensor_parallel_size": 1}, {}, {}),
        ["alltoall", 1, ["FSEP takes --moe-token-dispatcher-type alltoall, which it needs"]],
    ),
    "checkpoint's": (
        (RESUMED, {}, {}, {"moe_token_dispatcher_type": "alltoall"}),
        ["alltoall", 1, ["FSEP takes --expert-tensor-parallel-size 1, which it needs"]],
    ),
    "checkpoint without": ((RESUMED, {}, {}, {}), ["alltoall", 1, [SAID]]),
    "given over a checkpoint's": (
        (f"{RESUMED} {DISPATCHER} alltoall", {}, {}, {"moe_token_dispatcher_type": "allgather"}),
        ["alltoall", 1, ["FSEP takes --expert-tensor-parallel-size 1, which it needs"]],
    ),
    "router padding": (
        (f"{FSEP} {PADDING} --moe-router-padding-for-fp8", {}, {}, {}),
        [
            "alltoall",
            1,
            [
                SAID,
                f"FSEP leaves out {PADDING} --moe-router-padding-for-fp8, which has no effect "
                "without fp8",
            ],
        ],
    ),
    "flex": (
        (f"{DISPATCHER} flex {FSEP}", {}, {}, {}),
        ["flex", 1, ["FSEP takes --expert-tensor-parallel-size 1, which it needs"]],
    ),
    "standard": (("", {}, {}, {}), ["allgather", 2, []]),
    "standard from a checkpoint": (
        (
            "--use-checkpoint-args --load there",
            {},
            {},
            {"moe_token_dispatcher_type": "alltoall"},
        ),
        ["allgather", 2, []],
    ),
}

# Another value that somebody gave is not overruled.
SETTINGS_REFUSED: dict[str, tuple[Case, str]] = {
    "Megatron's default, given": ((f"{DISPATCHER} allgather {FSEP}", {}, {}, {}), "allgather"),
    "given with =": ((f"{FSEP} {DISPATCHER}=allgather", {}, {}, {}), "allgather"),
    "expert tensor parallel": (
        (f"{FSEP} --expert-tensor-parallel-size 2", {}, {}, {}),
        "--expert-tensor-parallel-size 2",
    ),
    "script's defaults": (
        (FSEP, {"expert_tensor_parallel_size": 2}, {}, {}),
        "--expert-tensor-parallel-size 2",
    ),
    "script's parser": (
        (FSEP, {}, {"moe_token_dispatcher_type": "allgather"}, {}),
        "--moe-token-dispatcher-type allgather",
    ),
    "checkpoint's": ((RESUMED, {}, {}, {"moe_token_dispatcher_type": "allgather"}), "allgather"),
}


def test_what_fsep_needs_is_the_default_and_what_somebody_gave_is_not_overruled() -> None:
    cases = [case for case, _ in (*SETTINGS_TAKEN.values(), *SETTINGS_REFUSED.values())]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETTINGS_PROGRAM],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu", "RANK": "0", "WORLD_SIZE": "4"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])
    taken = dict(zip(SETTINGS_TAKEN, outcomes, strict=False))
    assert taken == {name: expected for name, (_, expected) in SETTINGS_TAKEN.items()}
    refused = dict(zip(SETTINGS_REFUSED, outcomes[len(taken) :], strict=True))
    for name, (_, quoted) in SETTINGS_REFUSED.items():
        assert isinstance(refused[name], str), (name, refused[name])
        assert "fsep cannot run" in refused[name] and quoted in refused[name], (name, refused[name])


def test_every_refusal_is_listed_here_once() -> None:
    settings = [row.setting for row in REFUSALS if row.flag]
    assert sorted(settings) == sorted(REFUSED)


@pytest.mark.parametrize("is_ours", [True, False], ids=["our script", "another script"])
def test_a_refusal_is_one_line_without_a_traceback_and_status_2(
    is_ours: bool, tmp_path: Path
) -> None:
    another = tmp_path / "pretrain.py"
    another.write_text(
        "from megatron.training.arguments import parse_and_validate_args\nparse_and_validate_args()"
    )
    launcher = (
        [str(OUR_SCRIPT)] if is_ours else ["-m", "megatron_laer", "train", str(another), "--"]
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, *BASE.split()],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "MEGATRON_LAER_DEVICE": "cpu",
            "PYTHONPATH": processes.python_path(),
            "WORLD_SIZE": "two",
        },
        timeout=600,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "WORLD_SIZE='two'" in result.stderr.splitlines()[-1]
