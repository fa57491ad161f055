"""Checkpoints hold stock's names and shapes, and the state that a resumed planner needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import Raised, RankPools
from megatron_laer.cpu.training import train
from megatron_laer.runtime.planning import planner_checkpoint
from megatron_laer.runtime.planning.planner_checkpoint import FOLDER
from megatron_laer.session import current_coordinator
from tests.checkpoints import (
    assert_equal,
    iteration_folder,
    saved_iteration,
    saved_tensors,
)
from tests.distributed.conftest import Trainings
from tests.distributed.test_home_order import homes
from tests.messages import messages
from tests.parity.row import HOMES as AT_HOME
from tests.parity.rows import HYBRID_MTP as HYBRID
from tests.parity.rows import PIPELINE
from tests.probes import layouts_in_force

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner static"
HOMES = " --expert-parallel-mode fsep --fsep-planner random --fsep-sharding experts"
MOVED = HOMES + "{homes}"  # to other ranks at each stop
WEIGHTS_ONLY = " --no-load-optim --no-load-rng --finetune"
TORCH_DIST = " --ckpt-format torch_dist"


@dataclass(frozen=True)
class Stop:
    ranks: int
    expert_parallel: int
    mode: str = ""


@dataclass(frozen=True)
class Journey:
    name: str
    flags: str
    stops: tuple[Stop, ...]
    without: str = ""


STOCK_TO_STOCK = (
    Stop(2, 2),
    Stop(4, 4, FSEP),
    Stop(2, 2, FSEP + " --fsep-capacity 7"),
    Stop(4, 2, FSEP),
    Stop(4, 4),
)
AT_HOME_AND_BACK = (Stop(2, 2), Stop(4, 2, HOMES), Stop(2, 2))
DISTRIBUTED = " --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
# Without the persistent worker, Megatron saves in the foreground.
ASYNC = " --async-save --use-persistent-ckpt-worker --async-strategy mcore"
OFFLOADED = " --bf16 --optimizer-cpu-offload --use-precision-aware-optimizer"
UNEVEN = " --ffn-hidden-size 10 --hidden-size 54 --num-attention-heads 3"
VIRTUAL = PIPELINE + " --num-layers-per-virtual-pipeline-stage 1"
# Megatron pads the vocabulary to a multiple of 128 per tensor rank.
TENSOR = " --tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 64"
JOURNEYS = (
    Journey(
        "plain optimizer, uneven rows of both matrices and biases",
        UNEVEN,
        STOCK_TO_STOCK,
        without="--swiglu --disable-bias-linear",
    ),
    Journey(
        "distributed optimizer, bf16, async, fully parallel",
        DISTRIBUTED + " --bf16 --ckpt-fully-parallel-load",
        # Each rank that saves asynchronously starts a worker, which takes seconds.
        (
            Stop(2, 2, ASYNC),
            Stop(4, 4, FSEP),
            Stop(2, 2, FSEP + " --fsep-capacity 7" + ASYNC),
            Stop(4, 2, FSEP),
        ),
    ),
    Journey(
        "pipeline and tensor parallel",
        DISTRIBUTED,
        (
            Stop(2, 2),
            Stop(4, 4, FSEP + TENSOR),
            Stop(4, 2, FSEP + PIPELINE),
            Stop(4, 2, TENSOR),
        ),
    ),
    Journey("Muon, distributed optimizer, bf16", " --optimizer dist_muon --bf16", AT_HOME_AND_BACK),
    Journey(
        "homes by a permutation",
        DISTRIBUTED,
        (Stop(2, 2, MOVED), Stop(4, 4), Stop(4, 4, MOVED), Stop(4, 4, MOVED), Stop(2, 2, FSEP)),
    ),
    # The parts of these meet other settings in those above.
    Journey("offloaded", DISTRIBUTED + OFFLOADED, (Stop(2, 2), Stop(4, 4, FSEP), Stop(4, 4))),
    Journey(
        "virtual pipeline, dense first layer, latent and shared experts",
        DISTRIBUTED + " --num-layers 4 --moe-layer-freq ([0]*1+[1]*3)"
        " --moe-latent-size 24 --moe-shared-expert-intermediate-size 32",
        (
            Stop(4, 2, FSEP + VIRTUAL),
            Stop(4, 4, FSEP),
            Stop(4, 2, FSEP + PIPELINE),
            Stop(4, 2, FSEP + VIRTUAL),
            Stop(2, 2),
        ),
    ),
    Journey(
        "hybrid, multi-token prediction",
        DISTRIBUTED + HYBRID,
        (Stop(2, 2), Stop(4, 2, FSEP + PIPELINE), Stop(2, 2)),
    ),
    Journey("linear bias with gates", "", STOCK_TO_STOCK, without="--disable-bias-linear"),
)


RELEASES, DAILY, NIGHTLY = 2, 5, pytest.mark.nightly


def marks_of(place: int) -> list[pytest.MarkDecorator]:
    """Return the marks of a journey: the first run with every release, the last at night."""
    if place >= DAILY:
        return [NIGHTLY]
    return [pytest.mark.releases] if place < RELEASES else []


@pytest.mark.parametrize(
    "journey",
    [
        pytest.param(journey, id=journey.name, marks=marks_of(place))
        for place, journey in enumerate(JOURNEYS)
    ],
)
def test_weights_and_optimizer_state_survive_every_change_of_parallelism(
    trained: Trainings, tmp_path: Path, journey: Journey
) -> None:
    folders = []
    for number, stop in enumerate(journey.stops):
        source, target = tmp_path / str(number - 1), tmp_path / str(number)
        # The first run trains; the others have no step left, and save the loaded state.
        mode = stop.mode.format(homes=homes(tmp_path, number, stop.ranks))
        flags = journey.flags + TORCH_DIST + mode + f" --save {target} --save-interval 1000"
        flags += " --save-interval 2" if number == 0 else f" --load {source}"
        model = {"expert_parallel": stop.expert_parallel, "without": journey.without}
        trained(flags, size=stop.ranks, steps=2, **model)
        assert saved_iteration(target) == 2
        folders.append(iteration_folder(target, 2))

    first, *others = map(saved_tensors, folders)
    parts = [(key.partition("optimizer.state.")[2], tensor) for key, tensor in first.items()]
    moment = "momentum_buffer" if "muon" in journey.flags else "exp_avg"
    assert {"exp_avg", "exp_avg_sq", moment} <= {key.split(".")[0] for key, _ in parts}
    moments = {
        key.split(".linear_fc1.")[1]: tensor.any()
        for key, tensor in parts
        if key.startswith(f"{moment}.decoder.layers.") and ".experts.linear_fc1" in key
    }
    has_biases = "--disable-bias-linear" in journey.without
    assert moments == {"weight": True} | ({"bias": True} if has_biases else {})
    for other in others:
        assert_equal(other, first)


STATIC = " --expert-parallel-mode fsep --fsep-planner static --fsep-sharding experts"
HERE, THERE = STATIC + "{0}", STATIC + "{1}"  # two permutations
# By writer: readers of its buffers, and parts of their refusals.
READERS: dict[str, dict[str, str | None]] = {
    # Without replicas, experts at home have stock's memory layout.
    "": {FSEP: "load with --no-load-optim", STATIC: None},
    FSEP: {"": ".fsep-2", STATIC: "another --fsep-sharding than experts", FSEP: None},
    HERE: {
        THERE: "or other --fsep-homes",
        STATIC: "or other --fsep-homes",
        "": ".fsep-homes-",
    },
}


@pytest.mark.parametrize("writer", READERS, ids=["stock", "rows", "homes by a permutation"])
def test_optimizer_buffers_are_read_by_their_own_kind_of_run_alone(
    trained: Trainings, tmp_path: Path, writer: str
) -> None:
    # Megatron's default form of the distributed optimizer's state, dp_reshardable.
    default = TORCH_DIST + " --use-distributed-optimizer --override-opt_param-scheduler"
    moved = [homes(tmp_path, seed) for seed in (8, 9)]
    saves = f"{writer}{default} --save {tmp_path} --save-interval 2".format(*moved)
    whole = trained(saves, steps=4)
    for reader, said in READERS[writer].items():
        reads = f"{reader}{default} --load {tmp_path} --ckpt-step 2".format(*moved)
        for result in trained.ends(reads, steps=4):
            if said is None:
                assert result.losses == whole.losses[2:]
            else:
                assert isinstance(result, Raised) and said in result.message
                # Stock's error is as it was.
                assert (result.type_name == "RefusedError") == bool(reader)
                assert ("KeyError" in result.traceback) != bool(reader)
        assert said is None or len(trained(reads + WEIGHTS_ONLY, steps=2).losses) == 2


def settings_of(folder: Path) -> dict[str, object]:
    from megatron.core.dist_checkpointing import load_common_state_dict

    args = load_common_state_dict(str(folder))["args"]
    return {name: getattr(args, f"fsep_{name}") for name in IN_FORCE}


IN_FORCE = {
    "sharding": "rows",
    "capacity": 3,
    "restore_algorithm": "flat",
    "token_exchange": "rank",
    "gemm": "loop",
    "node_size": 2,
}


def test_a_checkpoint_has_the_settings_in_force_and_auto_takes_its_sharding(
    trained: Trainings, ranks: RankPools, tmp_path: Path
) -> None:
    """In `dp_reshardable` no other sharding could read the optimizer's state."""
    first, again = tmp_path / "first", tmp_path / "again"
    auto = " --expert-parallel-mode fsep --fsep-token-exchange auto --use-distributed-optimizer"
    auto += TORCH_DIST + " --save-interval"
    trained(f"{auto} 1 --fsep-planner laer --save {first}", experts=4, steps=1)
    # Anew, this planner would have experts at home. It has no step before it saves.
    trained(f"{auto} 2 --load {first} --save {again}", experts=4, steps=1)
    for folder in (first, again):
        assert ranks(2).run(settings_of, iteration_folder(folder, 1)) == [IN_FORCE] * 2


