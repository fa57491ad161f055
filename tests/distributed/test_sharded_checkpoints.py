"""Checkpoints of models whose dense layers Megatron-FSDP shards, in its own format."""

from __future__ import annotations

from pathlib import Path

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, initial_weights, train
from megatron_laer.runtime.planning.planner_checkpoint import FOLDER
from megatron_laer.session import current_coordinator
from tests.checkpoints import assert_equal, iteration_folder
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.row import HOMES
from tests.parity.rows import FSDP
from tests.probes import running

FSEP = " --expert-parallel-mode fsep --fsep-late-plan wait" + HOMES
# Megatron saves this format from models in 16 bits alone.
SHARDED = f" --bf16{FSDP}"


def command(data: str, flags: str, ranks: int, group: int, steps: int = 4) -> list[str]:
    # Each run says for how many steps the learning rate is.
    flags += " --override-opt_param-scheduler"
    return command_line(data, flags, steps=steps, expert_parallel=group, global_batch=2 * ranks)


def resumed_planner(_model: object) -> int | None:
    """Return the version of the layouts that the planner went on from."""
    coordinator = current_coordinator()
    resumption = None if coordinator is None else coordinator.layouts.resumption
    return None if resumption is None or resumption.state is None else resumption.state.version


def test_stock_and_fsep_go_on_from_each_others_shards(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    whole: Record = ranks(2).run(train, command(text_data, SHARDED + "optim_grads" + FSEP, 2, 2))[0]
    saves = f" --save {tmp_path} --save-interval 2"
    first: Record = ranks(2).run(
        train, command(text_data, SHARDED + "optim_grads" + FSEP + saves, 2, 2, steps=2)
    )[0]
    assert first.losses == whole.losses[:2]
    assert [path.name for path in (iteration_folder(tmp_path, 2) / FOLDER).iterdir()]

    loads = f" --load {tmp_path}"
    resumed: Record = ranks(2).run(
        train, command(text_data, SHARDED + "optim_grads" + FSEP + loads, 2, 2), resumed_planner
    )[0]
    assert resumed.losses == whole.losses[2:] and None not in resumed.probes
    assert_equal(resumed.weights, whole.weights)
    stock: Record = ranks(2).run(
        train, command(text_data, SHARDED + "optim_grads_params" + loads, 2, 2), resumed_planner
    )[0]
    assert stock.probes == [None, None]
    for mine, theirs in zip(stock.losses, whole.losses[2:], strict=True):
        assert abs(mine - theirs) < 1e-3
    for flags, size, group in (("optim_grads_params", 2, 2), ("optim" + FSEP, 4, 2)):
        read = ranks(size).run(
            initial_weights, command(text_data, SHARDED + flags + loads, size, group)
        )[0]
        assert_equal(read, first.weights)


def test_a_rerun_has_the_same_bits(ranks: RankPools, text_data: str) -> None:
    """Gathers ahead, reduces and exchanges of replicas run at once, in one order."""
    flags = f"{SHARDED}optim_grads_params --overlap-grad-reduce --overlap-param-gather{FSEP}"
    flags += " --micro-batch-size 1"
    given = command(text_data, flags, 2, 2, steps=3)
    first, again = (ranks(2).run(train, given, replicas)[0] for _ in range(2))
    assert max(first.probes) > 0, "no replica was made, so nothing is shown"
    assert identical(again, first)


def replicas(_model: object) -> int:
    return running().streams.weights.num_bytes
