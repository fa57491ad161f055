"""Environment variables that the package and its scripts read, with their meanings.

The docs show this table, and a test compares it with the code. Slurm's batch script has its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum


class Owner(StrEnum):
    """Party that sets a variable."""

    USER = "you"
    LAUNCHER = "the launcher"
    TESTS = "you, for the tests"


@dataclass(frozen=True)
class Variable:
    """Environment variable with the effect of its values, in Markdown."""

    name: str
    meaning: str
    owner: Owner = Owner.USER


DEVICE = "MEGATRON_LAER_DEVICE"
UNRELEASED_MEGATRON = "MEGATRON_LAER_UNRELEASED_MEGATRON"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

VARIABLES = (
    Variable(
        DEVICE,
        "`cpu`: run on the CPU with gloo, also where there is a GPU. `cuda`: fail without one. "
        "`auto`, as if unset: on the CPU if there is no GPU",
    ),
    Variable(
        UNRELEASED_MEGATRON,
        "the number of Megatron's next release, to run its main branch: "
        "[Releases](releasing.md#a-new-release-of-megatron)",
    ),
    Variable(
        CONNECTIONS,
        "CUDA's; with 1, exchanges hardly overlap with compute, which is warned of. Megatron asks "
        "for 1 with tensor or context parallelism before Blackwell",
    ),
    Variable("CUDA_VISIBLE_DEVICES", "CUDA's; set to nothing where a run is on the CPU"),
    Variable("TORCHDYNAMO_DISABLE", "torch's; 1 where a run is on the CPU, whatever you set"),
    Variable(
        "CXX",
        "the C++ compiler, for an installation from source and for Megatron's dataset helper",
    ),
    Variable(
        "PYTHON",
        "the Python that `scripts/quickstart.sh`, `scripts/test.sh` and the batch script take: "
        "[Installing](install.md)",
    ),
    Variable(
        "TORCH_INDEX_URL",
        "where `scripts/quickstart.sh` and `scripts/test.sh` take torch from: "
        "[Installing](install.md#a-light-first-try)",
    ),
    Variable("RANK", "this process's number", Owner.LAUNCHER),
    Variable("WORLD_SIZE", "number of ranks", Owner.LAUNCHER),
    Variable("LOCAL_RANK", "this process's number on its node, and its GPU", Owner.LAUNCHER),
    Variable(
        "LOCAL_WORLD_SIZE",
        "torchrun's number of ranks on this node; `--fsep-node-size` wins over it and over those "
        "of Open MPI and Slurm",
        Owner.LAUNCHER,
    ),
    Variable(
        "TORCHELASTIC_RUN_ID",
        "torchrun's; tells that it may start ranks again: [Recordings](checkpoints.md#recordings)",
        Owner.LAUNCHER,
    ),
    Variable("OMPI_COMM_WORLD_RANK", "Open MPI's, for `doctor`", Owner.LAUNCHER),
    Variable("OMPI_COMM_WORLD_SIZE", "Open MPI's, for `doctor`", Owner.LAUNCHER),
    Variable(
        "OMPI_COMM_WORLD_LOCAL_SIZE", "Open MPI's number of ranks on this node", Owner.LAUNCHER
    ),
    Variable("SLURM_JOB_ID", "Slurm's, for `doctor`", Owner.LAUNCHER),
    Variable("SLURM_PROCID", "Slurm's, for `doctor`", Owner.LAUNCHER),
    Variable(
        "SLURM_STEP_TASKS_PER_NODE",
        "Slurm's number of ranks on each node, where a task is a rank",
        Owner.LAUNCHER,
    ),
    Variable(
        "SLURM_STEP_NUM_TASKS", "tells whether a task of Slurm's step is a rank", Owner.LAUNCHER
    ),
    Variable(
        "MEGATRON_LAER_NEED_SLURM",
        "1: a machine without Slurm fails instead of skipping its tests",
        Owner.TESTS,
    ),
    Variable(
        "MEGATRON_LM_CHECKOUT",
        "a checkout of the installed Megatron-LM, for tests of its own scripts and tests",
        Owner.TESTS,
    ),
    Variable(
        "MEGATRON_LM_NEXT",
        "a checkout of Megatron's main branch, for `scripts/test.sh --nightly`",
        Owner.TESTS,
    ),
    Variable(
        "MEGATRON_BRIDGE_CHECKOUT",
        "a checkout of Megatron-Bridge 0.6, for tests of its loop and its weights",
        Owner.TESTS,
    ),
    Variable(
        "SLIME_CHECKOUT",
        "a checkout of slime, for a test of its copies of models, its loader and its weights",
        Owner.TESTS,
    ),
)


# Prefixes of variables by the library that reads them at import without naming them in its errors.
_READ_BY = {"tqdm": ("TQDM_",), "matplotlib": ("MPL", "MATPLOTLIBRC")}


def variables_behind(error: BaseException) -> dict[str, str]:
    """Return the set variables that concern the library which raised an error, by name."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    prefixes = _READ_BY.get(module.partition(".")[0], ())
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
