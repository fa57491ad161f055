"""The back end of the experts' products in whole runs: choice, refusals and resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.checkpoints import iteration_folder
from tests.distributed.conftest import Trainings

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows --ckpt-format torch_dist"

IN_FORCE = {
    "sharding": "experts",
    "capacity": 3,
    "restore_algorithm": "auto",  # at home each layout has its own
    "token_exchange": "rank",
    "gemm": "loop",
    "node_size": 2,
}


def uploads(flags: list[str]) -> int:
    """Train; return how often the torch back end uploaded the ends of groups."""
    from megatron_laer.layer.experts.gemm import torch as grouped

    grouped._ends.cache_clear()
    train(flags)
    return grouped._ends.cache_info().misses


def settings_of(folder: Path) -> dict[str, object]:
    from megatron.core.dist_checkpointing import load_common_state_dict

    args = load_common_state_dict(str(folder))["args"]
    return {name: getattr(args, f"fsep_{name}") for name in IN_FORCE}


def test_a_checkpoint_has_the_settings_in_force_in_place_of_auto(
    trained: Trainings, ranks: RankPools, tmp_path: Path
) -> None:
    auto = " --expert-parallel-mode fsep --ckpt-format torch_dist --fsep-token-exchange auto"
    trained(f"{auto} --save {tmp_path} --save-interval 1", experts=4, steps=1)
    assert ranks(2).run(settings_of, iteration_folder(tmp_path, 1)) == [IN_FORCE] * 2
    # Without a step before it is saved.
    again = f"{auto} --load {tmp_path} --save {tmp_path / 'again'} --save-interval 2"
    trained(again, experts=4, steps=1)
    assert ranks(2).run(settings_of, iteration_folder(tmp_path / "again", 1)) == [IN_FORCE] * 2


def test_a_run_goes_on_with_another_back_end(trained: Trainings, tmp_path: Path) -> None:
    run = partial(trained.each, by=uploads, experts=4)
    assert run(f"{FSEP} --save {tmp_path} --save-interval 1", steps=1) == [0, 0]
    # The schedule of learning rates follows the number of steps, which differs between the runs.
    go_on = f"{FSEP} --load {tmp_path} --override-opt_param-scheduler"
    assert run(go_on, steps=2) == [0, 0]
    assert all(run(go_on + " --fsep-set gemm=torch", steps=2))


def test_sizes_that_a_back_end_cannot_multiply_are_refused_on_every_rank(
    trained: Trainings,
) -> None:
    odd = FSEP + " --fsep-set gemm=torch --moe-ffn-hidden-size 34"
    for result in trained.ends(odd, experts=4, steps=1):
        assert "--fsep-set gemm=torch: sizes of experts must be multiples of 4" in result.traceback
        assert "34 is not; give --fsep-set gemm=loop" in result.traceback
