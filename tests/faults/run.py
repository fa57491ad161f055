"""A rank that `torchrun` starts, and starts again: `torchrun ... -m tests.faults.run SPEC.json`.

SPEC names the flags of the run, a folder for what the ranks saw, and a rank and step. There, at the
first start, the fault `kill` ends the rank, and `layout` gives it another layout than the others
hold under the same version. Each rank writes a line per step.
"""

from __future__ import annotations

from megatron_laer.launch import prepare

prepare()

# ruff: noqa: E402 -- imports of torch have to follow prepare()
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from tests.faults.delays import digest
from tests.faults.injected import current_step, other_layout, signal_in_step
from tests.parity.training import train


def main(path: str) -> None:
    """One attempt at the run."""
    spec = json.loads(Path(path).read_text())
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

    corrupt = other_layout(spec["rank"], spec["step"], ahead=False)

    def tell(model: list[torch.nn.Module]) -> None:
        line = {"attempt": attempt, "step": current_step(), "digest": digest(model)}
        with (Path(spec["folder"]) / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if spec["fault"] == "layout" and attempt == 0:
            corrupt(model)

    with contextlib.ExitStack() as stack:
        if spec["fault"] == "kill" and attempt == 0:
            stack.enter_context(signal_in_step(spec["step"], spec["rank"], signal.SIGKILL))
        if spec["fault"] in ("SIGTERM", "SIGUSR1"):
            number = signal.Signals[spec["fault"]]
            stack.enter_context(signal_in_step(spec["step"], spec["rank"], number, to_group=True))
        train(spec["flags"], tell)


if __name__ == "__main__":
    main(sys.argv[1])
