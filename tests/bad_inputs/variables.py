"""Bad variables of the environment: the launcher's, ours, Python's and libraries'.

Those that Python or a library reads at its start need a Python of their own, and are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.bad_inputs.case import Case

_NOT_INTEGERS = {
    "nothing": "",
    "text": "many",
    "blank": " 2",
    "newline": "2\n",
    "negative": "-1",
    "exponent": "1e3",
    "fraction": "2.0",
    "Arabic digit": "\u0662",
    "many digits": "9" * 5000,
    "2^63": str(2**63),
    "escapes": "2\x1b[2J",
    "bytes": "2\udce9",
}
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
_PLAN = ("plan", "good.trace")
_DATA = ("prepare-data", "--input", "good.txt", "--output", "out/fresh")
_AT_START = (
    (_PLAN, {"TQDM_MININTERVAL": "abc"}, "TQDM_MININTERVAL='abc': could not convert"),
    (_DATA, {"TQDM_MAXINTERVAL": "\x1b[2J"}, "TQDM_MAXINTERVAL='\\x1b[2J': could not"),
    (("flags", "latin-name.yaml"), {"PYTHONIOENCODING": "ascii"}, "cannot be written in ascii"),
)


def cases() -> Iterator[Case]:
    for name in _OF_RANKS:
        for kind, value in _NOT_INTEGERS.items():
            environment = _TORCHRUN | {name: value}
            if (name, kind) != ("WORLD_SIZE", "nothing"):
                yield Case(("calibrate", "out/c.yaml"), f"{name}='", environment)
            yield Case(("doctor",), f"{name}='", environment, status=1)
    for value in _NOT_INTEGERS.values():
        for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
            yield Case(("doctor",), f"{name}='", _TORCHRUN | {name: value}, status=1)
        yield Case(("doctor",), "CUDA_DEVICE_MAX", {"CUDA_DEVICE_MAX_CONNECTIONS": value}, status=1)
        by_node = {"SLURM_STEP_TASKS_PER_NODE": value, "SLURM_STEP_NUM_TASKS": "2"}
        says = "SLURM_STEP_TASKS_PER_NODE='"
        yield Case(("doctor",), says, {"WORLD_SIZE": "2"} | by_node, status=1)
    for value in ("tpu", "CPU", "", " cpu", "cpu\n", "\x1b[2J", "caf\udce9", "c" * 5000):
        says = "MEGATRON_LAER_DEVICE="
        yield Case(("train", "script.py"), says, {"MEGATRON_LAER_DEVICE": value})
    for words, environment, says in _AT_START:
        yield Case(words, says, environment)


def make(folder: Path) -> None:
    model = "{description: d, data: {data-path: caf\u00e9}}"
    (folder / "latin-name.yaml").write_text(model, encoding="utf-8")
