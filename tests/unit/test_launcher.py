"""Launchers' statements about ranks are accepted or refused, and never ignored."""

from __future__ import annotations

import pytest

from megatron_laer.runtime.comm import launcher

SLURM = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}


@pytest.mark.parametrize(
    ("environment", "devices", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 1, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 1, 4),
        ({"LOCAL_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 1, 8),
        (SLURM, 1, 8),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "16"}, 1, 16),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),4(x2)"}, 1, 4),
        ({"LOCAL_WORLD_SIZE": "2"} | SLURM, 1, 2),
        # Its tasks are torchrun's, one on each node, and not the ranks.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, 16, 16),
        ({}, 16, 16),
        ({}, 1, 16),
        ({}, None, 16),  # without GPUs
        ({}, 8, "--fsep-node-size"),
        ({"LOCAL_WORLD_SIZE": "17"}, 1, "LOCAL_WORLD_SIZE=17"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x1),4(x2)"}, 1, "8(x1),4(x2): not the same"),
    ],
)
def test_ranks_per_node_are_the_launchers_or_all_or_an_error(
    environment: dict[str, str], devices: int | None, expected: int | str
) -> None:
    def found() -> int:
        return launcher.ranks_per_node(environment, 16, devices or 0, on_cuda=devices is not None)

    if isinstance(expected, int):
        assert found() == expected
        return
    with pytest.raises(ValueError, match=r"srun|--fsep-node-size") as error:
        found()
    assert expected in str(error.value) and len(str(error.value)) < 500


def test_ranks_are_inside_their_world() -> None:
    launcher.check_ranks({})
    launcher.check_ranks({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match=r"RANK=1 with WORLD_SIZE=1 \(unset\).*torchrun"):
        launcher.check_ranks({"RANK": "1"})
