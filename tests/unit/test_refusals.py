"""Refusals fire for flags that Megatron's own parser knows, by flag and by field, and only then.

Megatron parses all rows of the table in one process. `tests/distributed/test_refusals.py` has
ranks.

Over 400 lines: tables of flags, and the program that gives them to Megatron.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_laer import rules
from megatron_laer.choices import TokenExchange, Unproven
from megatron_laer.config import FSEPConfig
from megatron_laer.releases import NEXT, NUMBERS
from megatron_laer.rules import (
    PROVED,
    REFUSALS,
    RULES,
    UNPROVEN,
    UNTRIED,
    WITHOUT_EFFECT,
    Rule,
    said,
)
from megatron_laer.support import model as model_support
from tests.parity.rows import ROWS
from tests.processes import python
from tests.releases import FIELDS_BEFORE_NEXT, FIELDS_FROM_NEXT, refused_flags, release_of

pytestmark = pytest.mark.releases


FSEP = "--expert-parallel-mode fsep"
FLEX = "--moe-token-dispatcher-type flex"
PADDING = "--moe-router-padding-for-quantization"
GRAPHS = "--cuda-graph-impl transformer_engine"
OVERLAP = "--overlap-moe-expert-parallel-comm"
REDUCED_EARLY = "--overlap-dispatch-backward-with-experts-wgrad --overlap-grad-reduce"
ALLOW_GRAPHS, ALLOW_FP8 = "--fsep-allow-unproven te-graphs", "--fsep-allow-unproven dense-fp8"
ALLOW_EXPERTS = "--fsep-allow-unproven fp8-experts"
SELECTIVE = "--recompute-granularity selective --recompute-modules"

# Accepted: allowed by name, off for Megatron, the size of a dense part, or without effect.
TAKEN = [
    "",
    f"{GRAPHS} {ALLOW_GRAPHS} --cuda-graph-modules attn",
    f"{GRAPHS} {ALLOW_GRAPHS} --cuda-graph-modules attn moe_router mlp",
    f"{GRAPHS} {ALLOW_GRAPHS} --cuda-graph-scope attn mamba moe_router moe_preprocess",
    f"--fp8-format hybrid {ALLOW_FP8}",
    f"--fp8-format e4m3 --fp8-recipe tensorwise {ALLOW_FP8}",
    f"--fp8-format e4m3 --fp8-recipe tensorwise {ALLOW_EXPERTS}",
    f"--fp8-format e4m3 --fp8-recipe blockwise {ALLOW_EXPERTS}",
    f"--fp8-format e4m3 --fp8-recipe blockwise {ALLOW_EXPERTS} --fp8-param-gather {PADDING}",
    f"--fp8-format hybrid --fp8-recipe mxfp8 {ALLOW_EXPERTS}",
    f"--fp8-format e4m3 --fp8-recipe mxfp8 {ALLOW_EXPERTS} --fp8-param-gather"
    " --reuse-grad-buf-for-mxfp8-param-ag",
    "--cuda-graph-modules moe",
    f"{OVERLAP} --delay-wgrad-compute",
    "--overlap-dispatch-backward-with-experts-wgrad",
    f"{REDUCED_EARLY} --fsep-sharding rows",
    "--tensor-model-parallel-size 2",
    FLEX,
    f"{FLEX} --moe-flex-dispatcher-backend hybridep --fsep-capacity 6",
    "--moe-expert-capacity-factor -1.0",
    PADDING,
    "--moe-router-padding-for-fp8",
    "--recompute-modules core_attn moe_act",
    "--recompute-granularity full --recompute-modules moe_act",
    "--recompute-granularity full --recompute-modules mhc",
    f"{SELECTIVE} mla_up_proj gdn_norm_out",
    f"{SELECTIVE} core_attn moe_act",
]

# Refused for reasons that no rule has, or not without parts. Each part occurs in one problem.
SHARDED = "--use-megatron-fsdp --no-gradient-accumulation-fusion --fsep-sharding experts "
SHARDED += "--ckpt-format fsdp_dtensor --data-parallel-sharding-strategy"
OWN = {
    f"{REDUCED_EARLY} --fsep-planner laer": [],
    f"{REDUCED_EARLY} --fsep-capacity 9 --fsep-node-size 3": [
        "leave out one of them, or give --fsep-sharding rows",
        "--fsep-capacity 9: the slots of 2 ranks",
        "--fsep-node-size 3 does not divide the 2 ranks",
    ],
    "--optimizer dist_muon --fsep-planner laer": [
        "--fsep-sharding rows: it needs whole matrices",
        "but --fsep-planner laer with --fsep-sharding experts: it moves every expert",
    ],
    # The bounds are those of homes, not of rows.
    "--fsep-sharding experts --fsep-capacity 9": [
        "--fsep-capacity 9: each rank has 4 home",
        "5 to 8",
    ],
    # Of two nodes, or with experts at home, gradients and experts take several hops.
    "--fsep-sharding rows --fsep-node-size 1 --fsep-set grad_wire_dtype=fp32": [],
    "--fsep-sharding experts --fsep-node-size 2 --fsep-set restore_algorithm=node": [],
    "--fsep-node-size 2 --fsep-set grad_wire_dtype=fp32": [],
    "--optimizer muon --num-experts 7": ["7 experts cannot be at home on 2 ranks"],
    f"--fsep-token-exchange auto --moe-permute-fusion {FLEX}": [],
    f"{GRAPHS} {ALLOW_GRAPHS} --cuda-graph-modules attn moe": ["--cuda-graph-modules attn moe: "],
    ALLOW_GRAPHS: [f"{ALLOW_GRAPHS}: no effect", UNPROVEN[Unproven.TE_GRAPHS]],
    f"{ALLOW_FP8} --cuda-graph-modules attn": [f"{ALLOW_FP8}: no effect"],
    ALLOW_EXPERTS: [f"{ALLOW_EXPERTS}: no effect", UNPROVEN[Unproven.FP8_EXPERTS]],
    f"{ALLOW_EXPERTS} --fp8-format hybrid": [
        f"--fp8-recipe delayed with --fp8-format hybrid and {ALLOW_EXPERTS}: ",
        "give --fp8-recipe tensorwise (current scaling), blockwise or mxfp8",
    ],
    f"{ALLOW_EXPERTS} --fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather": [
        f"--fp8-param-gather with --fp8-recipe mxfp8 and {ALLOW_EXPERTS} without --reuse-",
        "give --reuse-grad-buf-for-mxfp8-param-ag",
    ],
    f"{ALLOW_EXPERTS} --fp8-format e4m3 --fp8-recipe mxfp8 --fsep-restore 2.5": [
        f"--fsep-restore 2.5 with --fp8-recipe mxfp8 and {ALLOW_EXPERTS}: ",
    ],
    "--use-megatron-fsdp --data-parallel-sharding-strategy no_shard --fsep-sharding rows": [
        "--use-megatron-fsdp with --fsep-sharding rows: ",
        "--use-megatron-fsdp with fused gradient accumulation: ",
        "--ckpt-format torch_dist with --use-megatron-fsdp: ",
        "--data-parallel-sharding-strategy no_shard with",
    ],
    # Other values that a rule of Megatron's settings refuses.
    "--num-experts -4": ["--num-experts -4: "],
    "--expert-model-parallel-size 0": ["--expert-model-parallel-size 0: "],
    "--fp8-format e4m3": ["--fp8-format e4m3: "],
    f"--fp8-format hybrid {GRAPHS} {ALLOW_GRAPHS} --cuda-graph-modules attn": ["--fp8-format hy"],
    "--cuda-graph-impl full_iteration": ["--cuda-graph-impl full_iteration: "],
    f"{GRAPHS} --cuda-graph-modules attn": ["--cuda-graph-impl transformer_engine: nobody has"],
    f"{GRAPHS} {ALLOW_GRAPHS}": ["--cuda-graph-modules other than attn, mamba"],
    f"{GRAPHS} {ALLOW_GRAPHS} --cuda-graph-scope full": ["--cuda-graph-modules other than attn"],
    f"{REDUCED_EARLY} --fsep-sharding experts": [f"{REDUCED_EARLY.replace(' --', ' with --')}: "],
    f"--fp8-format hybrid {ALLOW_FP8} --moe-router-padding-for-fp8": [f"{PADDING} with fp8: "],
    f"{SHARDED} optim": [],
    f"{SHARDED} optim_grads": [],
    f"{SHARDED} optim_grads_params --tensor-model-parallel-size 2 --bf16": [],
}

# Settings of triggers that are no arguments of Megatron.
NO_ARGUMENTS = re.compile(
    r"\b(peft|Megatron-Bridge|adapts_experts|use_kitchen|moe_token_dropping|[a-z]+[.]\w+)=([^ ]+)"
)

PROGRAM = """
import argparse, contextlib, dataclasses, io, json, logging, os, pickle, re, shlex, sys
from unittest import mock
from megatron_laer.launch import prepare
prepare()
from megatron.core.package_info import __version__
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import arguments, checkpointing
import megatron.training.global_vars
from megatron_laer import plugin, session
from megatron_laer.plugin import command_line
from megatron_laer.fsep_flags import config_from_args
from megatron_laer.config import FSEPConfig
from megatron_laer.rules import REFUSALS, RULES, of_fields, problems_by, settings_with
from megatron_laer.support.arguments import fill_in, problems, with_needed_sharding

