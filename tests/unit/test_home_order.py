"""Homes by a permutation: values that go there and back, and their file."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_laer.choices import Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.layer.experts.home_moves import move_home
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.home_order import HomeOrder, home_digest
from megatron_laer.planner.homes_file import read_homes, write_homes
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.service import Plan
from megatron_laer.planner.state import PlannerState
from megatron_laer.runtime import build
from megatron_laer.runtime.planning.planner_checkpoint import by_expert, by_position
from megatron_laer.runtime.weights.share import Share

ORDER = HomeOrder(np.array([3, 0, 2, 1]))
STOCK = HomeOrder.stock(4)


def test_values_and_layouts_go_there_and_back() -> None:
    values_NE = np.arange(8).reshape(2, 4)
    assert ORDER.by_position(values_NE).tolist() == [[3, 0, 2, 1], [7, 4, 6, 5]]
    assert ORDER.by_expert(ORDER.by_position(values_NE)).tolist() == values_NE.tolist()
    layout = ExpertLayout.from_slots(2, 3, 4, [0, 1, -1, 2, 3, 0])
    named = ORDER.layout_of_experts(layout)
    assert named.to_list() == [3, 0, -1, 2, 1, 3]
    assert ORDER.layout_of_positions(named) == layout
    assert STOCK.layout_of_experts(layout) is layout and STOCK.by_expert(values_NE) is values_NE
    pairs_EE = np.arange(16).reshape(4, 4)
    pairs_EE += pairs_EE.T
    places = np.ix_(ORDER.expert_E, ORDER.expert_E)
    assert ORDER.pairs_by_expert(pairs_EE)[places].tolist() == pairs_EE.tolist()


def test_homes_have_a_name_by_content_and_stocks_have_none() -> None:
    assert home_digest([STOCK, STOCK]) == ""
    assert home_digest([STOCK, ORDER]) != home_digest([ORDER, STOCK]) != ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"experts": [[3, 0, 2, 2]] * 2}, "layer 1 must name each expert once: expert 2 at home"),
        ({"experts": [[3, 0, 4, 1]] * 2}, r"expert 4 at home position 2 is not in 0\.\.3"),
        ({"experts": [[3, 0, 2]] * 2}, "layer 1: homes must be 4 integers, got"),
        ({"experts": [[3, 0, 2, True]] * 2}, "layer 1: homes must be 4 integers, got"),
        ({"experts": []}, "experts must be a list for each of 2 layers"),
        ({"num_ranks": 0}, r"num_ranks must be an integer in 1\.\."),
        ({"crc": "0123abcd"}, "its checksum does not fit"),
    ],
    ids=str,
)
def test_a_file_is_read_back_and_a_bad_one_refused_with_quotes(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "homes.json"
    write_homes(path, 2, {"layer 1": ORDER.expert_E, "mtp 1": STOCK.expert_E})
    homes = read_homes(path)
    assert (homes.num_ranks, homes.num_experts) == (2, 4)
    found = {layer: home.expert_E.tolist() for layer, home in homes.by_layer.items()}
    assert found == {"layer 1": [3, 0, 2, 1], "mtp 1": [0, 1, 2, 3]}
    good = json.loads(path.read_text())
    del good["crc"]
    path.write_text(json.dumps(good))  # by hand
    assert read_homes(path).digest == homes.digest
    path.write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=said) as raised:
        read_homes(path)
    assert str(path) in str(raised.value)


def test_homes_imply_experts() -> None:
    assert FSEPConfig(homes="f").sharding == Sharding.EXPERTS


def test_a_planners_state_is_saved_with_experts_numbers() -> None:
    """So a run with other homes does not take its layouts for its own."""
    geometry = Geometry(2, 4, 3, node_size=2, sharding=Sharding.EXPERTS)
    quick_NE = np.arange(8).reshape(2, 4)
    forecast = SmoothedForecast((quick_NE, quick_NE + 1))
    layout = geometry.static_layout
    layers = ("layer 1",)
    state = PlannerState(2, 1, layers, (layout,), (forecast,), (Plan(1, (layout,), 0.5),))
    saved = by_expert(state, [ORDER])
    assert saved.layouts[0].to_list() == saved.plans[0].layouts[0].to_list() == [3, 0, -1, 2, 1, -1]
    (found,) = saved.forecasts
    quick_NE, steady_NE = found.kept
    assert quick_NE.tolist() == [[1, 3, 2, 0], [5, 7, 6, 4]]
    assert steady_NE.tolist() == [[2, 4, 3, 1], [6, 8, 7, 5]]
    by_position(saved, [ORDER]).check_fits(geometry, layers)
    for other in (STOCK, HomeOrder(np.array([1, 0, 3, 2]))):
        with pytest.raises(ValueError, match="does not fit --fsep-sharding experts"):
            by_position(saved, [other]).check_fits(geometry, layers)


def test_an_own_loop_with_another_runs_homes_is_refused_when_its_layers_are_built(
    tmp_path: Path,
) -> None:
    """Megatron's command line is checked before, and a loop of one's own has none."""
    path, groups = tmp_path / "homes.json", mock.Mock(size=4)
    write_homes(path, 2, {"layer 1": ORDER.expert_E})
    said = r"--fsep-homes '.*': has homes for 2 ranks and 4 experts"
    with (
        mock.patch.object(build.agreement, "difference", return_value=None) as compared,
        pytest.raises(ValueError, match=said),
    ):
        build._common_homes(FSEPConfig(homes=str(path)), groups, 4)
    compared.assert_called_once()  # so that a rank without the problem does not wait for others


@pytest.mark.parametrize(
    "moved", [[5, 3, 0, 4, 2, 1], [1, 0, 2, 5, 4, 3], [3, 4, 5, 0, 1, 2], [2, 5, 4, 1, 3, 0]]
)
def test_initial_values_go_to_the_slots_of_their_homes(moved: list[int]) -> None:
    """Two ranks in threads have three homes each, of which several come from one rank."""
    order, sent = HomeOrder(np.array(moved)), dict[int, Any]()
    all_are_there = threading.Barrier(2)

    def all_to_all(
        received: torch.Tensor,
        given: torch.Tensor,
        received_N: list[int],
        sent_N: list[int],
        group: int,
    ) -> None:
        sent[group] = given.split(sent_N)
        all_are_there.wait(60)
        parts = [sent[source][group] for source in range(2)]
        assert [len(part) for part in parts] == received_N
        received.copy_(torch.cat(parts))
        all_are_there.wait(60)

    def move(rank: int) -> list[float]:
        values = [torch.full((2, 4), float(3 * rank + at)) for at in range(3)]
        share = Share.of_homes([tuple(map(torch.nn.Parameter, values))])
        groups = mock.Mock(rank=rank, size=2, parameters=rank)
        move_home(share, order, groups, torch.device("cpu"))
        return [home[1, 3].item() for home in share.matrices[0]]

    with mock.patch.object(dist, "all_to_all_single", all_to_all), ThreadPoolExecutor(2) as pool:
        found = [*pool.map(move, range(2))]
    assert [value for of_rank in found for value in of_rank] == moved
