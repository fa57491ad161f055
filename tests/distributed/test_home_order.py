"""Homes by a permutation: experts train and are saved as stock's, wherever they live.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import initial_weights
from megatron_laer.cpu.weights import Tensors
from megatron_laer.planner.homes_file import read_homes, write_homes
from megatron_laer.runtime.planning.announced_layouts import AnnouncedLayouts
from megatron_laer.runtime.planning.layout_recording import read_layouts
from tests.checkpoints import assert_equal
from tests.distributed.conftest import BIASED, Trainings, train_grouped
from tests.parity.replay import train_row
from tests.parity.row import REPLICAS_PAY
from tests.parity.rows import DIST_OPT, REPLAY

AT_HOME = " --expert-parallel-mode fsep --fsep-sharding experts"
STATIC = AT_HOME + " --fsep-planner static"
RESHARDABLE = DIST_OPT + " --dist-ckpt-optim-fully-reshardable --ckpt-format torch_dist"


def homes(folder: Path, seed: int, ranks: int = 2, experts: int = 8) -> str:
    """Write random homes of two layers, and return the flag."""
    rng, path = np.random.default_rng(seed), folder / f"homes-{ranks}-{seed}.json"
    write_homes(path, ranks, {f"layer {layer}": rng.permutation(experts) for layer in (1, 2)})
    return f" --fsep-homes {path}"


def moved_to(expert_E: list[int]) -> list[tuple[float, float]]:
    """Move homes of parameters in fp8; return each one's value, and that kept for its master."""
    import torch.distributed as dist

    from megatron_laer.layer.experts.home_moves import move_home
    from megatron_laer.planner.home_order import HomeOrder
    from megatron_laer.runtime.weights.share import Share
    from tests.doubles.fp8_experts import Recipe
    from tests.doubles.fp8_parameters import keep_in_fp8
    from tests.token_exchange import gloo_groups

    config = SimpleNamespace(fp8="e4m3", fp8_recipe="tensorwise")
    with gloo_groups(2) as groups:
        linears, num_home = [], len(expert_E) // dist.get_world_size()
        for at in range(num_home):
            linear = torch.nn.Linear(16, 16, bias=False)
            # No fp8 value times its scale: only the value that is kept aside is exact.
            torch.nn.init.constant_(linear.weight, 1.1 + dist.get_rank() * num_home + at)
            linear.weight.data[0, 0] = 1000.0
            keep_in_fp8(linear, Recipe.of(config))
            linears.append(linear)
        share = Share.of_homes([tuple(linear.weight for linear in linears)])
        order, device = HomeOrder(np.array(expert_E)), torch.device("cpu")
        move_home(share, order, groups, device)
    kept = [linear.weight.get_high_precision_init_val() for linear in linears]  # type: ignore
    weights = [linear.weight.detach().float() for linear in linears]
    return [(float(w[1, 1]), float(k[1, 1])) for w, k in zip(weights, kept, strict=True)]


def test_master_weights_of_fp8_parameters_move_as_well(ranks: RankPools) -> None:
    moved = [3, 0, 2, 1]
    found = [one for of_rank in ranks(2).run(moved_to, moved) for one in of_rank]
    assert [kept for _, kept in found] == pytest.approx([1.1 + expert for expert in moved])
    assert [value for value, _ in found] == pytest.approx([1.1 + e for e in moved], rel=0.5)


PLANNED = AT_HOME + f" --fsep-late-plan wait --fsep-set cluster={REPLICAS_PAY}"


def test_training_goes_on_where_homes_moved(trained: Trainings, tmp_path: Path) -> None:
    """Two experts of a token commute in its sum, so without replicas only sums of norms differ."""
    flags = RESHARDABLE + " --override-opt_param-scheduler"
    saved = tmp_path / "saved"
    here, there = STATIC + homes(tmp_path, 6), STATIC + homes(tmp_path, 7)
    stayed = trained(f"{flags}{here} --save {saved} --save-interval 3", steps=6)
    moved, stock = (
        trained(f"{flags}{mode} --load {saved} --ckpt-step 3", steps=6) for mode in (there, "")
    )
    assert len(stock.losses) == 3
    for other in (stayed, moved):
        assert other.losses[-3:] == pytest.approx(stock.losses, rel=1e-6)
        for key, weight in stock.weights.items():
            assert torch.allclose(other.weights[key], weight, rtol=1e-4, atol=1e-6), key


