"""`pretrain_gpt.py` that stops in the middle of a step, until the run is asked to end.

That is done by a signal or by `--exit-duration-in-mins`. HELD_IN_STEP is the step, counted from 1.
HELD_FOLDER records held ranks, since each is held once. A held rank prints its process id.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

# ruff: noqa: E402 -- imports of Megatron have to follow prepare()
from megatron_laer.launch import prepare

prepare()

from megatron.training import get_args
from megatron.training.global_vars import get_signal_handler

import pretrain_gpt

_forward_step = pretrain_gpt.forward_step


def forward_step(*args: Any, **kwargs: Any) -> Any:
    rank = os.environ["RANK"]
    held = Path(os.environ["HELD_FOLDER"]) / f"rank-{rank}"
    if get_args().curr_iteration + 1 == int(os.environ["HELD_IN_STEP"]) and not held.exists():
        held.touch()
        print(f"rank {rank} is held, process {os.getpid()}", flush=True)
        while not (get_signal_handler()._signal_received or time.time() > _end_s()):
            time.sleep(0.02)
    return _forward_step(*args, **kwargs)


def _end_s() -> float:
    return pretrain_gpt._STARTED_S + 60.0 * (get_args().exit_duration_in_mins or float("inf"))


pretrain_gpt.forward_step = forward_step

if __name__ == "__main__":
    pretrain_gpt.main()