given = json.load(sys.stdin)

sys.argv = ["script", *"BASE".split()]
parser = arguments.add_megatron_arguments(argparse.ArgumentParser("script", allow_abbrev=False))

def parsed(line):
    args = parser.parse_args([*"BASE".split(), *shlex.split(line)])
    args.rank, args.world_size = 0, 2
    fill_in(args, {})
    return args

def fired(line):
    # The texts of all rules by flag, and by field.
    args = parsed("" if "FSEPConfig" in line else re.sub(given["no_arguments"], "", line))
    more = {name.replace("-", "_"): {"True": True, "0.1": 0.1}.get(value, value)
            for name, value in re.findall(given["no_arguments"], line)}
    try:
        config = eval(line) if line.startswith("FSEPConfig(") else config_from_args(args)
    except ValueError as error:
        return [[str(error)], []]
    settings = settings_with(args, with_needed_sharding(args, config)[0], **more)
    fields = {row.field: getattr(settings, row.argument) for row in REFUSALS
              if row.field and hasattr(settings, row.argument)}
    known = of_fields(argparse.Namespace(**vars(settings) | fields))
    by_field = problems_by([row for row in REFUSALS if row.field], known, as_fields=True)
    return [problems_by(RULES, settings), by_field]

REST = ("--num-layers 2 --hidden-size 48 --num-attention-heads 4 --seq-length 48 --bf16"
        " --max-position-embeddings 48 --micro-batch-size 1 --global-batch-size 4 --train-iters 1"
        " --lr 1e-3 --disable-bias-linear --transformer-impl local --tensor-model-parallel-size 2"
        " --sequence-parallel --num-experts 8 --expert-model-parallel-size 2"
        " --moe-layer-freq ([0]*1+[1]*1)").split()

