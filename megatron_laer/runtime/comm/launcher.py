"""Ranks of a job, from the environment variables of torchrun, Open MPI and Slurm.

`process_groups.py` derives groups from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_laer.files.checks import quoted

# Ranks on this node; the first variable that is set counts.
PER_NODE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
# Tasks on every node, as `8(x2)`, and tasks of the whole Slurm step.
SLURM_PER_NODE, SLURM_TASKS = "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"


def check_ranks(environment: Mapping[str, str]) -> None:
    """Raise ValueError for a RANK, LOCAL_RANK or WORLD_SIZE that Megatron could not use."""
    world = _number(environment, "WORLD_SIZE", 1)
    world = 1 if world is None else world  # Megatron's default
    for name in ("RANK", "LOCAL_RANK"):
        rank = _number(environment, name, 0)
        if rank is not None and rank >= world:
            raise ValueError(
                f"{name}={rank} with WORLD_SIZE={environment.get('WORLD_SIZE', '1 (unset)')}: must "
                f"be 0 to {world - 1}; {_WAY_OUT}"
            )


def told_ranks_per_node(environment: Mapping[str, str], world_size: int) -> tuple[str, int] | None:
    """Return the variable that gives the ranks per node, and their number; None if none is set."""
    for name in PER_NODE:
        ranks = _number(environment, name, 1)
        if ranks is None:
            continue
        if ranks > world_size:
            raise ValueError(
                f"{name}={ranks}: more ranks on a node than the {world_size} of the job; {_WAY_OUT}"
            )
        return name, ranks
    # Slurm counts tasks. Tasks are ranks only if their numbers agree; otherwise they are launchers
    # that start several ranks.
    by_node = environment.get(SLURM_PER_NODE)
    if by_node is None or environment.get(SLURM_TASKS) != str(world_size):
        return None
    parts = [re.fullmatch(r"([1-9][0-9]{0,8})(\(x[0-9]+\))?", part) for part in by_node.split(",")]
    sizes = {int(part[1]) for part in parts if part is not None}
    if None in parts:
        raise ValueError(
            f"{SLURM_PER_NODE}={quoted(by_node)}: must be ranks by node, like 8(x2); {_WAY_OUT}, "
            "or give --fsep-node-size"
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{SLURM_PER_NODE}={by_node}: not the same number of ranks on each node; give "
            "--fsep-node-size, if those of each FSEP group lie evenly on them"
        )
    return SLURM_PER_NODE, sizes.pop()


def ranks_per_node(
    environment: Mapping[str, str], world_size: int, devices: int, *, on_cuda: bool
) -> int:
    """Return the ranks of the world on each node; without a launcher, all ranks are on one node.

    Args:
        devices: GPUs that this rank sees.
        on_cuda: whether each rank trains on a GPU.
    """
    told = told_ranks_per_node(environment, world_size)
    if told is not None:
        return told[1]
    # One visible GPU per rank gives no information.
    if on_cuda and world_size > devices > 1:
        names = ", ".join((*PER_NODE, SLURM_PER_NODE))
        raise ValueError(
            f"{world_size} ranks on nodes of {devices} GPUs, and the launcher does not say how "
            f"many are on each ({names}): give --fsep-node-size, or export LOCAL_WORLD_SIZE"
        )
    return world_size


_WAY_OUT = "launchers set it: start the ranks with torchrun, mpirun or srun, or correct it"


def _number(environment: Mapping[str, str], name: str, least: int) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    # Not int(), which accepts blanks, underscores and digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < least:
        raise ValueError(f"{name}={quoted(value)}: must be an integer from {least}; {_WAY_OUT}")
    return int(value)
