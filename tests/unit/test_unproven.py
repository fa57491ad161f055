"""What nobody has run is refused until it is allowed by name, by flag and by field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from megatron_laer.config import FSEPConfig, Unproven
from megatron_laer.planner.geometry import Geometry
from megatron_laer.runtime.comm.agreement import describe_difference, summarise
from megatron_laer.support import RefusedError, arguments
from megatron_laer.support import model as model_support
from megatron_laer.support.table import UNPROVEN
from tests.unit.plan_cases import COSTS

pytestmark = pytest.mark.releases

GRAPHS, FP8 = Unproven.TE_GRAPHS, Unproven.DENSE_FP8


class Module(Enum):
    """Stands for Megatron's `CudaGraphModule`."""

    attn = 1
    mlp = 2
    moe = 3
    moe_router = 4
    moe_preprocess = 5


@dataclass
class Config:
    """As much of Megatron's configuration as decides about what is unproven."""

    fp8: str | bool | None = None
    fp8_param: bool = False
    fp4: str | None = None
    cuda_graph_impl: str = "none"
    cuda_graph_modules: list[Module] = field(default_factory=list)
    recompute_granularity: str | None = None
    recompute_modules: list[str] = field(default_factory=list)


def graphed(*modules: Module) -> Config:
    return Config(cuda_graph_impl="transformer_engine", cuda_graph_modules=list(modules))


def args_of(config: Config) -> Namespace:
    """Arguments with which Megatron would make this configuration, and no others refused."""
    accepted = {row.argument: row.accepted[0] for row in arguments.REFUSALS if row.argument}
    sizes = {"num_experts": 8, "expert_model_parallel_size": 2, "world_size": 2}
    given = vars(config) | {"fp8_param_gather": config.fp8_param}
    return Namespace(**accepted | sizes | {"moe_expert_capacity_factor": None} | given)


def problems(config: Config, *allowed: str) -> list[str]:
    """What is said of the flags and of the fields; each is empty if nothing is."""
    said = []
    fsep = FSEPConfig(allow_unproven=allowed)  # type: ignore[arg-type]
    try:
        arguments.check(args_of(config), fsep)
        said.append("")
    except RefusedError as error:
        said.append(str(error))
    try:
        model_support.check(config, fsep.allow_unproven)
        said.append("")
    except ValueError as error:
        said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (graphed(Module.attn), GRAPHS),
        (graphed(Module.attn, Module.moe_router, Module.mlp), GRAPHS),
        (Config(fp8="hybrid"), FP8),
        (Config(fp8="e4m3"), FP8),
    ],
)
def test_it_is_refused_with_the_word_that_allows_it(config: Config, word: Unproven) -> None:
    by_flag, by_field = problems(config)
    assert "nobody has run it with FSEP" in by_flag and "nobody has run it with FSEP" in by_field
    assert f"give --fsep-allow-unproven {word}, or " in by_flag
    assert f"give FSEPConfig(allow_unproven=['{word}']), or else" in by_field
    (other,) = set(Unproven) - {word}
    assert all("nobody has run it with FSEP" in said for said in problems(config, other))
    assert problems(config, word) == ["", ""]


def test_both_can_be_allowed_at_once() -> None:
    config = graphed(Module.attn)
    config.fp8 = "hybrid"
    assert problems(config, GRAPHS, FP8) == ["", ""]


@pytest.mark.parametrize(
    ("config", "flag", "field_", "says"),
    [
        (Config(cuda_graph_impl="local"), "--cuda-graph-impl local", "cuda_graph_impl", "host"),
        (Config(cuda_graph_impl="full_iteration"), "full_iteration", "cuda_graph_impl", "host"),
        (graphed(), "--cuda-graph-modules other", "cuda_graph_modules=[]", "moe_router"),
        (
            graphed(Module.attn, Module.moe),
            "--cuda-graph-modules attn moe: ",
            "cuda_graph_modules=[<Module.attn: 1>, <Module.moe: 3>]",
            "host",
        ),
        (
            graphed(Module.moe_router, Module.moe_preprocess),
            "--cuda-graph-modules moe_router moe_preprocess: ",
            "cuda_graph_modules=",
            "host",
        ),
        (Config(fp8="hybrid", fp8_param=True), "--fp8-param-gather", "fp8_param=True", "dtype"),
        (Config(fp8=True), "--fp8-format", "fp8=True", "bf16"),
        (Config(fp4="e2m1"), "--fp4-format e2m1", "fp4='e2m1'", "bf16"),
    ],
)
def test_what_would_capture_the_plan_or_reach_the_experts_is_refused_for_good(
    config: Config, flag: str, field_: str, says: str
) -> None:
    by_flag, by_field = problems(config, GRAPHS, FP8)
    assert flag in by_flag and says in by_flag
    assert field_ in by_field and says in by_field
    assert "nobody has run" not in by_flag + by_field


@pytest.mark.parametrize("word", list(Unproven))
def test_a_word_without_what_it_allows_is_an_error(word: Unproven) -> None:
    by_flag, by_field = problems(Config(), word)
    assert f"--fsep-allow-unproven {word}: no effect" in by_flag and UNPROVEN[word] in by_flag
    assert f"allow_unproven=['{word}']" in by_field and "has no effect" in by_field
    # Modules alone capture nothing.
    assert "no effect" in problems(Config(cuda_graph_modules=[Module.attn]), word)[0]