class Warned(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger("megatron_laer").addHandler(Warned())
warned = []

def validated(line, script=(), checkpoint=(), rank=0, has_muon=True, ranks_here=2):
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE=str(ranks_here))
    warned.clear()
    # This machine has no GPU, on which flags for NCCL are refused before any other.
    sys.argv = ["script", *REST, "--distributed-backend", "gloo", *line.split()]
    loaded = ({"args": argparse.Namespace(**dict(checkpoint)), "iteration": 1}, "", False, None)
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        mock.patch.object(checkpointing, "_load_base_checkpoint", lambda *_, **__: loaded),
        mock.patch.object(
            command_line,
            "sharding_of_checkpoint",
            lambda args: dict(checkpoint).get("fsep_sharding"),
        ),
        mock.patch.object(arguments, "set_global_variables", lambda args: None),
        mock.patch.object(command_line.arguments, "warnings", lambda *_, **__: ["it crawls"]),
        mock.patch("megatron.core.optimizer.HAVE_EMERGING_OPTIMIZERS", has_muon),
    ):
        try:
            args = arguments.parse_and_validate_args(args_defaults=dict(script))
            current = session.current()
            words = [] if current is None else list(map(str, current.config.allow_unproven))
        except ValueError as error:
            assert session.current() is None, line
            return str(error)
        finally:
            plugin.disable()
    args = pickle.loads(pickle.dumps(args))
    lines = output.getvalue().splitlines()
    return {
        "dispatcher": args.moe_token_dispatcher_type,
        "etp": args.expert_tensor_parallel_size,
        "said": [line for line in lines if line.startswith(("FSEP ", "FSEP: "))],
        "padding": args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8,
        "words": words,
        "kept": args.fsep_allow_unproven,
        "types": sorted({type(word).__name__ for word in args.fsep_allow_unproven or ()}),
        "listed": sum("fsep_allow_unproven" in line for line in lines),
        "fp8": args.fp8,
        "graphs": [args.cuda_graph_impl, sorted(m.name for m in args.cuda_graph_modules)],
        "warned": [text for text in warned if "--fsep-allow-unproven" in text],
        "slow": warned.count("FSEP: it crawls"),
    }