def uploads(flags: list[str]) -> int:
    """Train; return how often the torch back end uploaded the ends of groups."""
    from megatron_laer.layer.experts.gemm import torch as grouped

    grouped._ends.cache_clear()
    train(flags)
    return grouped._ends.cache_info().misses


def test_a_run_goes_on_with_another_back_end(trained: Trainings, tmp_path: Path) -> None:
    run, fsep = partial(trained.each, by=uploads, experts=4), FSEP + TORCH_DIST
    assert run(f"{fsep} --save {tmp_path} --save-interval 1", steps=1) == [0, 0]
    # The schedule of learning rates follows the number of steps, which differs between the runs.
    go_on = f"{fsep} --load {tmp_path} --override-opt_param-scheduler"
    assert all(run(go_on + " --fsep-set gemm=torch", steps=2))


PLANNED = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-late-plan wait"


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            PLANNED + DISTRIBUTED + " --fsep-planner laer --fsep-plan-mode forecast"
            " --fsep-set plan_lag=2",
            marks=pytest.mark.releases,
            id="two plans on their way",
        ),
        pytest.param(
            PLANNED + AT_HOME + "{homes} --use-distributed-optimizer", id="homes by a permutation"
        ),
        pytest.param(
            PLANNED + PIPELINE + AT_HOME + " --fsep-restore step",
            marks=NIGHTLY,
            id="experts at home in two stages, step restore",
        ),
        pytest.param(
            FSEP + " --use-distributed-optimizer" + OFFLOADED,
            marks=NIGHTLY,
            id="no planner, offloaded",
        ),
    ],
)
def test_a_resumed_run_of_two_groups_is_bitwise_the_uninterrupted_one(
    trained: Trainings, tmp_path: Path, flags: str
) -> None:
    extra = flags.format(homes=homes(tmp_path, 1, experts=6)) + TORCH_DIST
    options: dict[str, Any] = {"size": 4, "experts": 6, "steps": 7}
    saves, loads = f"--save {tmp_path} --save-interval 4", f"--load {tmp_path} --ckpt-step 4"
    whole, rest = (
        trained.each(f"{extra} {more}", layouts_in_force, **options) for more in (saves, loads)
    )
    for found, expected in zip(rest, whole, strict=True):
        assert found.probes == expected.probes[4:]
        assert found.losses == expected.losses[4:]
        assert found.grad_norms == expected.grad_norms[4:]
    assert_equal(rest[0].weights, whole[0].weights)

    versions = [version for version, _ in whole[0].probes]
    lag = 2 if "plan_lag=2" in extra else 1
    planned = list(range(1, 7 - lag + 1)) if PLANNED in extra else [0] * (7 - lag)
    assert versions == [0] * lag + planned
    groups = len(list((iteration_folder(tmp_path, 4) / FOLDER).glob("*")))
    assert groups == (2 if PLANNED in extra else 0)


