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
        ({"LOCAL_WORLD_SIZE": value}, f"LOCAL_WORLD_SIZE={shown}")
        for value, shown in [
            ("abc", "'abc'"),
            ("", "''"),
            ("0", "'0'"),
            ("-2", "'-2'"),
            ("2.0", "'2.0'"),
            (" 2", "' 2'"),
            ("٣", "'٣'"),
            ("17", "17"),
            ("9" * 400, "'999"),
        ]
    ]
    + [
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "x"}, "OMPI_COMM_WORLD_LOCAL_SIZE='x'"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x1),4(x2)"}, "8(x1),4(x2): not the same"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE='many'"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": ""}, "SLURM_STEP_TASKS_PER_NODE=''"),
    ],
)
def test_what_cannot_be_the_ranks_of_a_node_is_quoted(
    environment: dict[str, str], quoted: str
) -> None:
    with pytest.raises(ValueError, match=r"srun|--fsep-node-size") as error:
        launcher.told_ranks_per_node(environment, 16)
    assert quoted in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
    ],
)
def test_a_rank_inside_its_world_is_taken(environment: dict[str, str]) -> None:
    launcher.check_ranks(environment)


@pytest.mark.parametrize(
    ("environment", "quoted"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK='abc'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: must be 0 to 1"),
        ({"RANK": "1"}, "RANK=1 with WORLD_SIZE=1 (unset)"),
        ({"RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE=''"),
    ],
)
def test_a_rank_that_cannot_be_is_quoted(environment: dict[str, str], quoted: str) -> None:
    with pytest.raises(ValueError, match="torchrun") as error:
        launcher.check_ranks(environment)
    assert quoted in str(error.value)