def own(line):
    args = parsed(line)
    return problems(args, config_from_args(args))

print(json.dumps({
    "version": __version__,
    "dests": {flag: a.dest for a in parser._actions for flag in a.option_strings},
    "fields": [field.name for field in dataclasses.fields(TransformerConfig)],
    "fired": {line: fired(line) for line in given["lines"]},
    "own": {line: own(line) for line in given["own"]},
    "validated": {name: validated(line, **of) for name, (line, of) in given["cases"].items()},
}))
""".replace(
    "BASE", f"{FSEP} --num-experts 8 --expert-model-parallel-size 2 --transformer-impl local"
)

DISPATCHER = "--moe-token-dispatcher-type"
RESUMED = f"{FSEP} --use-checkpoint-args --load there"
ALLGATHER, ALLTOALL = ({"moe_token_dispatcher_type": name} for name in ("allgather", "alltoall"))
IDLE = "which has no effect without fp8"
GRAPHED = f"{FSEP} {GRAPHS} --cuda-graph-modules attn moe_router mlp"
ONLY_FP8 = f"{FSEP} --fp8-format hybrid {ALLOW_FP8}"
# What is left for FSEP to take.
ETP = "FSEP takes --expert-tensor-parallel-size 1, which it needs"
BOTH = f"FSEP takes {DISPATCHER} alltoall --expert-tensor-parallel-size 1, which it needs"

BY_NODE = f"{FSEP} --fsep-sharding rows --fsep-set restore_algorithm=node"
ONE_HOP = "FSEP: --fsep-set restore_algorithm=node: no effect, since rows take one hop on one node "
ONE_HOP += "(--fsep-node-size); leave it out"
SAVED_ROWS = {"fsep_sharding": "rows"}
GOES_ON = "FSEP takes --fsep-sharding rows: the checkpoint in --load 'there' has it"
MUON = "FSEP takes --fsep-sharding experts: --optimizer muon with --fsep-sharding rows: it needs "
MUON += "whole matrices, and a rank holds rows of them"


def completed(*said: str, **others: Any) -> dict[str, Any]:
    needed = {"dispatcher": "alltoall", "etp": 1, "padding": False, "slow": 1}
    return needed | {"said": [*said]} | others


STOCK = {"dispatcher": "allgather", "etp": 2, "said": [], "words": [], "kept": None}
STOCK |= {"warned": [], "slow": 0}
# Given flags; a script's defaults, or a checkpoint's arguments; and what follows: parts of the
# arguments, or of a refusal.
VALIDATED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | str]] = {
    "mode alone": (FSEP, {}, completed(BOTH)),
    "Muon": (f"{FSEP} --optimizer muon", {}, completed(BOTH, MUON)),
    "no Muon": (f"{FSEP} --optimizer muon", {"has_muon": False}, "run pip install 'emerging-opt"),
    "SGD without Muon": (f"{FSEP} --optimizer sgd", {"has_muon": False}, completed(BOTH)),
    "given": (f"{DISPATCHER} alltoall --expert-tensor-parallel-size 1 {FSEP}", {}, completed()),
    "checkpoint's": (RESUMED, {"checkpoint": ALLTOALL}, completed(ETP)),
    "router padding": (
        f"{FSEP} {PADDING} --moe-router-padding-for-fp8",
        {},
        completed(BOTH, f"FSEP leaves out {PADDING} --moe-router-padding-for-fp8, {IDLE}"),
    ),
    "checkpoint's sharding": (RESUMED, {"checkpoint": SAVED_ROWS}, completed(BOTH, GOES_ON)),
    "sharding over a checkpoint's": (
        f"{RESUMED} --fsep-sharding experts",
        {"checkpoint": SAVED_ROWS},
        completed(BOTH),
    ),
    "a checkpoint's homes that do not fit": (
        f"{RESUMED} --num-experts 9",
        {"checkpoint": {"fsep_sharding": "experts"}},
        completed(BOTH),
    ),
    "on one node": (BY_NODE, {"ranks_here": 4}, completed(ONE_HOP, BOTH)),
    "on two nodes": (BY_NODE, {"ranks_here": 2}, completed(BOTH)),
    "stock": ("", {}, STOCK),
    "given otherwise": (f"{FSEP} {DISPATCHER}=allgather", {}, "allgather"),
    "script's defaults": (
        FSEP,
        {"script": {"expert_tensor_parallel_size": 2}},
        "cannot run: --expert-tensor-parallel-size 2",
    ),
    "checkpoint's allgather": (RESUMED, {"checkpoint": ALLGATHER}, "allgather"),
    "graphs": (
        f"{GRAPHED} {ALLOW_GRAPHS}",
        {},
        {"words": ["te-graphs"], "kept": ["te-graphs"], "fp8": None, "listed": 1}
        | {"graphs": ["transformer_engine", ["attn", "mlp", "moe_router"]]},
    ),
    "fp8 experts": (
        f"{FSEP} --fp8-format hybrid --fp8-recipe tensorwise {ALLOW_EXPERTS}",
        {},
        {"words": ["fp8-experts"], "kept": ["fp8-experts"], "fp8": "hybrid", "listed": 1},
    ),
    "both": (
        f"{GRAPHED} --fp8-format e4m3 {ALLOW_GRAPHS} dense-fp8",
        {},
        # Plain words, which any Python reads from a checkpoint.
        {"words": ["dense-fp8", "te-graphs"], "fp8": "e4m3", "types": ["str"]},
    ),
    "on rank 1": (ONLY_FP8, {"rank": 1}, {"words": ["dense-fp8"], "warned": [], "slow": 0}),
}


def trigger(rule: Rule) -> str:
    """Return words of a command line, or of a recipe, that the rule refuses."""
    example = rule.example if rule.example is not True or not rule.refused else rule.refused
    own = str(example)
    if own.startswith("FSEPConfig("):
        return own
    if not own.startswith("--"):
        is_list = rule.argument == "fsep_allow_unproven"
        own = said(rule.flag, example if is_list or not rule.refused else rule.refused[0])
    others = [
        said(other.flag, 0.1 if other.is_negated else other.values[0])
        for other in rule.next_to
        if other.values != (False, None) and other.flag not in (rule.given + own)
    ]
    return " ".join(filter(None, [rule.given, *others, own]))


@pytest.fixture(scope="module")
def megatron() -> dict[str, Any]:
    triggers = [*map(trigger, RULES)]
    others = re.compile(f"FSEPConfig|{NO_ARGUMENTS.pattern}")
    unknown = refused_flags([line for line in triggers if not others.search(line)])
    cases = {name: (line, of) for name, (line, of, _) in VALIDATED.items()}
    lines = [*TAKEN, *(line for line in triggers if line not in unknown)]
    given = json.dumps(
        {"lines": lines, "own": [*OWN], "cases": cases, "no_arguments": NO_ARGUMENTS.pattern}
    )
    found: dict[str, Any] = json.loads(python("-c", PROGRAM, stdin=given).splitlines()[-1])
    return found


def is_text_of(rule: Rule, text: str, given: str) -> bool:
    """Return whether a refusal names a setting, says why, and what would work."""
    reason = rule.reason
    if rule.words and "nobody has run it" in text:
        reason = f"give --fsep-allow-unproven {rule.allow}, or "
    return text.startswith(given) and reason in text


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.setting)
def test_each_rule_refuses_its_own_input_and_no_other_rule_does(
    megatron: dict[str, Any], rule: Rule
) -> None:
    if trigger(rule) not in megatron["fired"]:
        pytest.skip("this Megatron does not know the flag")
    (by_flag,), by_field = megatron["fired"][trigger(rule)]
    name = rule.flag.split()[0] if rule.flag.startswith("--") else rule.title
    assert is_text_of(rule, by_flag, name) and by_flag.endswith(rule.said_way_out)
    assert [is_text_of(rule, text, rule.field) for text in by_field] == [True] * bool(rule.field)


@pytest.mark.parametrize("line", TAKEN)
def test_what_works_is_not_refused(megatron: dict[str, Any], line: str) -> None:
    assert megatron["fired"][line] == [[], []]


@pytest.mark.parametrize("line", OWN)
def test_our_own_settings_are_refused_beside_megatrons(megatron: dict[str, Any], line: str) -> None:
    found = megatron["own"][line]
    assert [part for part in OWN[line] if not any(part in text for text in found)] == []
    assert bool(found) == bool(OWN[line])


@pytest.mark.parametrize("name", VALIDATED)
def test_arguments_are_completed_and_none_is_overruled(megatron: dict[str, Any], name: str) -> None:
    _, of, expected = VALIDATED[name]
    found = megatron["validated"][name]
    if isinstance(expected, str):
        assert isinstance(found, str) and expected in found
        return
    assert found | expected == found
    if "rank" not in of:
        for word, text in zip(found["words"], found["warned"], strict=True):
            assert f"--fsep-allow-unproven {word}: nobody has run FSEP with" in text
            assert UNPROVEN[word] in text


def twice(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if name and times > 1]


def test_every_rule_is_there_once_and_says_why_and_what_would_work() -> None:
    assert twice(rule.setting for rule in RULES) == []
    assert twice(map(trigger, RULES)) == []
    for rule in RULES:
        assert " " in rule.reason and rule.way_out and "{" not in rule.way_out, rule.setting
    assert all(" " in reason for reason in WITHOUT_EFFECT.values())


def test_every_field_that_has_a_flag_is_linked_to_it_and_every_flag_to_its_field(
    megatron: dict[str, Any],
) -> None:
    dests, fields = megatron["dests"], megatron["fields"]
    for row in REFUSALS:
        if row.flag in dests:
            assert dests[row.flag] == row.argument, row.setting
        if row.field in dests.values():
            assert row.argument == row.field, f"{row.field} has a flag: name it in the row"
        if row.argument in fields and row.argument not in PROVED:
            assert row.field, f"{row.argument} is a field of TransformerConfig: name it in the row"


TABLE = Path(rules.__file__).with_name("rules.toml")


@pytest.mark.parametrize(
    ("good", "damaged", "said"),
    [
        ("[[with_fsdp]]", "[[with_fs", "Expected ']]'"),
        ("[[with_fsdp]]", "[[with_others]]", "with_others must be a known table"),
        ('accepted = "bf16"', 'acepted = "bf16"', "[[refused]] 5, ['--moe-dispatch-fwd-dtype', "),
        (
            'way_out = "use --fsep-sharding rows"',
            "way_out = 7",
            "[[own]] 2, --fsep-allow-unproven: ",
        ),
        ('when = "one_rank"', 'when = "one_rnak"', "when = 'one_rnak' must be a predicate"),
        ('left_out = "speed-only"', 'left_out = "spee-only"', "[[refused]] 11, --moe-expert-rank-"),
        ('fits = "fp8-experts"', 'fits = "fp8"', "[[refused]] 14, --fp8-param-gather: 'fp8': "),
        (
            'flag = "--num-experts"',
            'fla_ = "--num-experts"',
            "[[refused]] 1, None: 'fla_' must be a key",
        ),
        ('untried = """', 'tired = """', "'untried' is absent"),
        ('reason = "it moves every expert"', "", "[[own]] 1, --fsep-planner: "),
    ],
)
def test_a_damaged_table_is_refused_with_the_name_of_the_rule(
    tmp_path: Path, good: str, damaged: str, said: str
) -> None:
    path = tmp_path / TABLE.name
    text = TABLE.read_text(encoding="utf-8")
    assert good in text
    path.write_text(text.replace(good, damaged, 1), encoding="utf-8")
    with pytest.raises(ImportError) as error:
        rules.read_table(path)
    assert said in str(error.value) and str(error.value).endswith("install megatron_laer again")


@pytest.mark.parametrize("seed", range(8))
def test_no_damage_of_an_installed_table_is_read(tmp_path: Path, seed: int) -> None:
    """Pip's record has the digests of all files of a package."""
    content, number = TABLE.read_bytes(), random.Random(seed)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    package, record = tmp_path / "package", tmp_path / "package-1.0.dist-info" / "RECORD"
    package.mkdir()
    record.parent.mkdir()
    record.write_text(f"package/rules.toml,sha256={digest},{len(content)}\n")
    path = package / TABLE.name
    path.write_bytes(content)
    assert rules.read_table(path).keys() >= {"refused", "idle", "proved"}
    for _ in range(5):
        damaged = bytearray(content)
        damaged[number.randrange(len(content))] ^= 1 << number.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ImportError, match="it must be the file that was installed; install"):
            rules.read_table(path)


