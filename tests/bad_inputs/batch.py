"""Bad numbers for the Slurm script. The shell refuses each before Python starts.

Where the script accepts one, it is a dry run.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.bad_inputs.case import Case

_SCRIPT = "scripts/slurm/pretrain.sbatch"
_NO_NUMBERS = ("x", "-1", "1.5", "1e3", " 7", "08", "0x10", "9" * 30, "\uff17", "a[$(touch ran)]")
_NUMBERS = ("GPUS_PER_NODE", "MASTER_PORT", "MARGIN_MIN", "MAX_REQUEUES", "MAX_RESTARTS")


def cases() -> Iterator[Case]:
    for name in _NUMBERS:
        for value in _NO_NUMBERS:
            yield Case((_SCRIPT, "train.py"), f"{name}={value}", {"DRY_RUN": "1", name: value})
