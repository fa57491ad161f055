"""Faults of long runs end as under stock Megatron, and no rank hangs.

Killed and stopped jobs are in `test_chaos.py`.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.cpu.ranks import Raised, RankPool, RankPools
from megatron_laer.cpu.training import train
from megatron_laer.planner.layout import ExpertLayout
from tests.faults.injected import (
    ROUTINGS,
    train_with_bad_loss,
    train_with_bursts,
    train_with_full_disk,
    train_with_other_layout,
    train_with_rerun,
    train_with_routing,
    train_with_signal,
)
from tests.parity.compare import Distance, distance, identical
from tests.parity.flags import command_line
from tests.parity.row import AT_HOME, FSEP, HOMES

STATIC = FSEP + " --fsep-planner static"
EXACT = FSEP + " --fsep-plan-mode exact"
WAIT = FSEP + " --fsep-planner greedy --fsep-late-plan wait"
# Fragmentation and the interpreter over 400 steps: a sixth of one restored matrix each.
ALLOCATOR_SLACK_BYTES = 8 * 2**20
VERSIONS = (
    "layer 1: rank 2 (place 2 in the group) holds version 1",
    "the others hold version 0",
)
FP32_BOUND = Distance(grads=1e-6, losses=1e-5, norms=1e-4, weights=1e-4)


def two_ranks(data: str) -> Callable[..., list[str]]:
    return partial(command_line, data, global_batch=8, steps=8)


@pytest.fixture
def command(text_data: str) -> Callable[..., list[str]]:
    return two_ranks(text_data)


def test_a_signal_in_a_step_saves_and_exits_as_stock_does(
    ranks: RankPools, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    pool = ranks(2)
    for name, mode in (("stock", ""), ("planned", WAIT)):
        folder = tmp_path / name
        whole = pool.run(train, command(extra=mode))[0]
        save = f"{mode} --save {folder} --save-interval 100 --exit-signal-handler"
        stopped = pool.run_raw(train_with_signal, command(extra=save), 4, 1, signal.SIGTERM)
        assert [(result.type_name, result.message) for result in stopped] == [
            ("SystemExit", "0")
        ] * 2
        assert saved_steps(folder) == 5, name
        rest = pool.run(train, command(extra=f"{mode} --load {folder}"))[0]
        assert rest.losses == whole.losses[5:], name
        rest.losses, rest.grad_norms = whole.losses, whole.grad_norms
        assert identical(rest, whole), name


def saved_steps(folder: Path) -> int | None:
    path = folder / "latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(
    ("size", "rank", "extra", "ahead", "parts"),
    [
        # Of two ranks, which one is right is unknown.
        (2, 0, "", False, ("layer 2: rank 0", "rank 1", "the right one is unknown")),
        (4, 2, AT_HOME, False, ("rank 2 (place 2 in the group)",)),
        (4, 2, " --fsep-restore step", True, VERSIONS),
    ],
    ids=["two ranks", "layout, at home", "version, step"],
)
def test_a_rank_with_another_layout_or_version_stops_every_rank(
    ranks: RankPools,
    command: Callable[..., list[str]],
    size: int,
    rank: int,
    extra: str,
    ahead: bool,
    parts: tuple[str, ...],
) -> None:
    flags = command(extra=STATIC + extra, expert_parallel=size)
    raised = ranks(size).run_raw(train_with_other_layout, flags, rank, 3, ahead)
    assert [result.type_name for result in raised] == ["LayoutMismatchError"] * size
    for result in raised:
        assert [part for part in parts if part not in result.message] == []


def damage(folder: Path, how: str) -> None:
    tracker = folder / "latest_checkpointed_iteration.txt"
    newest = folder / f"iter_{saved_steps(folder):07d}"
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    match how:
        case "truncated data":
            os.truncate(largest, largest.stat().st_size // 2)
        case "missing metadata":
            (newest / ".metadata").unlink()
        case "missing tracker":
            tracker.unlink()


# One of each of Megatron's files. FSEP's own are damaged in test_checkpoints.py.
DAMAGES = ["truncated data", "missing metadata", "missing tracker"]


@pytest.fixture(scope="module")
def sound_checkpoints(
    ranks: RankPools, text_data: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make a folder with checkpoints of `stock` and `fsep` after two steps, to be copied."""
    folder = tmp_path_factory.mktemp("sound")
    for name, mode in (("stock", ""), ("fsep", STATIC)):
        save = f"{mode} --save {folder / name} --save-interval 2"
        ranks(2).run(train, two_ranks(text_data)(extra=save, steps=2))
    return folder


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_met_as_stock_meets_it(
    ranks: RankPools,
    command: Callable[..., list[str]],
    sound_checkpoints: Path,
    tmp_path: Path,
    how: str,
) -> None:
    shutil.copytree(sound_checkpoints, tmp_path, dirs_exist_ok=True)
    ends = []
    for name, mode in (("stock", ""), ("fsep", STATIC)):
        damage(tmp_path / name, how)
        load = f"{mode} --load {tmp_path / name}"
        results = ranks(2).run_raw(train, command(extra=load, steps=3))
        ends.append([how_it_ended(result, tmp_path / name) for result in results])
    print(f"\n{how}: {ends[1]}")
    assert ends[0] == ends[1]
    assert (ends[1][0] == "3 steps") == (how == "missing tracker")