@dataclass
class Config:
    """Megatron configuration with the fields that checks read, and fields that no release has."""

    moe_token_dispatcher_type: str = "alltoall"
    moe_flex_dispatcher_backend: str | None = "deepep"
    moe_permute_fusion: bool = False
    moe_router_topk: int = 2
    moe_grouped_gemm: bool = False
    moe_teleport: bool = False
    gdp_num_householder: int = 3
    warp_experts: bool = False
    moe_teleport_targets: list[str] = field(default_factory=list)
    recompute_granularity: str | None = None
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    delay_wgrad_compute: bool | None = False
    overlap_moe_expert_parallel_comm: bool = False
    fp8: str | bool | None = None
    fp8_recipe: str = "delayed"
    fp8_param: bool = False
    use_kitchen: bool = False
    cuda_graph_impl: str = "none"
    cuda_graph_modules: list[str] = field(default_factory=list)


def test_every_moe_field_of_this_megatron_is_known(megatron: dict[str, Any]) -> None:
    fields = set(megatron["fields"])
    moe_fields = {name for name in fields if model_support.MOE_FIELD.search(name)}
    known = [*{row.field for row in REFUSALS if row.field}, *PROVED, *WITHOUT_EFFECT]
    assert twice(known) == [], "a field is in two lists"
    assert moe_fields <= set(known), "new in this Megatron: decide what FSEP makes of it"
    gone = {NUMBERS[-1]: FIELDS_FROM_NEXT, NEXT.number: FIELDS_BEFORE_NEXT}
    if (release := release_of(megatron["version"])) in gone:
        assert set(known) - fields == gone[release], "gone from this Megatron"
        assert fields & UNTRIED == (UNTRIED if release == NEXT.number else set())


