"""Faults of long runs end as under stock Megatron, and no rank hangs.

Killed and stopped jobs are in `test_chaos.py`.
"""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.cpu.ranks import Raised, RankPool
from megatron_laer.cpu.training import train
from megatron_laer.planner.layout import ExpertLayout
from tests.checkpoints import assert_equal, iteration_folder, saved_iteration
from tests.distributed.conftest import Trainings
from tests.faults.injected import (
    ROUTINGS,
    train_with_bad_loss,
    train_with_burst,
    train_with_full_disk,
    train_with_other_counts,
    train_with_other_layout,
    train_with_rerun,
    train_with_routing,
    train_with_signal,
    train_with_skipped_step,
)
from tests.parity.compare import distance
from tests.parity.row import FP32_BOUND, FSEP, HOMES

STATIC = FSEP + " --fsep-planner static"
EXACT = FSEP + " --fsep-plan-mode exact"
WAIT = FSEP + " --fsep-planner greedy --fsep-late-plan wait"
RARE_ROUTINGS = ("a rank sends none", "one token in all")
VERSIONS = ("rank 2 (place 2 in the group) holds version 1", "the others hold version 0")
STEPS = 8


@pytest.mark.parametrize(
    ("size", "rank", "extra", "ahead", "parts"),
    [
        # Of two ranks, which one is right is unknown.
        (2, 0, "", False, ("layer 2: rank 0", "rank 1", "the right one is unknown")),
        (4, 2, " --fsep-restore step", True, VERSIONS),
    ],
    ids=["two ranks", "version, step"],
)
def test_a_rank_with_another_layout_or_version_stops_every_rank(
    trained: Trainings, size: int, rank: int, extra: str, ahead: bool, parts: tuple[str, ...]
) -> None:
    options: dict[str, Any] = {"size": size, "expert_parallel": size, "steps": STEPS}
    given = STATIC + extra, rank, 3, ahead
    message = trained.refused(
        *given, by=train_with_other_layout, kind="LayoutMismatchError", **options
    )
    assert [part for part in parts if part not in message] == []


def test_a_rank_that_counts_otherwise_than_its_router_stops_every_rank(trained: Trainings) -> None:
    message = trained.refused(
        FSEP, 1, 1, by=train_with_other_counts, kind="CountsMismatchError", size=2, steps=STEPS
    )
    parts = ("layer 1: rank 1 (place 1 in the group) counted [", "but its router's map has others")
    assert [part for part in parts if part not in message] == []


def damage(folder: Path, how: str) -> None:
    tracker = folder / "latest_checkpointed_iteration.txt"
    newest = iteration_folder(folder, saved_iteration(folder))
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


def test_a_damaged_checkpoint_is_met_as_stock_meets_it(trained: Trainings, tmp_path: Path) -> None:
    ends: dict[str, list[list[str]]] = {how: [] for how in DAMAGES}
    for name, mode in (("stock", ""), ("fsep", STATIC)):
        sound = tmp_path / name
        trained(f"{mode} --save {sound} --save-interval 2", steps=2)
        for how in DAMAGES:
            damaged = tmp_path / f"{name}, {how}".replace(" ", "-")
            shutil.copytree(sound, damaged)
            damage(damaged, how)
            results = trained.ends(f"{mode} --load {damaged}")
            ends[how].append([how_it_ended(result, damaged) for result in results])
    for how, (stocks, fseps) in ends.items():
        assert fseps == stocks
        assert (fseps[0] == "3 steps") == (how == "missing tracker"), fseps


def how_it_ended(result: Any, folder: Path) -> str:
    if isinstance(result, Raised):
        first_line = result.message.replace(str(folder), "FOLDER").split("\n")[0]
        return f"{result.type_name}: {first_line}"
    return f"{len(result.losses)} steps"


def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(
    trained: Trainings, tmp_path: Path
) -> None:
    ends = []
    for name, mode in (("stock", ""), ("fsep", WAIT)):
        folder = tmp_path / name
        save = f"{mode} --save {folder} --save-interval 2"
        plain, saving, going_on = (
            trained.flags(extra, steps=6) for extra in (mode, save, f"{save} --load {folder}")
        )
        with RankPool(2) as pool:  # of its own, since it limits its processes
            whole = pool.run(train, plain)[0]
            failed = pool.run_raw(train_with_full_disk, saving, 3, 200_000)
            ends.append([how_it_ended(result, folder) for result in failed])
            assert saved_iteration(folder) == 2, name
            assert pool.run(train, going_on)[0].losses == whole.losses[2:], name
    assert ends[0] == ends[1]
    assert "6 steps" not in ends[1]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("value", "passing"), [(NAN, False), (INF, True)])
