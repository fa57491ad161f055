"""Helpers that run shell scripts and replace the programs that they call."""

import os
from pathlib import Path

from tests import processes

_ROOT = Path(__file__).resolve().parents[2]


def shell(*words, cwd=_ROOT, timeout_s=600, **environment):
    told = ("SLURM_", "MEGATRON_LAER_NEED_SLURM")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(told)}
    command = ["bash", *map(str, words)]
    return processes.run(command, timeout_s, env=kept | environment, cwd=cwd)


def fake_python(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