def test_every_field_and_recompute_called_proved_is_set_by_a_row_of_the_parity_table() -> None:
    given = {flag for row in ROWS for flag in row.fsep_run("")[1]}
    flags = {name: f"--{name.replace('_', '-')}" for name in PROVED}
    flags["num_moe_experts"] = "--num-experts"
    assert [name for name, flag in flags.items() if flag not in given] == []
    (recompute,) = (rule for rule in REFUSALS if rule.flag == "--recompute-modules")
    assert given | {"core_attn"} >= {*recompute.accepted}


def test_a_model_that_works_is_taken_without_a_warning() -> None:
    for config in (
        Config(moe_router_topk=4, moe_grouped_gemm=True),
        Config(fp8=False, delay_wgrad_compute=None),
        Config(moe_flex_dispatcher_backend=None),
        Config(recompute_granularity="full", recompute_modules=["core_attn", "mhc"]),
    ):
        model_support.check(config, FSEPConfig())
        assert model_support.warnings_of(config) == []


@pytest.mark.parametrize(
    ("config", "allowed", "quoted"),
    [
        (Config(fp8=True), Unproven.DENSE_FP8, "fp8=True: restored experts"),
        (Config(fp8="hybrid", fp8_param=True), Unproven.DENSE_FP8, "fp8_param=True"),
        (Config(fp8="hybrid"), Unproven.FP8_EXPERTS, "delayed with --fp8-format hybrid"),
        (Config(fp8="e4m3", use_kitchen=True), Unproven.FP8_EXPERTS, "use_kitchen=True: replicas"),
        (Config(cuda_graph_impl="transformer_engine"), Unproven.TE_GRAPHS, "_modules=[]: layouts"),
        (Config(), Unproven.TE_GRAPHS, "--fsep-allow-unproven te-graphs: no effect"),
    ],
)
def test_a_model_that_a_word_does_not_allow_is_refused(
    config: Config, allowed: Unproven, quoted: str
) -> None:
    with pytest.raises(ValueError, match="cannot run this model") as error:
        model_support.check(config, FSEPConfig(allow_unproven=(allowed,)))
    assert quoted in str(error.value)