def how_it_ended(result: Any, folder: Path) -> str:
    if isinstance(result, Raised):
        first_line = result.message.replace(str(folder), "FOLDER").split("\n")[0]
        return f"{result.type_name}: {first_line}"
    return f"{len(result.losses)} steps"


def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    ends = []
    for name, mode in (("stock", ""), ("fsep", WAIT)):
        folder = tmp_path / name
        with RankPool(2) as pool:  # of its own, since it limits its processes
            save = f"{mode} --save {folder} --save-interval 2"
            whole = pool.run(train, command(extra=mode, steps=6))[0]
            failed = pool.run_raw(train_with_full_disk, command(extra=save, steps=6), 3, 200_000)
            ends.append([how_it_ended(result, folder) for result in failed])
            assert saved_steps(folder) == 2, name
            rest = pool.run(train, command(extra=save + f" --load {folder}", steps=6))[0]
            assert rest.losses == whole.losses[2:], name
    print(f"\nfull disk: {ends[1]}")
    assert ends[0] == ends[1]
    assert "6 steps" not in ends[1]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("value", "passing"), [(NAN, False), (INF, True)])
def test_a_bad_loss_ends_the_run_as_stock_does(
    ranks: RankPools, command: Callable[..., list[str]], tmp_path: Path, value: float, passing: bool
) -> None:
    ends = {}
    modes = {"stock": "", "fsep": WAIT + " --fsep-restore step", "homes": WAIT + HOMES}
    for name, mode in modes.items():
        save = f"{mode} --save {tmp_path / name} --save-interval 100"
        results = ranks(2).run_raw(train_with_bad_loss, command(extra=save), 3, value, passing)
        folder = tmp_path / name
        ends[name] = [how_it_ended(result, folder) for result in results], saved_steps(folder)
    print(f"\n{value}, passing {passing}: {ends['fsep']}")
    assert all(end == ends["stock"] for end in ends.values())


@pytest.mark.parametrize("extra", [" --fsep-restore step", HOMES], ids=["step", "experts at home"])
def test_a_step_that_megatron_repeats_changes_no_bit(
    ranks: RankPools, command: Callable[..., list[str]], extra: str
) -> None:
    flags = command(extra=WAIT + extra)
    plain = ranks(2).run(train_with_rerun, flags, -1)
    again = ranks(2).run(train_with_rerun, flags, 3)
    assert [digests for _, digests in again] == [digests for _, digests in plain]
    assert again[0][0].losses == plain[0][0].losses


@pytest.mark.parametrize("routing", ROUTINGS)
def test_extreme_routing_trains_as_stock_does(
    ranks: RankPools, command: Callable[..., list[str]], routing: str
) -> None:
    stock = ranks(2).run(train_with_routing, command(steps=3), routing)[0]
    random = FSEP + " --fsep-planner random"
    for mode in (random, EXACT + HOMES):
        fsep = ranks(2).run(train_with_routing, command(steps=3, extra=mode), routing)[0]
        print(f"\n{routing}: {distance(fsep, stock)}")
        assert distance(fsep, stock).within(FP32_BOUND), mode


@pytest.mark.parametrize(
    ("mode", "is_even"),
    [
        (EXACT + HOMES, True),
        (FSEP + " --fsep-planner greedy --fsep-set imbalance_tolerance=0", True),
        (STATIC, False),
    ],
    ids=["exact, experts at home", "adaptive", "static"],
)
def test_a_burst_to_one_expert_gives_no_rank_more_than_its_share(
    ranks: RankPools, command: Callable[..., list[str]], mode: str, is_even: bool
) -> None:
    flags = command(extra=mode, expert_parallel=4, steps=3)
    received = ranks(4).run(train_with_bursts, flags, 1, 1)
    shares = []
    for per_rank in zip(*(rank.tokens for rank in received), strict=True):
        (total,) = {routed for _, routed in per_rank}
        assert total == 4 * 2 * 48, "each token has one expert here"
        shares.append(max(mine for mine, _ in per_rank) / -(-total // 4))
    # As the README says: its even share, or the limit of the layout's replicas.
    replicas = int(ExpertLayout.static(4, 3, 8).replicas_E[3])
    assert set(shares) == ({1.0} if is_even else {4 / replicas}), shares


@pytest.mark.nightly  # test_memory.py holds each day that buffers do not grow
@pytest.mark.parametrize("sharding", ["", HOMES], ids=["rows", "experts at home"])
def test_bursts_leave_no_memory_behind_in_500_steps(
    ranks: RankPools, command: Callable[..., list[str]], sharding: str
) -> None:
    flags = command(extra=f"{WAIT}{sharding} --lr 1e-4 --min-lr 1e-4", global_batch=4, steps=500)
    for rank, held in enumerate(ranks(2).run(train_with_bursts, flags, 10, 100, timeout_s=7200.0)):
        grown = held.rss_bytes[-1] - held.rss_bytes[0]
        print(
            f"\nrank {rank}: live tensors of {held.tensor_bytes} bytes; "
            f"resident from step 100 to 500: {grown / 2**20:+.1f} MiB"
        )
        # By step 200 the caches of index tensors hold all layouts of the run.
        assert held.tensor_bytes[-1] < 1.01 * held.tensor_bytes[1]
        assert grown < ALLOCATOR_SLACK_BYTES
