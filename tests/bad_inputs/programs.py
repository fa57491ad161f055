"""Bad inputs of benchmarks and of the paper's experiments, and the message expected for each.

Most are published tables with one thing wrong; `make` writes whole ones of our own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.published_files import METHODS, MODELS, RANKS
from tests.bad_inputs.case import Case

_HUGE = 2**36
_FAMILIES = {"e8k2": (32, 10), "e16k4": (24, 30)}
_VALIDATE = "benchmarks/validate_simulator.py --no-here --quick --published"
_FIGURE = "scripts/paper/figure{}.py --toy --work-dir out/paper --published"

Change = Callable[[list[str]], list[str]]


def _line(number: int, text: str) -> Change:
    return lambda lines: [*lines[:number], text, *lines[number + 1 :]]


def _end_to_end() -> list[str]:
    cells = itertools.product(MODELS, ("0.0", "0.0001"), METHODS)
    return [
        "dataset,method,model_name,aux_loss,avg_time_ms",
        *(f"wikitext,{method},{model},{aux},2e4" for model, aux, method in cells),
    ]


def _tokens(family: str) -> list[str]:
    layers, microbatches = _FAMILIES[family]
    places = itertools.product(METHODS[1:], range(layers), range(microbatches), range(RANKS))
    return [
        "rank,method,model_name,layer,iter,token_num",
        *(f"{r},{method},{family},{layer},{m},{900 + r}" for method, layer, m, r in places),
    ]


def _convergence() -> list[str]:
    runs = itertools.product((("megatron", "0.01"), ("LAER", "0.0001")), range(12))
    return [
        "method,aux_loss,iter,loss,time",
        *(f"{method},{aux},{step},{5 - step / 10},900" for (method, aux), step in runs),
    ]


_ABLATIONS = ["method,avg_time_ms", "FSDP,3e4", "LAER,2e4", "no_comm_opt,2.2e4"]
_BREAKDOWN = [
    "rank,model_name,method,alltoall_time,expert_time,total_time",
    *(f"{rank},mixtral-8x7b-e8k2,LAER,5,9,20" for rank in range(2)),
]
_SOLVES = ["n_device,C_e,time", "64,1,0.0005", "64,4,0.001"]

_E2E, _CURVES, _PLANNER = (
    "laer_ae_e2e_wikitext.csv",
    "laer_ae_convergence.csv",
    "laer_ae_planner_seconds.csv",
)
_PARTS, _TIMES = "laer_ae_ablation_ms.csv", "laer_ae_breakdown_seconds.csv"
_RECEIVED = "laer_ae_tokens_e8k2.csv"
_COMMANDS = {
    _E2E: _FIGURE.format(8),
    _CURVES: _FIGURE.format(9),
    _TIMES: _FIGURE.format(10),
    _RECEIVED: _FIGURE.format(10),
    _PLANNER: _FIGURE.format(11),
    _PARTS: _FIGURE.format(12),
}
# By file, name of the folder: the change, and the message of any program that reads the file.
_DAMAGE: dict[str, dict[str, tuple[Change, str]]] = {
    _E2E: {
        "empty": (lambda lines: [], "line 1: the columns are ''"),
        "header": (lambda lines: lines[:1], "the table holds no rows"),
        "columns": (_line(0, "a,b,c"), "line 1: the columns are 'a,b,c', expected one 'dataset'"),
        "short": (_line(3, "wikitext,LAER"), "line 4: 2 values, expected 5"),
        "text": (
            _line(2, "wikitext,LAER,mixtral-8x7b-e8k2,0.0,soon"),
            "line 3: avg_time_ms must be a number above 0, at most 1e+12, got 'soon'",
        ),
        "nan": (_line(2, "wikitext,LAER,mixtral-8x7b-e8k2,0.0,nan"), "got 'nan'"),
        "zero": (_line(2, "wikitext,LAER,mixtral-8x7b-e8k2,0.0,0"), "got '0'"),
        "below": (_line(2, "wikitext,LAER,mixtral-8x7b-e8k2,-1,5"), "aux_loss must be a number of"),
        "escape": (_line(2, "wikitext,\x1b[31m,m,0.0,5"), "method must be a name, got '\\x1b[31m'"),
        "twice": (lambda lines: [*lines, lines[1]], "is there twice; remove one of them"),
        "quote": (_line(2, '"wikitext'), "not CSV"),
        "field": (_line(2, "x" * 200_000 + ",a,b,0,1"), "not CSV: field larger than field limit"),
        "nul": (_line(2, "wikitext,\0,m,0.0,5"), "method must be a name"),
    },
    _RECEIVED: {
        "hole": (lambda lines: lines[:-1], "LAER has 10239 counts, expected one for each layer"),
        "negative": (_line(1, "0,FSDP,e8k2,0,0,-1"), "token_num must be a whole number in 0..2147"),
        "rank": (_line(1, "999999999,FSDP,e8k2,0,0,5"), "rank must be a whole number in 0..99999"),
        "place": (_line(1, "99999,FSDP,e8k2,99999,99999,5"), "counts, expected one for each"),
        "half": (_line(1, "0,FSDP,e8k2,0,0,1.5"), "got '1.5'"),
    },
    _CURVES: {
        "loss": (_line(4, "megatron,0.01,3,inf,900"), "line 5: loss must be a number above 0"),
        "step": (_line(4, "megatron,0.01,2,4,900"), "line 5: method megatron, aux_loss 0.01, iter"),
        "one": (_line(4, "FLEX,0.01,3,4,900"), "FLEX with auxiliary loss 0.01 has 1 steps"),
    },
    _TIMES: {
        "time": (_line(1, "0,mixtral-8x7b-e8k2,LAER,5,9,"), "total_time must be a number above 0"),
        "again": (lambda lines: [*lines, lines[1]], "rank 0, model_name mixtral-8x7b-e8k2, method"),
    },
    _PLANNER: {
        "solve": (_line(1, "64,1,-5"), "line 2: time must be a number above 0"),
        "devices": (_line(1, "6e1,1,5"), "n_device must be a whole number in 0..1048575"),
    },
    _PARTS: {"ablation": (_line(1, "FSDP,1e400"), "line 2: avg_time_ms must be a number above 0")},
}
# Only `validate_simulator` reads these whole.
_LACKING: dict[str, tuple[str, Change, str]] = {
    "cell": (_E2E, lambda lines: lines[:-1], "needs each of megatron, FSDP, FLEX, LAER"),
    "model": (_E2E, _line(1, "wikitext,LAER,moon,0.0,5"), "needs each of megatron, FSDP"),
    "layer": (
        _RECEIVED,
        lambda lines: [line for line in lines if ",31," not in line or not line.startswith("31")],
        "counts, expected one for each",
    ),
}


def cases() -> Iterator[Case]:
    for file, damages in _DAMAGE.items():
        for name, (_, says) in damages.items():
            yield Case((*_COMMANDS[file].split(), f"published-{name}"), says)
            if file in (_E2E, _RECEIVED):
                yield Case((*_VALIDATE.split(), f"published-{name}"), says)
    for name, (_, _, says) in _LACKING.items():
        yield Case((*_VALIDATE.split(), f"published-{name}"), says)


def make(folder: Path) -> None:
    good = {
        _E2E: _end_to_end(),
        _CURVES: _convergence(),
        _PLANNER: _SOLVES,
        _PARTS: _ABLATIONS,
        _TIMES: _BREAKDOWN,
        **{f"laer_ae_tokens_{family}.csv": _tokens(family) for family in _FAMILIES},
    }
    whole = folder / "published"
    whole.mkdir()
    for file, lines in good.items():
        (whole / file).write_text("\n".join(lines) + "\n")

    def copy(name: str, file: str) -> Path:
        place = folder / f"published-{name}"
        place.mkdir()
        for other in good:
            if other != file:
                os.link(whole / other, place / other)
        return place / file

    for file, damages in _DAMAGE.items():
        for name, (change, _) in damages.items():
            copy(name, file).write_text("".join(f"{line}\n" for line in change(good[file])))
    for name, (file, change, _) in _LACKING.items():
        copy(name, file).write_text("".join(f"{line}\n" for line in change(good[file])))
    os.mkfifo(copy("pipe", _PARTS))
    copy("endless", _PARTS).touch()
    os.truncate(folder / "published-endless" / _PARTS, _HUGE)
    os.symlink(whole / _E2E, folder / "published-link.csv")
    _arrays(folder)


def _arrays(folder: Path) -> None:
    import numpy as np

    few = np.ones((3, 1, 2, 1, 4), dtype=np.int32)
    np.savez(folder / "few.npz", tokens=few)
    os.link(folder / "few.npz", folder / "few-hard.npz")
    few[1] = 0
    np.savez(folder / "idle.npz", tokens=few)
    np.savez(folder / "minus.npz", tokens=few - 1)
    np.savez(folder / "flat.npz", tokens=np.ones(4, dtype=np.int64))
    np.savez(folder / "object.npz", tokens=np.array([[{}]], dtype=object))
