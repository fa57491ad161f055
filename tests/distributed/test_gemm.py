"""The back end of the experts' products in whole runs: choice, refusals and resuming."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_laer.cpu.ranks import Raised, RankPools
from megatron_laer.cpu.training import train
from tests.checkpoints import iteration_folder
from tests.messages import messages
from tests.parity.flags import command_line

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows --ckpt-format torch_dist"

IN_FORCE = {
    "sharding": "experts",
    "capacity": 3,
    "restore_algorithm": "auto",  # at home each layout has its own
    "token_exchange": "rank",
    "gemm": "loop",
    "node_size": 2,
}


def command(text_data: str, steps: int, extra: str) -> list[str]:
    return command_line(text_data, FSEP + extra, experts=4, steps=steps)


def listen(flags: list[str]) -> tuple[list[str], int]:
    from megatron_laer.layer.experts.gemm import torch as grouped

    grouped._ends.cache_clear()
    with messages(logging.WARNING) as lines:
        train(flags)
    return [line for line in lines if "--fsep-set gemm" in line], grouped._ends.cache_info().misses


def settings_of(folder: Path) -> dict[str, object]:
    from megatron.core.dist_checkpointing import load_common_state_dict

    args = load_common_state_dict(str(folder))["args"]
    return {name: getattr(args, f"fsep_{name}") for name in IN_FORCE}


def test_a_checkpoint_has_the_settings_in_force_in_place_of_auto(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    auto = " --expert-parallel-mode fsep --ckpt-format torch_dist --fsep-token-exchange auto"
    flags = command_line(
        text_data, f"{auto} --save {tmp_path} --save-interval 1", experts=4, steps=1
    )
    ranks(2).run(train, flags)
    assert ranks(2).run(settings_of, iteration_folder(tmp_path, 1)) == [IN_FORCE] * 2
    # Without a step before it is saved.
    again = f"{auto} --load {tmp_path} --save {tmp_path / 'again'} --save-interval 2"
    ranks(2).run(train, command_line(text_data, again, experts=4, steps=1))
    assert ranks(2).run(settings_of, iteration_folder(tmp_path / "again", 1)) == [IN_FORCE] * 2


def test_a_run_that_goes_on_with_another_back_end_says_so(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    pool = ranks(2)
    saved = pool.run(listen, command(text_data, 1, f" --save {tmp_path} --save-interval 1"))
    assert saved == [([], 0), ([], 0)]
    # The schedule of learning rates follows the number of steps, which differs between the runs.
    go_on = f" --load {tmp_path} --override-opt_param-scheduler"
    assert pool.run(listen, command(text_data, 2, go_on)) == saved
    (first, uploads), (second, _) = pool.run(
        listen, command(text_data, 2, go_on + " --fsep-set gemm=torch")
    )
    assert uploads > 0 and second == []
    (line,) = first
    assert "run with --fsep-set gemm=loop, and this one has --fsep-set gemm=torch" in line


def test_sizes_that_a_back_end_cannot_multiply_are_refused_on_every_rank(
    ranks: RankPools, text_data: str
) -> None:
    odd = command(text_data, 1, " --fsep-set gemm=torch --moe-ffn-hidden-size 34")
    for result in ranks(2).run_raw(train, odd):
        assert isinstance(result, Raised)
        assert "--fsep-set gemm=torch: sizes of experts must be multiples of 4" in result.traceback
        assert "34 is not; give --fsep-set gemm=loop" in result.traceback