def order_of_files(flags: list[str], tracker: str) -> list[bool]:
    """Return, for each planner state written here, whether its checkpoint counted at that time."""
    counted = []
    save = planner_checkpoint.save_state

    def observed(*args: Any) -> None:
        save(*args)
        if current_coordinator().groups.rank == 0:
            assert Path(planner_checkpoint.state_path(args[0], 0)).exists()
            counted.append(Path(tracker).exists())

    with mock.patch.object(planner_checkpoint, "save_state", observed):
        train(flags)
    assert Path(tracker).exists()
    return counted


@pytest.mark.parametrize("how", ["", ASYNC], ids=["sync", "async"])
def test_a_checkpoint_counts_only_after_its_planner_state_is_there(
    trained: Trainings, tmp_path: Path, how: str
) -> None:
    extra = PLANNED + TORCH_DIST + how + f" --save {tmp_path} --save-interval 1000"
    tracker = str(tmp_path / "latest_checkpointed_iteration.txt")
    counted = trained.each(extra, tracker, by=order_of_files, experts=4, steps=2)
    assert counted == [[False], []]


def train_and_listen(flags: list[str]) -> tuple[list[str], Any]:
    """Train; return FSEP's log about resuming on this rank, and the layouts after each step."""
    with messages() as lines:
        record = train(flags, layouts_in_force)
    return [line for line in lines if "anew" in line or "restored" in line], record.probes


