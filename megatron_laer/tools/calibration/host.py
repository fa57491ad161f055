"""Measurements of a rank's host: launches, copies, the exchange of counts, quotas and layouts.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from megatron_laer.arrays import Int64
from megatron_laer.choices import PlanMode
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry, counts_bytes
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import collectives
from megatron_laer.runtime.comm.process_groups import create_groups
from megatron_laer.tools.calibration.quantities import (
    ALL_GATHER,
    COPY,
    COUNTS,
    GATE,
    LAUNCH,
    SOLVE,
    PlannerCall,
    Single,
)
from megatron_laer.tools.calibration.sampling import Job, Sample, timed
from megatron_laer.tools.calibration.settings import CalibrationSettings

_LAUNCHES = 100
_NODE_SIZE = 8
_TOKENS = 8192
# Number of counts that are used in turn, so that consecutive calls differ.
_CASES = 5


def host_jobs(
    everybody: dist.ProcessGroup, settings: CalibrationSettings, device: torch.device
) -> Iterator[Job]:
    num_bytes = counts_bytes(settings.counts_experts)

    def launches() -> Sample:
        one = torch.zeros(1, device=device)

        def launch() -> None:
            for _ in range(_LAUNCHES):
                one.add_(1.0)

        return timed(launch, device)

    def copies() -> Sample:
        source = torch.zeros(settings.copy_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return timed(lambda: target.copy_(source), device)

    def gather() -> Sample:
        mine = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        gathered = mine.new_empty(num_bytes * dist.get_world_size())
        return timed(lambda: dist.all_gather_into_tensor(gathered, mine, group=everybody), device)

    def counts() -> Sample:
        groups = create_groups(everybody, settings.node_size, lambda *_, **__: everybody)
        exchange = collectives.CountsExchange(groups, device)
        counts_E = torch.zeros(settings.counts_experts, dtype=torch.int64, device=device)
        map_TE = torch.zeros(_TOKENS, settings.counts_experts, dtype=torch.bool, device=device)
        tag_2 = collectives.LayoutTag(0, 0).tensor(device)
        return timed(lambda: exchange.start(counts_E, map_TE, tag_2, 0, "calibrate")(), device)

    yield Job(Single(LAUNCH), launches, units=_LAUNCHES)
    yield Job(Single(COPY, settings.copy_bytes), copies)
    yield Job(Single(ALL_GATHER, num_bytes), gather, is_shared=True)
    yield Job(Single(COUNTS, settings.counts_experts), counts, is_shared=True)
    for shape in settings.shapes:
        for name in (GATE, SOLVE):

            def call(name: str = name, shape: tuple[int, int, int] = shape) -> Sample:
                return _planner_call(name, shape, device)

            yield Job(PlannerCall(name, *shape), call)


def _planner_call(name: str, shape: tuple[int, int, int], device: torch.device) -> Sample:
    """Sample the guard without a new layout (`gate`), or the added time of a new one (`solve`).

    Times are CPU times of the calling thread, since the host's other threads do not wait for it.
    """
    num_ranks, capacity, num_experts = shape
    node_size = min(_NODE_SIZE, num_ranks)
    geometry = Geometry(num_ranks, num_experts, capacity, node_size)
    static = ExpertLayout.static(num_ranks, capacity, num_experts)
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(_CASES):
        now_NE, before_NE = _drifted_counts(num_ranks, num_experts, rng)
        cases.append((now_NE, construct_layout(before_NE, static, node_size)))
    turns = itertools.cycle(cases)
    # Of any cluster: a call's time depends on no constant.
    costs = CostModel(load_cluster("h100-8"), hidden=1, ffn=1, gated=True, bytes_per_element=1)
    guard = Guard(PlanMode.FORECAST, costs, geometry)

    def gate() -> None:
        counts_NE, planned = next(turns)
        guard.decide(counts_NE, planned)

    def solve() -> None:
        counts_NE, planned = next(turns)
        layout = construct_layout(counts_NE, planned, node_size)
        quotas = exact_split(layout, node_size).solve(counts_NE)
        costs.split_seconds(quotas.totals(), geometry)

    return timed(gate if name == GATE else solve, device, time.thread_time)


def _drifted_counts(
    num_ranks: int, num_experts: int, rng: np.random.Generator
) -> tuple[Int64, Int64]:
    share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1))
    before_E = share_E * rng.uniform(0.8, 1.2, num_experts)
    now_NE, before_NE = (
        rng.multinomial(_TOKENS, part_E / part_E.sum(), size=num_ranks).astype(np.int64)
        for part_E in (share_E, before_E)
    )
    return now_NE, before_NE
