"""Bad inputs of `simulate`: its words, and the expected message."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bad_inputs.case import Case

_MODEL = "--model mixtral-8x7b-e8k2 --node-size 2"
_FP8 = "--fp8-format e4m3 --fp8-recipe tensorwise"

# Added to a good trace and a good model.
_OPTIONS = (
    ("--cluster moon", "--cluster 'moon': unknown cluster"),
    ("--experts 8", "unrecognized arguments: --experts 8"),
    ("--ranks 3", "--node-size 2 does not divide the 3 ranks"),
    ("--ranks 6", "cannot be planned for 6 ranks"),
    ("--ranks 4 4", "--ranks names 4 twice"),
    ("--sharding rows rows", "--sharding names rows twice"),
    ("--capacity 1", "--capacity 1: the slots of 4 ranks must hold each of 8"),
    ("--mode announced", "--mode: invalid choice: 'announced'"),
    ("--method", "--method: expected at least one argument"),
    ("--method eplb", "--method: invalid choice: 'eplb'"),
    ("--strategy moon", "--strategy: invalid choice: 'moon'"),
    ("--sharding columns", "--sharding: invalid choice: 'columns'"),
    ("--sharding experts --strategy laer", "--strategy laer: moves every expert"),
    ("--lora-rank 8 --strategy laer", "experts at home, which these flags need; use another st"),
    ("--sharding experts --ranks 16", "in equal numbers; give --sharding rows, or a number of"),
    ("--fp8-recipe blockwise", "--fp8-recipe 'blockwise': no effect without --fp8-format"),
    ("--fp8-format e4m3", "--fp8-recipe delayed with --fp8-format e4m3 and --fsep-allow-"),
    (_FP8, "a100-4x8-ib800 has no speed of GEMMs in fp8"),
    (f"{_FP8} --cluster h100-8 --sharding rows", "give --sharding experts"),
    ("--data-parallel-sharding-strategy optim --sharding rows", "give --sharding experts"),
    (
        f"--data-parallel-sharding-strategy optim {_FP8} --cluster h100-8",
        "no Megatron-FSDP",
    ),
    ("--data-parallel-sharding-strategy optim --pipeline 2", "takes no pipeline"),
    ("--lora-rank 0", "--lora-rank: '0' is no integer in 1.."),
    ("--lora-rank 4097", "--lora-rank 4097: is above the model's hidden size, 4096; give a"),
    ("--lora-targets linear_fc1", "--lora-targets linear_fc1: no effect without --lora-rank"),
    ("--lora-rank 8 --lora-targets linear_fc1 linear_fc1", "names linear_fc1 twice; remove one"),
    ("--lora-rank 8 --lora-targets router", "--lora-targets: invalid choice: 'router'"),
    ("--lora-rank 8 --sharding rows", "give --sharding experts, or --lora-targets of attention"),
    (
        f"--lora-rank 8 {_FP8} --cluster h100-8",
        "--lora-rank 8 with --fp8-format: no test proves adapters with it",
    ),
    (
        "--lora-rank 8 --data-parallel-sharding-strategy optim",
        "--lora-rank 8 with --data-parallel-sharding-strategy optim: no test proves adapters",
    ),
    ("--fp8-format e5m2", "--fp8-format: invalid choice: 'e5m2'"),
    ("--restore step --mode exact", "--restore step keeps layouts over a step, got --mode exact"),
    ("--lag 4", "the trace holds 4 step(s), and a forecast is 4 step(s) old"),
    ("--pipeline 33", "32 layers are too few for 33 stages"),
    ("--virtual-pipeline 2", "the interleaved schedule needs a pipeline"),
    ("--pipeline 2 --virtual-pipeline 2", "takes a multiple of the stages"),
    ("--tensor-parallel 3", "3 tensor-parallel ranks do not divide the 4"),
    ("--stock-expert-parallel 3", "it must divide 4 ranks"),
    ("--world 6", "--world 6 is no multiple of the trace's 4 ranks"),
    ("--world 8 --ranks 4 16", "--world 8 is no multiple of --ranks 16"),
    ("--workload W1", "remove one of them"),
    ("--json good.trace", "--json 'good.trace' would write over the input 'good.trace'"),
    ("-- x", "nothing follows -- here, got x"),
)
# Without the options of the others.
_OTHERS = (
    ("", "required: --model"),
    ("good.trace", "required: --model"),
    ("good.trace --model", "--model: expected one argument"),
    # `flags` and `plan` read many files of models and clusters.
    ("good.trace --model sizes-other-experts.yaml", "has no num-layers in 1..4096"),
    ("good.trace --model moon", "--model 'moon': unknown model 'moon'"),
    ("good.trace --model \x1b[31m", "unknown model '\\x1b[31m'"),
    (f"absent {_MODEL}", "trace 'absent' does not exist"),
    (f"measured {_MODEL} --json measured/x.json", "would write over the input 'measured'"),
    (_MODEL, "nothing to simulate: give a TRACE, or --workload"),
    (f"--workload W9 {_MODEL}", "--workload: invalid choice: 'W9'"),
    (f"--workload W1 {_MODEL}", "--workload W1 has no ranks of its own; give --ranks"),
    (
        "--workload W1 --model tiny-moe --ranks 30 --cluster h100-8",
        "--node-size is not given, and h100-8's 8 does not divide the 30 ranks",
    ),
    (f"--workload W1 {_MODEL} --ranks 8 --trace-ranks 0-3", "no effect here; --workload W1 reads"),
    (f"--workload W1 {_MODEL} --ranks 65536 --lag 100000", "would take about"),
    ("--workload W1 --model deepseek-v3 --ranks 65536 --lag 120", "GiB of memory"),
    (f"--workload W1 {_MODEL} --ranks 4096 --hours 1e-5", "stopped after the 1e-05 hours of"),
)


def cases() -> Iterator[Case]:
    for words, says in (*_OTHERS, *((f"good.trace {_MODEL} {words}", s) for words, s in _OPTIONS)):
        yield Case(("simulate", *words.split(" ")) if words else ("simulate",), says)
