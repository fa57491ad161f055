"""Values that ranks compare before the first step and with their counts, and what errors say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_laer.choices import Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.life import Kind
from megatron_laer.planner.clusters import Figure, HostTime, Link, SolveTime
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import agreement
from megatron_laer.runtime.comm.agreement import describe_difference, summarise
from megatron_laer.runtime.comm.collectives import (
    CountsExchange,
    CountsMismatchError,
    LayoutMismatchError,
    LayoutTag,
    decision_digest,
)
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner
from tests.costs import COSTS
from tests.placed import placed

SUMMARY = summarise(FSEPConfig(), Geometry(4, 8, 3, 2), COSTS, seed=1)


def test_what_decides_is_compared_and_where_files_lie_is_not() -> None:
    cluster = replace(
        COSTS.cluster,
        name="a copy",
        source="a copy",
        assumed="nothing",
        spreads=(),
        figures=(("launch, s", Figure(1.0, 1.0, 1.0)),),
        measured=(("date", "today"),),
    )
    config = FSEPConfig(
        cluster="/there/copy.yaml", record_layouts="a", record_trace="b", record_metrics="c"
    )
    same = summarise(config, Geometry(4, 8, 3, 2), replace(COSTS, cluster=cluster), seed=1)
    assert same == SUMMARY
    assert describe_difference([SUMMARY, same], [0, 1]) is None


SOLVE = replace(COSTS.cluster.solve, base_s=float(np.nextafter(COSTS.cluster.solve.base_s, 1.0)))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("solve", SOLVE, f"cluster.solve.base_s is {SOLVE.base_s!r} on rank 6"),  # its last digit
        ("backward_gemm_factor", 1.25, "cluster.backward_gemm_factor is 1.25 on rank 6"),
        ("host", HostTime(1e-6, SolveTime(0, 0, 0)), "cluster.host.launch_s is 1e-06 on rank 6"),
        ("intra", Link(6e10, 1.06e-5, 2e-6), "cluster.intra.peer_s is 2e-06 on rank 6"),
    ],
)
def test_every_digit_of_every_constant_is_compared(name: str, value: object, told: str) -> None:
    cluster = replace(COSTS.cluster, spreads=(), **{name: value})
    other = summarise(FSEPConfig(), Geometry(4, 8, 3, 2), replace(COSTS, cluster=cluster), seed=1)
    text = describe_difference([SUMMARY, SUMMARY, other, SUMMARY], [4, 5, 6, 7])
    assert text is not None and told in text and "on ranks 4, 5, 7" in text


@pytest.mark.parametrize(
    ("config", "kinds", "said"),
    [
        ({"restore": "step"}, {Kind.STEP}, "--fsep-restore is step on rank 5 and layer on rank 4"),
        ({"scheduler": "off"}, {Kind.ALONE}, "--fsep-set scheduler is off on rank 5 and on on"),
        ({"plan_mode": "exact"}, {Kind.FRESH}, "--fsep-plan-mode is exact on rank 5 and not given"),
        ({}, {Kind.PARTS}, "--overlap-moe-expert-parallel-comm is on on rank 5 and off on rank 4"),
        ({}, {Kind.DELAYED}, "--delay-wgrad-compute or --overlap-dispatch-backward-with-experts"),
    ],
)
def test_kinds_of_a_run_are_named_by_flags(
    config: dict[str, Any], kinds: set[Kind], said: str
) -> None:
    costs = replace(COSTS, kinds=frozenset(kinds))
    other = summarise(FSEPConfig(**config), Geometry(4, 8, 3, 2), costs, seed=1)
    text = describe_difference([SUMMARY, other], [4, 5])
    assert text is not None and text.startswith(f"the ranks of its FSEP group differ: {said}")
    assert "Kind" not in text and text.count(" on rank 5") == 1


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ((Sharding.EXPERTS, "stock's"), "--fsep-sharding is experts on rank 3 and rows on ranks 1"),
        ((Sharding.ROWS, "other"), "the content of --fsep-homes is other on rank 3 and stock's on"),
        ((Sharding.ROWS, "stock's"), None),
    ],
)
def test_groups_with_experts_in_other_places_are_named(
    last: tuple[Sharding, str], said: str | None
) -> None:
    """Rank 0 has no MoE layer."""
    rows = Sharding.ROWS, "stock's"
    held_by_rank = [({"sharding": its, "capacity": 3}, homes) for its, homes in (rows, rows, last)]

    def all_gather_object(found: list[Any], held: Any) -> None:
        found[:] = [held, *held_by_rank]

    double = mock.Mock(get_world_size=lambda: 4, all_gather_object=all_gather_object)
    with mock.patch.object(agreement, "dist", double):
        settings, problem = agreement.settings_of_all(None)
    assert settings == ({} if said else held_by_rank[0][0])
    assert problem is None if said is None else said in str(problem)


def test_many_differences_and_ranks_are_cut_short() -> None:
    summaries = [{f"key {key}": str(rank % 2) for key in range(20)} for rank in range(40)]
    text = describe_difference(summaries, range(40))
    assert text is not None
    assert "; and 12 more. " in text and "15 and 12 more" in text and len(text) < 1500


def test_a_decision_is_told_from_others() -> None:
    layouts = [ExpertLayout.random(4, 3, 8, (draw,)) for draw in range(50)]
    digests = {
        decision_digest(layout, solved=solved) for layout in layouts for solved in (False, True)
    }
    assert len(digests) == 2 * len(set(layouts)) and 0 not in digests
    assert all(-(2**63) <= digest < 2**63 for digest in digests)


CPU = torch.device("cpu")
GROUPS: Any = SimpleNamespace(rank=0, index=0, size=2, ranks=(4, 5), tokens=None)


@contextlib.contextmanager
def gathered_with(others: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gather from a second rank, which sends these in turn, and then what the first one does.

    Yields what the first one has sent.
    """
    sent_before: list[torch.Tensor] = []

    def gather(gathered: torch.Tensor, sent: torch.Tensor, group: None) -> None:
        at = len(sent_before)
        sent_before.append(sent)
        torch.cat([sent, others[at] if at < len(others) else sent], out=gathered)

    with (
        mock.patch.object(torch.distributed, "all_gather_into_tensor", gather),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        yield sent_before


@pytest.mark.parametrize(("num_experts", "size"), [(4, 4), (12, 4), (6, 2)])
def test_a_rank_whose_counts_are_not_its_maps_is_named(num_experts: int, size: int) -> None:
    """Move a token between the first two experts of each word in turn."""
    exchange, tag_2 = CountsExchange(GROUPS, CPU), LayoutTag(1, 2).tensor(CPU)
    map_TE = torch.eye(num_experts, dtype=torch.bool)
    for first in range(0, num_experts, size):
        counts_E = map_TE.sum(dim=0)
        with gathered_with([]) as sent:
            exchange.start(counts_E, map_TE, tag_2, 0, "layer 3")()
        counts_E[first : first + 2] += torch.tensor([-1, 1])
        said = f"layer 3: rank 4 .* for experts {first} to {first + size - 1}, but its router's map"
        with gathered_with(sent), pytest.raises(CountsMismatchError, match=said):
            exchange.start(counts_E, map_TE, tag_2, 0, "layer 3")()


def test_a_rank_that_chose_another_layout_is_named_with_the_next_counts() -> None:
    """Both have planned the same layout, and one of them takes a fresh one after the gate."""
    planned, fresh = (
        ExpertLayout.from_slots(2, 2, 4, slots) for slots in ([0, 1, 2, 3], [0, 2, 1, 3])
    )
    layer: Any = mock.Mock(tag=lambda version, layout: LayoutTag(1, layout.digest).tensor(CPU))
    layer.name = "layer 3"
    map_TE = torch.eye(4, dtype=torch.bool)

    def passes(chosen: ExpertLayout) -> None:
        decision = mock.Mock(layout=chosen, solved=True, replanned=chosen != planned)
        scheduler = mock.Mock()
        scheduler.enter.return_value.index = layout_index(placed(planned), CPU)
        names = "streams", "layouts", "recorder", "pairs", "token_sizes"
        planner = MicrobatchPlanner(
            groups=GROUPS,
            device=CPU,
            scheduler=scheduler,
            pass_layouts=mock.Mock(decide=lambda *_: decision),
            needs_steps=False,
            **{name: mock.Mock() for name in names},  # type: ignore[arg-type]
        )
        for _ in range(2):
            planner.start_pass(layer, map_TE, map_TE.sum(dim=0), training=False)()

    with gathered_with([]) as sent:
        passes(planned)
    with gathered_with(sent):
        passes(planned)
    said = "ranks decided differently from the same counts"
    with gathered_with(sent) as sent, pytest.raises(LayoutMismatchError, match=said):
        passes(fresh)
    assert len(sent) == 2