def test_a_bad_loss_ends_the_run_as_stock_does(
    trained: Trainings, tmp_path: Path, value: float, passing: bool
) -> None:
    ends = {}
    modes = {"stock": "", "fsep": WAIT + " --fsep-restore step", "homes": WAIT + HOMES}
    for name, mode in modes.items():
        folder = tmp_path / name
        save = f"{mode} --save {folder} --save-interval 100"
        results = trained.ends(save, 3, value, passing, by=train_with_bad_loss, steps=STEPS)
        saved = {path.name for path in folder.glob("*")}
        ends[name] = [how_it_ended(result, folder) for result in results], saved
    assert all(end == ends["stock"] for end in ends.values()), ends


@pytest.mark.parametrize("extra", [" --fsep-restore step", HOMES], ids=["step", "experts at home"])
def test_a_step_that_megatron_repeats_changes_no_bit(trained: Trainings, extra: str) -> None:
    plain, again = (
        trained.each(WAIT + extra, step, by=train_with_rerun, steps=STEPS) for step in (-1, 3)
    )
    assert [digests for _, digests in again] == [digests for _, digests in plain]
    assert again[0][0].losses == plain[0][0].losses


def test_a_skipped_step_leaves_weights_and_later_steps_as_in_stock(trained: Trainings) -> None:
    scaled = " --fp16 --no-check-for-nan-in-loss-and-grad --initial-loss-scale 1024"
    stock: list[float] = []
    for mode in ("", WAIT + " --fsep-restore step", WAIT + HOMES + " --fsep-restore step"):
        record, digests = trained(mode + scaled, 3, by=train_with_skipped_step, steps=6)
        unchanged = [after == before for before, after in pairwise(digests)]
        assert unchanged == [step == 3 for step in range(1, 6)], mode
        others = record.losses[:3] + record.losses[4:]
        stock = stock or others
        assert others == pytest.approx(stock, rel=1e-3), mode


def test_a_signal_to_one_rank_saves_and_the_resumed_run_is_the_uninterrupted_one(
    trained: Trainings, tmp_path: Path
) -> None:
    whole = trained(WAIT, steps=STEPS)
    saves = f"{WAIT} --save {tmp_path} --save-interval 100 --exit-signal-handler"
    ends = trained.ends(saves, 4, 1, by=train_with_signal, steps=STEPS)
    assert [how_it_ended(result, tmp_path) for result in ends] == ["SystemExit: 0"] * 2
    assert saved_iteration(tmp_path) == 5
    rest = trained(f"{WAIT} --load {tmp_path}", steps=STEPS)
    assert rest.losses == whole.losses[5:] and rest.grad_norms == whole.grad_norms[5:]
    assert_equal(rest.weights, whole.weights)


@pytest.mark.parametrize(
    "routing",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in RARE_ROUTINGS else [])
        for name in ROUTINGS
    ],
)
def test_extreme_routing_trains_as_stock_does(trained: Trainings, routing: str) -> None:
    stock = trained("", routing, by=train_with_routing)
    for mode in (FSEP + " --fsep-planner random", EXACT + HOMES):
        found = distance(trained(mode, routing, by=train_with_routing), stock)
        assert found.within(FP32_BOUND), (mode, found)


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
    trained: Trainings, mode: str, is_even: bool
) -> None:
    received = trained.each(mode, by=train_with_burst, size=4, expert_parallel=4)
    shares = []
    for per_rank in zip(*received, strict=True):
        (total,) = {routed for _, routed in per_rank}
        assert total == 4 * 2 * 48, "each token has one expert here"
        shares.append(max(mine for mine, _ in per_rank) / -(-total // 4))
    # As the README says: its even share, or the limit of the layout's replicas.
    replicas = int(ExpertLayout.static(4, 3, 8).replicas_E[3])
    assert set(shares) == ({1.0} if is_even else {4 / replicas}), shares