def state_of(folder: Path, step: int) -> Path:
    return Path(planner_checkpoint.state_path(str(iteration_folder(folder, step)), 0))


def test_a_state_that_is_missing_damaged_or_of_another_run_costs_a_line(
    trained: Trainings, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"experts": 4, "steps": 4, "global_batch": 4}
    saves = f"{PLANNED}{TORCH_DIST} --save {tmp_path} --save-interval 1"
    told, whole = trained(saves, by=train_and_listen, **options)
    assert told == [], "a run from the start resumes nothing"
    other = tmp_path / "other"
    trained(f"{PLANNED}{TORCH_DIST} --save {other} --save-interval 3", **options)
    load = f"{TORCH_DIST} --load {tmp_path} --ckpt-step 3"
    earlier, file = (state_of(tmp_path, step) for step in (2, 3))

    def resumed(extra: str, expected: str) -> Any:
        found = trained.each(load + extra, by=train_and_listen, **options)
        (line,) = [line for lines, _ in found for line in lines]
        assert expected in line
        assert found[0][1] == found[1][1]
        return found[0][1][0]

    restored = "the planner's state is restored: training goes on with step 3, layout version 2"
    assert resumed(PLANNED, restored) == whole[3]
    more_slots = resumed(PLANNED + " --fsep-capacity 4", "this one has N = 2 ranks, C = 4 slots")
    assert more_slots[0] == 0
    again = resumed(PLANNED + WEIGHTS_ONLY, "before step 3 and training begins at step 0")
    assert again == whole[0]
    state = file.read_bytes()
    of_earlier = earlier.read_bytes(), "before step 2 and training begins at step 3"
    of_other = state_of(other, 3).read_bytes(), "the state is of run "
    for wrong, said in ((state[:-5], "cut off"), of_earlier, of_other):
        file.write_bytes(wrong)
        assert resumed(PLANNED, said) == whole[0]
    file.unlink()
    assert resumed(PLANNED, "there is no planner's state") == whole[0]
    file.write_bytes(state)
    assert len(trained(load, **options).losses) == 1
