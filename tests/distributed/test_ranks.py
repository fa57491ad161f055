"""A rank pool leaves no process running, however stubborn its ranks' children are."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_laer.cpu.ranks import RankPool, RankPools
from tests.distributed.conftest import Trainings
from tests.parity.row import FSEP
from tests.parity.rows import DIST_OPT, FSDP
from tests.processes import finished, outlive

# A rank that starts a child of its own, and a process that ends while its pool is open.
USER = """
import os, signal
from tests.distributed.test_ranks import start_stubborn_child
from megatron_laer.cpu.ranks import RankPool

if __name__ == "__main__":
    pool = RankPool(1)
    print(*pool.run(start_stubborn_child)[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def stay_for_ever() -> None:
    """Ignore every request to end, and survive the parent process."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    while True:
        time.sleep(1.0)


def start_stubborn_child() -> tuple[int, int]:
    """Start a child as Megatron's checkpoint writer does; return both process ids."""
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=stay_for_ever)
    child.start()
    assert child.pid is not None
    return os.getpid(), child.pid


def test_what_ranks_started_ends_with_the_pool_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Every session of tests closes its pools; here the process of one is killed."""
    script = tmp_path / "user.py"
    script.write_text(USER)
    # The pipe is read to its end, so a process that inherited it would be waited for.
    result = finished(script)
    assert result.returncode == -signal.SIGKILL, result.stderr
    pids = [int(word) for word in result.stdout.split()]
    assert len(pids) == 2
    assert outlive(pids) == []


def raise_on_one_rank() -> None:
    assert os.environ["RANK"] == "0", "rank 1 is ill"
    time.sleep(3600)


def test_a_rank_that_fails_is_heard_and_the_others_show_where_they_hang() -> None:
    from megatron_laer.cpu.ranks import RankError

    with RankPool(2) as pool:
        pool.patience_s = 2.0
        pool.run(os.getpid)
        pids = [process.pid for process in pool._processes]
        with pytest.raises(RankError) as error:
            pool.run(raise_on_one_rank)
        reason, stacks = str(error.value).split("--- rank 0")
        assert reason.startswith("rank 1:") and "rank 1 is ill" in reason
        assert "results of ranks [1], no other;" in reason
        assert "in raise_on_one_rank" in stacks.split("--- rank 1")[0]
        assert outlive(pids) == []


def test_no_more_ranks_are_kept_than_said() -> None:
    with RankPools(2) as pools:
        one = pools(1)
        (before,) = one.run(os.getpid)
        assert pools(1) is one and pools(1).run(os.getpid) == [before]
        two = pools(2)
        assert not one.running and len(set(two.run(os.getpid))) == 2
        # A holder of a stopped pool gets it restarted; the other pool stops when it is next in the
        # way.
        (after,) = one.run(os.getpid)
        assert after != before and two.running
        assert pools(1).running and not two.running
    assert not one.running


def tensors() -> object:
    """Return more tensors than a pipe could carry as open files, whose number is limited."""
    import torch

    return [torch.full((2,), float(number)) for number in range(2000)]


def test_results_hold_no_files_open(ranks: RankPools) -> None:
    import torch

    pool = ranks(2)
    pool.run(os.getpid)
    before = len(os.listdir("/proc/self/fd"))
    found = pool.run(tensors)[1]
    assert torch.equal(found[1999], torch.full((2,), 1999.0))
    assert len(os.listdir("/proc/self/fd")) == before


def open_after_training(flags: list[str]) -> tuple[int, int]:
    from megatron_laer.cpu.training import train

    train(flags)
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "mode",
    [DIST_OPT, DIST_OPT + FSEP, f" --bf16{FSDP}optim_grads_params --expert-parallel-mode fsep"],
    ids=["stock", "fsep", "megatron-fsdp"],
)
def test_a_run_leaves_no_process_group_in_its_rank(trained: Trainings, mode: str) -> None:
    # Files that the first run opens for good, such as the dataset, are not opened again.
    runs = [trained.each(mode, by=open_after_training, steps=1) for _ in range(3)]
    for (threads, files), (threads_after, files_after) in zip(runs[1], runs[2], strict=True):
        assert threads_after <= threads
        assert files_after <= files + 1


def groups_of_meshes(_model: object) -> list[tuple[object, ...]]:
    """Return each mesh of a DTensor by its ranks, with the names of its groups."""
    from torch.distributed.tensor import DTensor

    meshes = [found.device_mesh for found in gc.get_objects() if isinstance(found, DTensor)]
    return list({(tuple(of.mesh.flatten().tolist()), *of._dim_group_names) for of in meshes})


def test_a_run_has_no_meshes_of_an_earlier_one_with_other_groups(trained: Trainings) -> None:
    flags = f" --bf16{FSDP}optim_grads_params"
    trained(f"{flags} --context-parallel-size 2", steps=1, global_batch=2)
    for record in trained.each(flags, groups_of_meshes, steps=1):
        (found,) = record.probes
        assert len({ranks for ranks, *_ in found}) == len(found) > 0, found