def test_layers_without_homes_beyond_the_decoder_are_refused_on_every_rank(
    trained: Trainings, tmp_path: Path
) -> None:
    """Layers of the decoder are judged with the arguments."""
    given = homes(tmp_path, 10)
    for result in trained.ends(STATIC + given + " --mtp-num-layers 1"):
        assert f"--fsep-homes '{given.split()[1]}': has no homes for mtp" in result.message


@pytest.mark.parametrize(
    ("ranks_of_file", "experts", "layers", "said"),
    [
        (4, 8, 2, "has homes for 4 ranks and 8 experts"),
        (2, 6, 2, "has homes for 2 ranks and 6 experts"),
        (2, 8, 1, "has no homes for layer 2"),
    ],
    ids=["ranks", "experts", "layers"],
)
def test_homes_of_another_run_are_refused_on_every_rank(
    trained: Trainings, tmp_path: Path, ranks_of_file: int, experts: int, layers: int, said: str
) -> None:
    path, order_E = tmp_path / "homes.json", np.arange(experts)[::-1]
    write_homes(path, ranks_of_file, {f"layer {at + 1}": order_E for at in range(layers)})
    message = trained.refused(f"{STATIC} --fsep-homes {path}", steps=1)
    assert f"--fsep-homes '{path}': {said}" in message, message


def misses(_: list[torch.nn.Module]) -> int:
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    assert coordinator is not None and isinstance(coordinator.pass_layouts, AnnouncedLayouts)
    return coordinator.pass_layouts.misses


def test_announced_choices_are_known_by_home(trained: Trainings, tmp_path: Path) -> None:
    flags = f"{AT_HOME} --fsep-set cluster={REPLICAS_PAY}{REPLAY} --fsep-plan-mode announced"
    assert trained(flags + homes(tmp_path, 12), misses, by=train_row).probes == [0, 0, 0]


def test_layouts_are_recorded_with_experts_numbers(trained: Trainings, tmp_path: Path) -> None:
    folder, here = tmp_path / "recorded", homes(tmp_path, 13)
    trained(f"{PLANNED}{here} --fsep-record {folder} layouts", steps=5)
    _, layouts = [*read_layouts(folder / "group-0.layouts")][-1]
    orders = read_homes(Path(here.split()[1])).by_layer.values()
    for layout, home in zip(layouts, orders, strict=True):
        at_home = [layout.experts_of(rank)[:4] for rank in range(2)]
        assert [expert for of_rank in at_home for expert in of_rank] == home.expert_E.tolist()


def initial_weights_of_grouped(flags: list[str]) -> Tensors:
    found: Tensors = train_grouped(flags, by=initial_weights)
    return found


@pytest.mark.parametrize(
    "by", [initial_weights, initial_weights_of_grouped], ids=["sequence", "grouped"]
)
def test_experts_with_biases_go_home_as_they_are_made_and_as_they_are_loaded(
    trained: Trainings, tmp_path: Path, by: Callable[..., Tensors]
) -> None:
    saved = " --ckpt-format torch_dist --save {0} --save-interval 1"
    loaded = " --ckpt-format torch_dist --load {0} --finetune --no-load-optim --no-load-rng"

    def weights(mode: str, extra: str = "") -> Tensors:
        found: Tensors = trained(mode + extra, by=by, **BIASED)
        assert any("linear_fc1_bias" in name or "fc1.bias" in name for name in found)
        return found

    here, there = STATIC + homes(tmp_path, 15), STATIC + homes(tmp_path, 16)
    one, two = tmp_path / "one", tmp_path / "two"
    drawn = weights(here, saved.format(one))
    assert_equal(drawn, weights(""))
    learned = weights("", loaded.format(one) + saved.format(two))
    assert not all(torch.equal(learned[name], drawn[name]) for name in drawn)
    assert_equal(weights(there, loaded.format(one)), learned)
    assert_equal(weights(here, loaded.format(two)), weights("", loaded.format(two)))
