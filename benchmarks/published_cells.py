"""Iterations that LAER-MoE's artifact published, and their predictions by the simulator.

The artifact has times of four methods on six models, and each rank's received tokens under three of
them. It has no counts of experts, so layouts and splits are not planned here: received tokens enter
the recursion directly. Three constants are fitted, on the cells of Mixtral-8x7B alone; the others
are those of the cluster's file.

Legend: N ranks, L layers, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.published_files import (
    END_TO_END,
    FLEX,
    FSDP,
    LAER,
    MEGATRON,
    METHODS,
    MODELS,
    NO_LOSS,
    RANKS,
    Cell,
    read_cells,
    read_tokens,
    tokens_path,
)
from megatron_laer.choices import Recompute
from megatron_laer.life import Kind
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster, Contention
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Link
from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.iterate import Stages
from megatron_laer.tools.simulator.iteration.layer_times import Timing
from megatron_laer.tools.simulator.iteration.methods import Method
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape, read_model
from megatron_laer.tools.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.iteration.work import Exchange, LayerWork, TokenPassing

NODE_SIZE = 8
# Two microbatches of two sequences on each rank; Megatron has one sequence on a tensor-parallel
# group at a time.
SEQUENCE, BATCH = 8192, 128
_CLUSTER = "a100-4x8-ib800"


@dataclass(frozen=True)
class Constants:
    """Fitted constants: one of the hardware, within the cluster's own range, and two of routing.

    Attributes:
        backward: time of a FLOP in backward over forward.
        drift: additional deviation of static layouts from balance when times were taken, against
            that of the counted tokens. Only for e8k2, whose tokens are of iterations 0 to 4.
        kappa: for Megatron, deviation of single experts and sequences over that of the published
            groups of experts over four sequences.
    """

    backward: float = 1.0
    drift: float = 0.0
    kappa: float = 1.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Constants:
        return cls(*map(float, values))


NAMES = tuple(Constants.__dataclass_fields__)
# An estimate without any measured time.
PRIORS = Constants()


def model_of(name: str) -> ModelShape:
    return replace(read_model(name), sequence=SEQUENCE)


class Published:
    """Predictor of cells from the published tokens."""

    def __init__(self, folder: Path, *, quick: bool = False) -> None:
        self._quick = quick
        self.cells = read_cells(folder)
        self._tokens = read_tokens(folder)
        self._check(folder)
        cluster = _without_contention(load_cluster(_CLUSTER))
        self._rates = Rates(cluster, bytes_per_element=2)
        self._spreads = rate_sets(self._rates)
        self._predict = cache(self._uncached)

    def _check(self, folder: Path) -> None:
        """Raise ValueError for times that lack a cell to compare with, or their tokens."""
        losses = {cell.aux_loss for cell in self.cells} | {NO_LOSS}
        found = {(cell.model, cell.aux_loss, cell.method) for cell in self.cells}
        wanted = set(product(MODELS, losses, METHODS))
        if found != wanted:
            raise ValueError(
                f"{folder / END_TO_END}: {', '.join(min(found ^ wanted))}: each of "
                f"{', '.join(MODELS)} needs each of {', '.join(METHODS)} under each auxiliary loss"
            )
        for model, method in product(MODELS, (FSDP, FLEX, LAER)):
            family, layers = model.rsplit("-", 1)[1], len(model_of(model).layer_has_experts)
            if len(self._tokens.get((family, method), ())) < layers:
                raise ValueError(
                    f"{tokens_path(folder, family)}: {method} has fewer layers than the {layers} "
                    f"of {model}"
                )

    def predict(self, cell: Cell, constants: Constants, corner: int | None = None) -> float:
        """Predict a cell's seconds; auxiliary losses of 0 and 1e-4 are the same to the simulator.

        `corner` is the number of a set of rates that the cluster's spreads allow.
        """
        return self._predict(cell.model, cell.method, constants, corner)

    def range(self, cell: Cell, constants: Constants) -> tuple[float, float]:
        """Return the minimum and maximum over the spreads of the cluster's links and GEMMs.

        The factor of backward is fitted, so it does not vary here.
        """
        found = [self.predict(cell, constants, corner) for corner in range(len(self._spreads))]
        return min(found), max(found)

    def _uncached(
        self, model_name: str, method: str, constants: Constants, corner: int | None
    ) -> float:
        model = model_of(model_name)
        family = model_name.rsplit("-", 1)[1]
        is_megatron = method == MEGATRON
        rates = self._rates if corner is None else self._spreads[corner]
        rates = replace(
            rates,
            cluster=replace(rates.cluster, backward_gemm_factor=constants.backward, spreads=()),
        )
        run = _run(family, is_megatron)
        tokens_LMN = self._tokens[family, FSDP if is_megatron else method]
        scale = 1.0
        if family == "e8k2" and method in (MEGATRON, FSDP):
            scale *= 1 + constants.drift
        if is_megatron:
            scale *= constants.kappa
        works = _works(model, run, tokens_LMN, scale, self._rates, restores=not is_megatron)
        timing = Timing(model, run, rates, self._rates)
        schedule = Schedule.of({Kind.ALONE} if is_megatron else {Kind.SYNCHRONISED})
        of_method = _method(model, schedule, is_megatron, family)
        # As many whole iterations as the known microbatches allow.
        known = tokens_LMN.shape[1]
        iterations = 1 if is_megatron or self._quick else known // run.microbatches
        found = []
        for iteration in range(iterations):
            first = iteration * run.microbatches

            def work(layer: int, microbatch: int, first: int = first) -> LayerWork:
                return works[layer][(first + microbatch) % known]

            found.append(Stages(of_method, timing, work).run().seconds)
        return float(np.mean(found))


def _run(family: str, is_megatron: bool) -> RunShape:
    if not is_megatron:
        tokens = SEQUENCE * BATCH // RANKS // 2
        return RunShape(RANKS, NODE_SIZE, tokens, 2, recompute=Recompute.COMPUTE)
    tensor = 8 if family == "e8k2" else 4
    microbatches = BATCH // (RANKS // tensor)
    return RunShape(RANKS, NODE_SIZE, SEQUENCE // tensor, microbatches, tensor=tensor)


def _without_contention(cluster: Cluster) -> Cluster:
    """Return the cluster without the contention that its fitted factor of backward includes."""
    spreads = tuple(pair for pair in cluster.spreads if not pair[0].startswith("contention."))
    return replace(cluster, contention=Contention(), spreads=spreads)


def _method(model: ModelShape, schedule: Schedule, is_megatron: bool, family: str) -> Method:
    """Return the method; eight ranks of Megatron have all experts, the others share one engine."""
    capacity = 2 if family == "e8k2" else 4

    def never() -> None:
        raise AssertionError("nothing is planned here")

    if is_megatron:
        return Method(MEGATRON, schedule, False, never, model.num_experts / 8, 0, RANKS // 8)
    return Method("fsep", schedule, True, never, model.num_experts / RANKS, capacity, 1)


def _works(
    model: ModelShape,
    run: RunShape,
    tokens_LMN: np.ndarray,
    scale: float,
    rates: Rates,
    *,
    restores: bool,
) -> list[list[LayerWork]]:
    """Make the work of every layer and microbatch; 8x22B uses the first layers of its family."""
    layers = len(model.layer_has_experts)
    mean = run.tokens * model.topk
    pairs_LMN = mean + (tokens_LMN[:layers] - tokens_LMN.mean()) * (
        scale * mean / tokens_LMN.mean()
    )
    pairs_LMN = np.maximum(pairs_LMN, 0).round().astype(np.int64)
    exchange = None
    if restores:
        capacity = model.topk  # in all six models
        size = capacity * model.expert_weights * model.bytes_per_element
        inside, outside = (NODE_SIZE - 1) / RANKS, (RANKS - NODE_SIZE) / RANKS
        intra, inter = size * inside, size * outside
        geometry = Geometry(RANKS, model.num_experts, capacity, NODE_SIZE)
        exchange = Exchange(intra, inter, (Link.ALL,), geometry)
    return [
        [_work(pairs_N, mean, rates, exchange, model) for pairs_N in pairs_MN]
        for pairs_MN in pairs_LMN
    ]


def _work(
    pairs_N: np.ndarray, mean: int, rates: Rates, exchange: Exchange | None, model: ModelShape
) -> LayerWork:
    """Make one layer's work: tokens stay in their node, where all ranks send alike."""
    slots = model.topk if exchange is not None else model.num_experts // 8
    per_slot_N = np.maximum(pairs_N // slots, 1)
    others = (NODE_SIZE - 1) / NODE_SIZE
    return LayerWork(
        unit_s_N=rates.cluster.gemm.unit_seconds(per_slot_N) * slots,
        pairs_N=pairs_N,
        intra_N=(np.maximum(pairs_N, mean) * others).astype(np.int64),
        inter_N=np.zeros_like(pairs_N),
        restore=exchange,
        reduce=exchange,
        change=None,
        solve_s=0.0,
        slots=slots,
        used_slots=slots,
        passing=TokenPassing(None if exchange is not None else NODE_SIZE),
    )


@dataclass(frozen=True)
class Fit:
    """Fitted constants, and their mean relative error."""

    constants: Constants
    error: float


def fit(predict: Callable[[Constants], np.ndarray], measured: np.ndarray, start: Constants) -> Fit:
    """Fit constants by Gauss-Newton steps on relative errors, damped, none below zero."""
    values = np.array([getattr(start, name) for name in NAMES])
    # Plausible change of each constant.
    size = np.array([0.3, 0.3, 0.5])

    def errors(at: np.ndarray) -> np.ndarray:
        return np.log(predict(Constants.of(at)) / measured)

    def jacobian(at: np.ndarray, now: np.ndarray) -> np.ndarray:
        columns = []
        for number in range(len(at)):
            moved = at.copy()
            moved[number] += 0.02 * size[number]
            columns.append((errors(moved) - now) / 0.02)
        return np.stack(columns, axis=1)

    now, damping = errors(values), 1e-3
    for _ in range(12):
        slopes = jacobian(values, now)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.eye(len(values)), -slopes.T @ now)
        tried = np.maximum(values + step * size, 0.0)
        tried[0] = np.clip(tried[0], 1.0, 1.73)  # the range in the cluster's file
        then = errors(tried)
        gained = float(now @ now - then @ then)
        if gained > 0:
            values, now, damping = tried, then, damping / 5
        else:
            damping *= 10
        if 0 <= gained < 1e-7:
            break
    return Fit(Constants.of(values), float(np.abs(np.expm1(now)).mean()))
