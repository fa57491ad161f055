"""Launchers' statements about ranks are accepted or refused, and never ignored."""

from __future__ import annotations

import pytest

from megatron_laer.runtime.comm import launcher

SLURM = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 8),
        (SLURM, 8),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "16"}, 16),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),4(x2)"}, 4),
        # Its tasks are torchrun's, one on each node, and not the ranks.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({"LOCAL_WORLD_SIZE": "2"} | SLURM, 2),
    ],
)
def test_the_ranks_of_a_node_are_as_the_launcher_says(
    environment: dict[str, str], ranks: int | None
) -> None:
    told = launcher.told_ranks_per_node(environment, 16)
    assert (None if told is None else told[1]) == ranks
    assert told is None or told[0] in environment


@pytest.mark.parametrize(
    ("environment", "quoted"),
    [
        ({"LOCAL_WORLD_SIZE": "17"}, "LOCAL_WORLD_SIZE=17"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x1),4(x2)"}, "8(x1),4(x2): not the same"),
    ],
)
def test_what_cannot_be_the_ranks_of_a_node_is_quoted(
    environment: dict[str, str], quoted: str
) -> None:
    with pytest.raises(ValueError, match=r"srun|--fsep-node-size") as error:
        launcher.told_ranks_per_node(environment, 16)
    assert quoted in str(error.value)
    assert len(str(error.value)) < 500


def test_ranks_are_inside_their_world() -> None:
    launcher.check_ranks({})
    launcher.check_ranks({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match=r"RANK=1 with WORLD_SIZE=1 \(unset\).*torchrun"):
        launcher.check_ranks({"RANK": "1"})
