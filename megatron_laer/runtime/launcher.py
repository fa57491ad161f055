"""What the launcher says of ranks and nodes, in the environment. Needs neither torch nor ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Ranks per node: torchrun and Open MPI; Slurm, as `8(x2)`.
PER_NODE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
SLURM_PER_NODE = "SLURM_STEP_TASKS_PER_NODE"
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"


def told_ranks_per_node(environment: Mapping[str, str], world_size: int) -> tuple[str, int] | None:
    """The variable that says how many ranks each node has, and the number; None if none says it.

    Args:
        environment: the process's variables.
        world_size: ranks of the world.

    Raises:
        ValueError: a variable that says it holds no number above 0.
    """
    for name in PER_NODE:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return name, int(value)
        if value:
            raise ValueError(
                f"{name}={value!r} is no number of ranks per node; set it to a number from 1 on, "
                "as torchrun and mpirun do, or unset it"
            )
    # Of a step whose tasks are the ranks, and not launchers of them.
    alike = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get(SLURM_PER_NODE, ""))
    if alike and environment.get(SLURM_TASKS) == str(world_size):
        return SLURM_PER_NODE, int(alike[1])
    return None


def ranks_per_node(
    environment: Mapping[str, str], world_size: int, devices: int, *, on_cuda: bool
) -> int:
    """Ranks of the world on each node, as the launcher says; without one, all ranks are on one.

    Args:
        environment: the process's variables.
        world_size: ranks of the world.
        devices: GPUs that this rank sees.
        on_cuda: whether each rank trains on a GPU.

    Raises:
        ValueError: no launcher says it, and the ranks are more than this node's several GPUs; or
            what it says is no number.
    """
    told = told_ranks_per_node(environment, world_size)
    if told is not None:
        return told[1]
    # Where each rank sees one GPU, their number says nothing.
    if on_cuda and world_size > devices > 1:
        raise ValueError(
            f"{world_size} ranks on nodes of {devices} GPUs, and the launcher does not say how "
            f"many are on each ({', '.join((*PER_NODE, SLURM_PER_NODE))}): give --fsep-node-size, "
            "or export LOCAL_WORLD_SIZE"
        )
    return world_size
