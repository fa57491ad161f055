"""Checkpoints of models whose dense layers Megatron-FSDP shards, in its own format."""

from __future__ import annotations

from pathlib import Path

from megatron_laer.cpu.training import initial_weights
from megatron_laer.runtime.planning.planner_checkpoint import FOLDER
from megatron_laer.session import current_coordinator
from tests.checkpoints import assert_equal, iteration_folder
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.row import HOMES
from tests.parity.rows import FSDP
from tests.probes import running

FSEP = " --expert-parallel-mode fsep --fsep-late-plan wait" + HOMES
# Megatron saves this format from models in 16 bits alone.
SHARDED = f" --bf16 --override-opt_param-scheduler{FSDP}"


def resumed_planner(_model: object) -> int | None:
    """Return the version of the layouts that the planner went on from."""
    coordinator = current_coordinator()
    resumption = None if coordinator is None else coordinator.layouts.resumption
    return None if resumption is None or resumption.state is None else resumption.state.version


def test_stock_and_fsep_go_on_from_each_others_shards(trained: Trainings, tmp_path: Path) -> None:
    flags = SHARDED + "optim_grads" + FSEP
    whole = trained(flags, steps=4, global_batch=4)
    saves = f"{flags} --save {tmp_path} --save-interval 2"
    first = trained(saves, steps=2, global_batch=4)
    assert first.losses == whole.losses[:2]
    assert [path.name for path in (iteration_folder(tmp_path, 2) / FOLDER).iterdir()]

    loads = f" --load {tmp_path}"
    resumed = trained(flags + loads, resumed_planner, steps=4, global_batch=4)
    assert resumed.losses == whole.losses[2:] and None not in resumed.probes
    assert_equal(resumed.weights, whole.weights)
    sharded = SHARDED + "optim_grads_params" + loads
    stock = trained(sharded, resumed_planner, steps=4, global_batch=4)
    assert stock.probes == [None, None]
    for mine, theirs in zip(stock.losses, whole.losses[2:], strict=True):
        assert abs(mine - theirs) < 1e-3
    for extra, size in ((sharded, 2), (SHARDED + "optim" + FSEP + loads, 4)):
        read = trained(extra, by=initial_weights, size=size, steps=4, global_batch=2 * size)
        assert_equal(read, first.weights)


def test_a_rerun_has_the_same_bits(trained: Trainings) -> None:
    """Gathers ahead, reduces and exchanges of replicas run at once, in one order."""
    flags = f"{SHARDED}optim_grads_params --overlap-grad-reduce --overlap-param-gather{FSEP}"
    flags += " --micro-batch-size 1"
    first, again = (trained(flags, replicas, global_batch=4) for _ in range(2))
    assert max(first.probes) > 0, "no replica was made, so nothing is shown"
    assert identical(again, first)


def replicas(_model: object) -> int:
    return running().streams.weights.num_bytes