def test_fields_that_no_test_covers_are_named_in_one_warning_of_the_first_rank(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = {"moe_teleport": True, "moe_teleport_targets": ["moon"], "warp_experts": True}
    config = Config(gdp_num_householder=2, **unknown)  # type: ignore[arg-type]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        model_support._warn_once.cache_clear()
        assert caplog.records == []
        with caplog.at_level(logging.WARNING):
            model_support.check(config, FSEPConfig())
            model_support.check(config, FSEPConfig())  # the next layer of the same model
    teleport, untried, warp, targets = (record.getMessage() for record in caplog.records)
    assert "moe_teleport=True" in teleport and "does not know" in teleport
    assert "moe_teleport_targets=['moon']" in targets
    assert untried.startswith("gdp_num_householder=2: no test sets this field")
    assert "warp_experts=True" in warp and "does not know" in warp
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for exchange in (TokenExchange.RANK, TokenExchange.NODE):
            overlapped = Config(overlap_moe_expert_parallel_comm=True)
            model_support.check(overlapped, FSEPConfig(token_exchange=exchange))
    (exposed,) = (record.getMessage() for record in caplog.records)
    assert exposed.startswith(f"--fsep-token-exchange node with {OVERLAP}: inside a node")


def test_words_come_in_one_order_and_once() -> None:
    def words(given: Any) -> FSEPConfig:
        return FSEPConfig(allow_unproven=given)

    both = words(("dense-fp8", "te-graphs"))
    assert both == words([Unproven.TE_GRAPHS, Unproven.DENSE_FP8, Unproven.TE_GRAPHS])
    assert words("te-graphs").allow_unproven == (Unproven.TE_GRAPHS,)
    for bad in ("graphs", ["te-graphs", "graphs"], [None], 5, ""):
        with pytest.raises(ValueError, match=r"--fsep-allow-unproven .*: must be one of te-graphs"):
            words(bad)
