"""Command lines that cannot work, and the message expected for each.

Words are separated by spaces; files are those of `inputs`, in the folder that the command runs in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.bad_inputs import (
    advise,
    batch,
    fields,
    inputs,
    numbers,
    paths,
    programs,
    report,
    simulate,
    variables,
)
from tests.bad_inputs.case import Case
from tests.parity.flags import command_line

_LONG = "x" * 300


COMMAND_LINE = (
    ("", "required: COMMAND"),
    ("dance", "invalid choice: 'dance'"),
    ("--dance", "required: COMMAND"),
    ("pla good.trace", "invalid choice: 'pla'"),
    ("\x1b[31m", "invalid choice: '\\x1b[31m'"),
    (_LONG * 20, "invalid choice: 'xxx"),
    ("flags", "required: FILE"),
    ("flags a b", "unrecognized arguments: b"),
    ("flags tiny-moe -- --lr", "nothing follows -- here, got --lr"),
    ("inspect", "required: CHECKPOINT"),
    ("inspect nothing --verbose", "unrecognized arguments: --verbose"),
    ("plan", "give a TRACE, or --workload"),
    ("plan good.trace extra", "unrecognized arguments: extra"),
    ("plan good.trace --rank-count 4", "unrecognized arguments: --rank-count 4"),
    ("plan good.trace -- x", "nothing follows -- here, got x"),
    ("calibrate", "required: FILE"),
    ("calibrate out/x.yaml", "exchanges need several ranks; start at least two with `torchrun"),
    ("calibrate out/x.yaml --hours nan", "--hours: 'nan' is no number in 1e-06..8760"),
    ("calibrate out/x.yaml --slow", "unrecognized arguments: --slow"),
    ("calibrate out/x.yaml -- x", "nothing follows -- here, got x"),
    ("doctor now", "unrecognized arguments: now"),
    ("doctor --fix", "unrecognized arguments: --fix"),
    ("doctor -- x", "nothing follows -- here, got x"),
    ("train", "required: SCRIPT"),
    ("train nothing.py", "script 'nothing.py' does not exist"),
    ("train nothing", "script 'nothing' does not exist"),
    ("train pipe", "script 'pipe' does not exist"),
    ("train script.py --lr 1", "unrecognized arguments: --lr 1; the script's own follow --"),
    ("prepare-data", "required: --output"),
    ("prepare-data --output out/x", "one of the arguments --input --python-sources is required"),
)

PLAN_OPTIONS = (
    ("--sharding columns", "invalid choice: 'columns'"),
    ("--trace-ranks 0:3", "must be two numbers such as 0-7, got '0:3'"),
    ("--trace-ranks 3-1", "'3-1' is empty"),
    ("--trace-ranks 0-4", "source ranks [4] are not in the trace"),
    ("--trace-ranks 0-99999999999999999999", "got '0-999"),
    ("--trace-ranks 0-2000000", "exceeds 1048575"),
    ("--trace-ranks a-b", "got 'a-b'"),
    ("--trace-ranks 5", "got '5'"),
    ("--experts 0", "--experts: '0' is no integer in 1..32767"),
    ("--experts 9", "has 8 experts, not 9"),
    ("--ranks 0", "--ranks: '0' is no integer in 1..65536"),
    ("--ranks 3", "for 3 ranks; use one of [1, 2, 4] or a multiple of 4"),
    ("--ranks 65535", "for 65535 ranks; use one of"),
    ("--ranks 65536 --hours 1e-6", "stopped after the 1e-06 hours of --hours"),
    ("--capacity", "--capacity: expected at least one argument"),
    ("--capacity 1", "--capacity 1: the slots of 4 ranks must hold each of 8"),
    ("--capacity 9", "--capacity 9: the slots of 4 ranks must hold each of 8"),
    ("--capacity 3 3", "--capacity names 3 twice"),
    ("--node-size 3", "--node-size 3 does not divide the 4 ranks"),
    ("--ranks 12", "'s 8 does not divide the 12 ranks"),
    ("--cluster moon", "unknown cluster 'moon'; known are"),
    ("--cluster ./moon", "'moon'"),
    ("--cluster ../moon.yaml", "'../moon.yaml'"),
    ("--cluster nothing", "unknown cluster 'nothing'"),
    ("--strategy", "--strategy: expected at least one argument"),
    ("--strategy eplb", "invalid choice: 'eplb'"),
    ("--strategy greedy greedy", "--strategy names greedy twice"),
    ("--strategy Greedy", "invalid choice: 'Greedy'"),
    ("--mode never", "invalid choice: 'never'"),
    ("--mode exact exact", "--mode names exact twice"),
    ("--tolerance 0.1 --mode exact", "--tolerance 0.1: no effect without --mode tolerance"),
    (
        "--homes out/x.json",
        "'good.trace' has no pairs of experts for these ranks; record them with",
    ),
    ("--homes out/x.json --sharding rows", "experts have no home with --sharding rows"),
    ("--homes out/x.json --plot out/x.png", "--plot out/x.png: no effect here"),
    ("--homes out/x.json --json out/x.json", "--homes and --json are one file"),
    ("--homes good.trace", "good.trace"),
    ("--lag 4", "--lag 4: no microbatch with tokens"),
    ("--lag 1000000000", "--lag 1000000000: no microbatch"),
    ("--restore-algorithm ring", "invalid choice: 'ring'"),
    ("--config gpt5", "unknown model 'gpt5'; known are"),
    ("--config ./gpt5", "'gpt5'"),
    ("--config mixtral-8x7b-e16k4", "has 8 experts, not 16"),
    ("--hidden 0", "--hidden: '0' is no integer in 1..1048576"),
    ("--ffn 1048577", "'1048577' is no integer in 1..1048576"),
    ("--every 7", "--every 7: the trace has 6 case(s)"),
    ("--workload W1 --ranks 65536 --experts 64 --hours 0.01", "remove one of them"),
    ("--hours 0", "--hours: '0' is no number in 1e-06..8760"),
    ("--json", "--json: expected one argument"),
    ("--json nowhere/x.json", "--json 'nowhere/x.json': the folder"),
    ("--json nothing", "--json 'nothing': it is there and no regular file"),
    ("--json /dev/full", "--json '/dev/full': it is there and no regular file"),
    ("--json pipe", "--json 'pipe': it is there and no regular file"),
    ("--json good.trace", "--json 'good.trace' would write over the input"),
    ("--json ./good.trace", "--json 'good.trace' would write over the input"),
    ("--json nothing/../good.trace", "would write over the input"),
    ("--json link.trace", "--json 'link.trace' would write over the input"),
    ("--json hard.trace", "--json 'hard.trace' would write over the input"),
    ("--json good.trace/x", "--json 'good.trace/x': the folder"),
    (f"--json {_LONG}.json", "--json 'xxx"),
    ("--plot good.trace", "--plot 'good.trace' would write over the input"),
    ("--plot hard.trace", "--plot 'hard.trace' would write over the input"),
    ("--plot x", "--plot 'x': give a file that ends in"),
    ("--plot x.gid", "--plot 'x.gid': give a file that ends in"),
    ("--plot nowhere/x.png", "--plot 'nowhere/x.png': the folder"),
    ("--plot nothing", "--plot 'nothing': it is there and no regular file"),
    ("--json out.png --plot ./out.png", "are one file; give two"),
    ("--config sizes-other-experts.yaml --json sizes-other-experts.yaml", "write over the input"),
    ("--cluster cluster-zero.yaml --json cluster-zero.yaml", "write over the input"),
)

WORKLOADS = (
    ("--workload W0 --ranks 3 --experts 8 --sharding experts", "8 experts cannot be at home on 3"),
    (
        "--workload W0 --ranks 4 --experts 8 --sharding experts --capacity 2",
        "--capacity 2: each rank has 2 home experts and needs a slot for replicas",
    ),
    ("--workload W1 --ranks 65536 --experts 64 --hours 1e-6", "stopped after the 1e-06 hours"),
    ("--workload W1 --ranks 65536 --experts 512 --steps 100000", "GiB of memory"),
    ("--workload W1 --ranks 8 --experts 8 --topk 9", "a token cannot have 9 of 8 experts"),
    ("--workload W1 --ranks 8 --experts 8 --tokens 16777217", "is no integer in 1..16777216"),
    ("--workload W1 --ranks 8 --experts 32767 --tokens 16777216", "are too many to draw"),
    ("--workload W1 --experts 8", "has no ranks of its own; give --ranks"),
    (
        "--workload W1 --ranks 8 --experts 8 --homes out/x.json",
        "W1 has no pairs of experts; give a",
    ),
)
TRACES = (
    ("absent", "trace 'absent' does not exist"),
    ("-", "trace '-' does not exist"),
    ("\x1b[31m\nFAKE", "trace '\\x1b[31m\\nFAKE' does not exist"),
    (_LONG, "name too long"),
    ("good.trace/x", "trace 'good.trace/x' does not exist"),
    ("loop", "loop"),
    ("pipe", "'pipe' is a pipe"),
    ("/dev/zero", "'/dev/zero' is a device"),
    ("/dev/null", "'/dev/null' is a device"),
    ("/dev/urandom", "'/dev/urandom' is a device"),
    ("nothing", "folder nothing holds no trace"),
    ("two-groups", "holds the recordings of 2 FSEP groups"),
    ("traces --json traces/x.json", "would write over the input 'traces'"),
    ("traces --plot traces/x.png", "would write over the input 'traces'"),
    ("good.txt", "good.txt begins with b'some text'; give a recording of --fsep-record-trace"),
    ("empty.txt", "empty.txt begins with b''"),
    ("script.py", "script.py begins with"),
    ("header-only.trace", "holds no complete record"),
    ("half-header.trace", "half-header.trace, line 1"),
    ("half-record.trace", "half-record.trace"),
    ("flipped.trace", "flipped.trace, record 1"),
    ("width.trace", "no record begins there; the file is damaged there"),
    ("tail.trace", "tail.trace"),
    ("version.trace", "version '9' of the format; this release reads version 2, so"),
    ("no-ranks.trace", "num_ranks must be an integer in 1..1048576, got '0'"),
    ("true-ranks.trace", "num_ranks must be an integer in 1..1048576, got 'True'"),
    ("huge-ranks.trace", "num_ranks must be an integer in 1..1048576"),
    ("huge-experts.trace", "num_experts must be an integer in 1..32767, got '1000000000'"),
    ("text-experts.trace", "num_experts must be an integer in 1..32767, got '8'"),
    ("no-layers.trace", "layers must be names"),
    ("same-layers.trace", "layers must all be different"),
    ("number-layers.trace", "layers must be names"),
    ("null-layers.trace", "layers must be names"),
    ("nested.trace", "nested.trace, line 1"),
    ("one-step.trace", "the trace holds 1 step(s), so record at least 2"),
    ("zeros.trace", "the trace holds no tokens"),
)

PREPARE_DATA = (
    ("--input absent", "'absent' does not exist"),
    ("--input", "--input: expected at least one argument"),
    ("--input empty.txt", "'empty.txt' is empty"),
    ("--input nothing", "'nothing' is a folder; give a regular file"),
    ("--input good.txt/x", "'good.txt/x' does not exist"),
    ("--input good.txt --tokenizer gpt5", "tokenizer 'gpt5'"),
    ("--input good.txt --tokenizer good.txt", "tokenizer 'good.txt'"),
    ("--input good.txt --python-sources", "not allowed with argument --input"),
)
OUTPUTS = (
    ("--input good.txt --output prefix", "output prefix 'prefix' must be a path"),
    ("--input good.txt --output x.bin", "output prefix 'x.bin' must be a path"),
    ("--input good.txt --output good.txt/x", "--output 'good.txt'"),
    ("--input good.txt --output /proc/x", "'/proc'"),
    ("--input good.txt --output", "--output: expected one argument"),
    ("--input old.bin --output old", "old"),
    ("--input old.idx --output ./old", "old"),
    (f"--input good.txt --output {_LONG}", "xxx"),
)

INSPECT = (
    ("absent", "absent is no directory"),
    ("good.txt", "good.txt is no directory"),
    ("nothing", "nothing is no checkpoint"),
    ("run-seven", "holds 'seven', expected an iteration"),
    ("run-negative", "holds '-1', expected an iteration"),
    ("run-nothing", "holds '', expected an iteration"),
    ("run-digits", "holds '999"),
    ("run-up", "holds '../../etc', expected an iteration"),
    ("run-escape", "holds '\\x1b[31m', expected an iteration"),
    ("run-missing", "names iter_0000008, which has no metadata.json"),
    ("run-huge", "has 68,719,476,736 bytes; at most 1,048,576"),
    ("checkpoint-json", "metadata.json is not JSON: Expecting"),
    ("checkpoint-json-list", "holds no JSON object"),
    ("checkpoint-json-nested", "metadata.json is not JSON: nested too deeply"),
    ("checkpoint-json-digits", "metadata.json is not JSON: a number is too long"),
    ("checkpoint-json-latin", "is not UTF-8"),
    ("checkpoint-json-huge", "has 68,719,476,736 bytes; at most 1,048,576"),
    ("checkpoint-list-huge", "has 68,719,476,736 bytes; at most 268,435,456"),
    ("checkpoint-no-list", "checkpoint-no-list/.metadata"),
    ("checkpoint-pipe", "'checkpoint-pipe/.metadata' is a pipe"),
)

CHECK_RECIPE = (
    ("", "give one of FILE"),
    ("absent.yaml", "absent.yaml"),
    ("absent", "'absent'"),
    ("pipe", "'pipe' is a pipe"),
    ("yaml-pipe.yaml", "is a pipe"),
    ("yaml-latin.yaml", "is not UTF-8"),
    ("good.trace", "good.trace"),
    ("--bridge-csv absent.csv", "absent.csv"),
    ("--bridge-csv pipe", "'pipe' is a pipe"),
    ("--bridge-csv latin.csv", "is not UTF-8"),
    ("--bridge-csv endless.csv", "has 68,719,476,736 bytes"),
    ("--bridge-csv long.csv", "long.csv"),
    ("--bridge-csv good.trace", "good.trace"),
    ("--bridge-csv long.csv --json no/out.json", "--json 'no/out.json'"),
    ("--bridge-csv long.csv --json long.csv", "would write over the input"),
    ("--json out.json", "give one of FILE"),
    ("good.trace --json out.json", "--json 'out.json': only with --bridge-csv"),
    ("good.trace -- --lr 1", "give one of FILE"),
    ("--lr 1", "unrecognized arguments: --lr; the script's own follow --"),
)


SCRIPT = str(Path(__file__).resolve().parents[2] / "pretrain_gpt.py")
FLAGS = tuple(command_line("absent", steps=1))


def every_case() -> list[Case]:
    cases: dict[tuple[object, ...], Case] = {}
    for case in _all():
        cases.setdefault(case.key, case)
    return list(cases.values())


def _all() -> Iterator[Case]:
    from tests.bad_inputs import training

    for words, says in COMMAND_LINE:
        yield Case(tuple(words.split(" ")) if words else (), says)
    for options, says in PLAN_OPTIONS:
        yield _case(f"plan good.trace {options}", says)
    for options, says in WORKLOADS:
        yield _case(f"plan {options}", says)
    yield Case(("plan", ""), "the path is empty; give a file")
    yield Case(("plan", "good.trace", "--json", ""), "--json: the path is empty")
    yield Case(("plan", "good.trace", "--cluster", ""), "unknown cluster ''")
    for words, says in TRACES:
        yield Case(("plan", *words.split(" ")), says)
    yield from _yaml_cases()
    for words, says in INSPECT:
        yield Case(("inspect", *words.split(" ")), says)
    yield Case(("inspect", ""), "")
    for words, says in report.CASES:
        yield Case(("report", *words.split(" ")) if words else ("report",), says)
    yield from simulate.cases()
    yield from advise.cases()
    yield Case(("simulate", "good.trace", "--model", "tiny-moe", "--json", ""), "the path is empty")
    for words, says in programs.cases():
        yield _case(words, says)
    for words, says in CHECK_RECIPE:
        yield Case(("check-recipe", *words.split()), says)
    for name, (_, says) in inputs.pickles().items():
        yield Case(("inspect", f"checkpoint-{name}"), says)
    # Cases run at once, and two that write one output would refuse each other.
    for number, (words, says) in enumerate(PREPARE_DATA):
        yield Case(("prepare-data", *words.split(" "), "--output", f"out/data{number}"), says)
    for words, says in OUTPUTS:
        yield Case(("prepare-data", *words.split(" ")), says)
    yield Case(("prepare-data", "--input", "", "--output", "out/data"), "the empty path")
    yield Case(("prepare-data", "--input", "good.txt", "--output", ""), "''")
    for extra, says, environment in training.CASES:
        words = ("train", SCRIPT, "--", *FLAGS, *extra)
        yield Case(words, says, training.RANKS | environment)
    for extra_words, says in training.UNMODIFIED:
        extra = (training.ON + extra_words).split()
        yield Case(("train", "megatrons.py", "--", *FLAGS, *extra), says, training.RANKS)
    for part in (paths, numbers, fields, variables, batch):
        yield from part.cases()


def _yaml_cases() -> Iterator[Case]:
    shared = [(f"yaml-{name}", says) for name, (_, says) in inputs.YAML.items()]
    shared += [
        ("yaml-latin", "is not UTF-8"),
        ("yaml-utf16", "is not UTF-8"),
        ("yaml-sparse", "has 68,719,476,736 bytes; at most 65,536"),
        ("yaml-pipe", "is a pipe"),
        ("yaml-folder", "is a folder"),
        ("absent", "absent.yaml"),
    ]
    for name, says in shared:
        yield Case(("flags", f"{name}.yaml"), says)
        yield Case(("plan", "good.trace", "--cluster", f"{name}.yaml"), says)
    for name, (_, says) in inputs.MODELS.items():
        yield Case(("flags", f"model-{name}.yaml"), says)
    for name, says in (*shared[:4], ("model-off", "swiglu is 'false'")):
        yield Case(("plan", "good.trace", "--config", f"{name}.yaml"), says)
    for name, (_, says) in inputs.SIZES.items():
        yield Case(("plan", "good.trace", "--config", f"sizes-{name}.yaml"), says)
    for name, (_, _, says) in inputs.CLUSTERS.items():
        yield Case(("plan", "good.trace", "--cluster", f"cluster-{name}.yaml"), says)
    for words, says in (
        ("gpt5", "unknown model 'gpt5'; known are"),
        ("", "unknown model ''"),
        (".", "unknown model '.'"),
        ("./", "is a folder"),
        ("/dev/zero", "'/dev/zero' is a device"),
        ("\x1b[31m", "unknown model '\\x1b[31m'"),
        (f"./{_LONG}", "name too long"),
    ):
        yield Case(("flags", words), says)


def _case(words: str, says: str) -> Case:
    return Case(tuple(words.split(" ")), says)
