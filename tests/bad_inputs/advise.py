"""Bad inputs of `advise`: its words, and the expected message."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bad_inputs.case import Case

_RUN = "--model mixtral-8x7b-e8k2 --cluster h100-8"
_CASES = (
    ("", "required: --model, --gpus"),
    (f"good.trace {_RUN}", "required: --gpus"),
    (f"good.trace {_RUN} --gpus 1", "argument --gpus: '1' is no integer in 2..65536"),
    (f"good.trace {_RUN} --gpus 6 --pipeline 4", "--gpus 6: is no multiple of 4 pipeline stages"),
    (f"good.trace {_RUN} --gpus 6 --tensor-parallel 4", "1 pipeline stages times 4 tensor"),
    (f"good.trace {_RUN} --gpus 9", "cannot be planned for 9 ranks"),
    (f"{_RUN} --gpus 9", "--gpus 9: a stage of 9 ranks has no group that fills nodes of 8"),
    (f"{_RUN} --gpus 8 --cluster moon", "--cluster 'moon': unknown cluster"),
    (f"{_RUN} --gpus 8 --model moon", "--model 'moon': unknown model 'moon'"),
    (f"{_RUN} --gpus 8 --cluster cpu-gloo", "--cluster cpu-gloo has no card; give --memory"),
    (
        f"{_RUN} --gpus 8 --ranks 8",
        "unrecognized arguments: --ranks, did you mean --trace-ranks?; ",
    ),
    (f"{_RUN} --gpus 8 --world 8", "unrecognized arguments: --world, did you mean --workload?; "),
    (f"{_RUN} --gpus 66 --pipeline 33", "32 layers are too few for 33 stages"),
    (f"{_RUN} --gpus 8 --virtual-pipeline 2", "the interleaved schedule needs a pipeline"),
    (f"good.trace {_RUN} --gpus 8 --workload W1", "remove one of them"),
    (f"{_RUN} --gpus 8 --trace-ranks 0-3", "--trace-ranks 0-3: no effect here; --workload "),
    (f"{_RUN} --gpus 8 --json -", "argument --json: '-' is no file here; give a file"),
    (f"good.trace {_RUN} --gpus 8 --json good.trace", "--json 'good.trace' would write over"),
    (
        f"{_RUN} --gpus 8 --fp8-format e4m3",
        "--fp8-recipe delayed with --fp8-format e4m3 and --",
    ),
    (f"{_RUN} --gpus 8 --recipe absent", "--recipe 'absent': No such file or directory"),
    (f"{_RUN} --gpus 8 --experts 8", "unrecognized arguments: --experts; "),
    (
        f"{_RUN} --gpus 8 --model sizes-dense.yaml",
        "num-experts, so all its layers are",
    ),
    (f"{_RUN} --gpus 8 --recipe x -- --bf16", "both --recipe x and flags after --; remove one"),
    (f"{_RUN} --gpus 65536 --hours 1e-5", "stopped after the 1e-05 hours of"),
)


def cases() -> Iterator[Case]:
    for words, says in _CASES:
        yield Case(("advise", *words.split(" ")) if words else ("advise",), says)