@pytest.mark.parametrize("given", ["graphs", ["te-graphs", "graphs"], [None], 5, ""])
def test_an_unknown_word_is_quoted_beside_the_known_ones(given: Any) -> None:
    bad = given[-1] if isinstance(given, list) else given
    with pytest.raises(ValueError, match="must be one of te-graphs, dense-fp8") as error:
        FSEPConfig(allow_unproven=given)
    assert f"--fsep-allow-unproven {bad!r}" in str(error.value)


def test_words_come_in_one_order_and_once() -> None:
    both = FSEPConfig(allow_unproven=("dense-fp8", "te-graphs"))  # type: ignore[arg-type]
    assert both == FSEPConfig(allow_unproven=[GRAPHS, FP8, GRAPHS])  # type: ignore[arg-type]
    assert FSEPConfig(allow_unproven="te-graphs").allow_unproven == (GRAPHS,)  # type: ignore[arg-type]


def test_ranks_must_allow_the_same() -> None:
    plain, allows = (
        summarise(FSEPConfig(allow_unproven=words), Geometry(2, 8, 5, 2), COSTS, seed=1)
        for words in ((), (FP8, GRAPHS))
    )
    text = describe_difference([plain, allows], [0, 1])
    assert text is not None and "--fsep-allow-unproven is " in text
    assert "dense-fp8 te-graphs on rank 1" in text and "none on rank 0" in text


# Megatron's own parser and validation, in a process of its own.
PROGRAM = """
import contextlib, io, json, logging, pickle, sys
from unittest import mock
from megatron_laer.launch import prepare
prepare()
from megatron.training import arguments
from megatron_laer import plugin, session

REST = ("--num-layers 2 --hidden-size 48 --num-attention-heads 4 --seq-length 48"
        " --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 4 --train-iters 1"
        " --lr 1e-3 --disable-bias-linear --transformer-impl local --bf16"
        " --num-experts 8 --expert-model-parallel-size 2 --moe-layer-freq ([0]*1+[1]*1)"
        " --expert-parallel-mode fsep").split()

class Said(logging.Handler):
    def emit(self, record):
        said.append((record.levelname, record.getMessage()))
logging.getLogger("megatron_laer").addHandler(Said())

def outcome(line):
    said.clear()
    sys.argv = ["script", *REST, *line.split()]
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        mock.patch.object(arguments, "set_global_variables", lambda args: None),
    ):
        try:
            args = arguments.parse_and_validate_args()
        except ValueError as error:
            return str(error)
        config = session.current().config
        plugin.disable()
    kept = pickle.loads(pickle.dumps(args)).fsep_allow_unproven
    listed = [line for line in output.getvalue().splitlines() if "fsep_allow_unproven" in line]
    return {
        "session": list(map(str, config.allow_unproven)),
        "kept": kept,
        "types": sorted({type(word).__name__ for word in kept or ()}),
        "listed": len(listed),
        "fp8": args.fp8,
        "graphs": [args.cuda_graph_impl, sorted(module.name for module in args.cuda_graph_modules)],
        "said": [text for level, text in said if "--fsep-allow-unproven" in text],
    }

said = []
print(json.dumps([outcome(line) for line in json.load(sys.stdin)]))
"""


def outcomes(*lines: str, rank: int = 0) -> list[Any]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu", "RANK": str(rank), "WORLD_SIZE": "2"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    found: list[Any] = json.loads(result.stdout.splitlines()[-1])
    return found


GRAPH_FLAGS = "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router mlp"


def test_megatrons_arguments_pass_through_and_one_line_says_what_nobody_has_run() -> None:
    plain, graphs, fp8, both, missing, idle = outcomes(
        "",
        f"{GRAPH_FLAGS} --fsep-allow-unproven te-graphs",
        "--fp8-format hybrid --fsep-allow-unproven dense-fp8",
        f"{GRAPH_FLAGS} --fp8-format e4m3 --fsep-allow-unproven te-graphs dense-fp8",
        GRAPH_FLAGS,
        "--fsep-allow-unproven dense-fp8",
    )
    assert (plain["session"], plain["kept"], plain["said"]) == ([], None, [])
    assert graphs["session"] == graphs["kept"] == ["te-graphs"] and graphs["fp8"] is None
    assert graphs["graphs"] == ["transformer_engine", ["attn", "mlp", "moe_router"]]
    assert fp8["session"] == fp8["kept"] == ["dense-fp8"] and fp8["fp8"] == "hybrid"
    assert fp8["graphs"] == ["none", []]
    assert both["session"] == ["dense-fp8", "te-graphs"] and both["fp8"] == "e4m3"
    assert both["types"] == ["str"], "plain words, which any Python reads from a checkpoint"
    assert graphs["listed"] == 1, "Megatron lists it among its arguments"
    for found, count in ((graphs, 1), (fp8, 1), (both, 2)):
        assert len(found["said"]) == count
        for word, text in zip(found["session"], found["said"], strict=True):
            assert f"--fsep-allow-unproven {word}: nobody has run FSEP with" in text
            assert UNPROVEN[word] in text
    assert "give --fsep-allow-unproven te-graphs" in missing
    assert "--fsep-allow-unproven dense-fp8: no effect" in idle


def test_only_the_first_rank_says_it() -> None:
    (found,) = outcomes("--fp8-format hybrid --fsep-allow-unproven dense-fp8", rank=1)
    assert found["session"] == ["dense-fp8"] and found["said"] == []
