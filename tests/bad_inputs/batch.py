"""Bad settings of the Slurm script. The shell refuses each before Python starts.

Where the script accepts one, it is a dry run, except for missing data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.bad_inputs.case import Case

_SCRIPT = "scripts/slurm/pretrain.sbatch"
_GOOD = {
    "MODEL": "tiny-moe",
    "DATA_PREFIX": "old",
    "DRY_RUN": "1",
    "GPUS_PER_NODE": "2",
    "PYTHON": sys.executable,
}
_NO_NUMBERS = ("x", "-1", "1.5", "1e3", " 7", "08", "0x10", "9" * 30, "\uff17", "a[$(touch ran)]")
_NUMBERS = (
    *("GPUS_PER_NODE", "EP_SIZE", "CAPACITY", "MASTER_PORT"),
    *("MARGIN_MIN", "MAX_REQUEUES", "MAX_RESTARTS"),
)
_OTHERS = (
    ({"MODEL": ""}, "set MODEL to a name"),
    ({"DATA_PREFIX": ""}, "set DATA_PREFIX to a dataset"),
    ({"DATA_PREFIX": "absent", "DRY_RUN": "0"}, "DATA_PREFIX=absent is no dataset"),
    ({"DATA_PREFIX": "pipe", "DRY_RUN": "0"}, "DATA_PREFIX=pipe is no dataset"),
    ({"MODE": "dense"}, "MODE=dense is none of fsep, standard, both"),
    ({"MODE": "fsep standard"}, "is none of fsep, standard, both"),
    ({"MODE": "$(touch ran)"}, "is none of fsep, standard, both"),
    ({"SCRIPT": "absent.py"}, "SCRIPT=absent.py is no file"),
    ({"SCRIPT": "nothing"}, "SCRIPT=nothing is no file"),
    ({"PYTHON": "./absent"}, "no Python at ./absent"),
    ({"MAX_RESTARTS": "1"}, "MAX_RESTARTS=1 would begin at step 0 again"),
    ({"CONTAINER_IMAGE": "x"}, "CONTAINER_IMAGE=x needs Slurm"),
    ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0"),
    ({"CAPACITY": "0"}, "CAPACITY=0"),
    ({"EP_SIZE": "0"}, "EP_SIZE=0"),
    ({"MASTER_PORT": "1023"}, "MASTER_PORT=1023"),
)
_WORDS = ("--save x", "--load x", "--save=x", "--load=x")


def cases() -> Iterator[Case]:
    for name in _NUMBERS:
        for value in _NO_NUMBERS:
            yield _case({name: value}, f"{name}={value}")
    for changed, says in _OTHERS:
        yield _case(changed, says)
    for words in _WORDS:
        yield _case({"CHECKPOINT": "out/run"}, "CHECKPOINT=out/run sets --save and --load", words)


def _case(changed: dict[str, str], says: str, words: str = "") -> Case:
    return Case((_SCRIPT, "--", *words.split()), says, _GOOD | changed)
