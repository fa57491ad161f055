"""Bad settings of the Slurm script. The shell refuses each before Python starts.

Where the script accepts one, it is a dry run.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.bad_inputs.case import Case

_SCRIPT = "scripts/slurm/pretrain.sbatch"
_NO_NUMBERS = ("x", "-1", "1.5", "1e3", " 7", "08", "0x10", "9" * 30, "\uff17", "a[$(touch ran)]")
_NUMBERS = ("GPUS_PER_NODE", "MASTER_PORT", "MARGIN_MIN", "MAX_REQUEUES", "MAX_RESTARTS")
_OTHERS = (
    ({"MAX_RESTARTS": "1"}, "MAX_RESTARTS=1 would begin at step 0 again"),
    ({"CONTAINER_IMAGE": "x"}, "CONTAINER_IMAGE=x needs Slurm"),
)
_STEPS = ("", "many", "0", "-1", "a[$(touch")
_WORDS = ("--save x", "--load x", "--save=x", "--load=x")


def cases() -> Iterator[Case]:
    for name in _NUMBERS:
        for value in _NO_NUMBERS:
            yield _case({name: value}, f"{name}={value}")
    for changed, says in _OTHERS:
        yield _case(changed, says)
    for steps in _STEPS:
        says = f"CHECKPOINT=out/run needs --train-iters, not '{steps}'"
        yield _case({"CHECKPOINT": "out/run"}, says, f"--train-iters={steps}")
    for words in _WORDS:
        says = "CHECKPOINT=out/run sets --save and --load"
        yield _case({"CHECKPOINT": "out/run"}, says, f"--train-iters 1 {words}")


def _case(changed: dict[str, str], says: str, words: str = "") -> Case:
    return Case((_SCRIPT, "train.py", *words.split()), says, {"DRY_RUN": "1"} | changed)
