"""Iterations that LAER-MoE's artifact published, and what the simulator makes of them.

The artifact has times of four methods on six models, and the tokens that each rank received under
three of them. Counts of experts are not published, so that layouts and splits are not planned here:
received tokens go into the recursion as they are. Three constants are fitted, on the cells of
Mixtral-8x7B alone; the others are those of the cluster's file.

Legend: N ranks, L layers, M microbatches.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_laer.choices import Recompute
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.schedule import Schedule, make_schedule
from megatron_laer.simulator.iteration.iterate import run_iteration
from megatron_laer.simulator.iteration.layer_times import Timing
from megatron_laer.simulator.iteration.methods import Method
from megatron_laer.simulator.iteration.model_shape import ModelShape, read_model
from megatron_laer.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.simulator.iteration.run_shape import RunShape
from megatron_laer.simulator.iteration.work import Exchange, LayerWork

RANKS, NODE_SIZE = 32, 8
# Two microbatches of two sequences on each rank; Megatron has one sequence on a tensor-parallel
# group at a time.
SEQUENCE, BATCH = 8192, 128
MEGATRON, FSDP, FLEX, LAER = "megatron", "FSDP", "FLEX", "LAER"
METHODS = (MEGATRON, FSDP, FLEX, LAER)
FIT_MODELS = ("mixtral-8x7b-e8k2", "mixtral-8x7b-e16k4")
# Of the microbatches whose tokens are published: without the first, which have no plan yet, and for
# e16k4 the last, which are nearest to the timed iterations.
_WINDOWS = {"e8k2": slice(2, 10), "e16k4": slice(20, 30)}
_CLUSTER = "a100-4x8-ib800"


@dataclass(frozen=True)
class Constants:
    """What is fitted: one of the hardware, within the cluster's own range, and two of routing.

    Attributes:
        backward: time of a FLOP in backward over forward.
        drift: how much more static layouts deviate from balance when times were taken than when
            tokens were counted, for e8k2, whose tokens are of iterations 0 to 4 only.
        kappa: deviation of single experts and sequences over that of what was published, groups of
            experts over four sequences; for Megatron.
    """

    backward: float = 1.0
    drift: float = 0.0
    kappa: float = 1.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Constants:
        """Make them from a vector, in the order of the fields."""
        return cls(*map(float, values))


NAMES = tuple(Constants.__dataclass_fields__)
# What one would say without having seen a time.
PRIORS = Constants()


@dataclass(frozen=True)
class Cell:
    """One published time."""

    dataset: str
    model: str
    aux_loss: str
    method: str
    measured_s: float

    @property
    def name(self) -> str:
        """Return what the cell is called, without its method."""
        return f"{self.dataset}, {self.model}, aux {self.aux_loss}"

    @property
    def family(self) -> str:
        """Return experts and top-k."""
        return self.model.rsplit("-", 1)[1]

    @property
    def is_fitted(self) -> bool:
        """Tell whether constants are fitted on it."""
        return self.model in FIT_MODELS


def read_cells(folder: Path) -> list[Cell]:
    """Read the published times."""
    with (folder / "laer_ae_e2e_wikitext.csv").open(newline="") as file:
        return [
            Cell(
                row["dataset"],
                row["model_name"],
                row["aux_loss"],
                row["method"],
                float(row["avg_time_ms"]) / 1e3,
            )
            for row in csv.DictReader(file)
        ]


def model_of(name: str) -> ModelShape:
    """Return a model of the artifact."""
    return replace(read_model(name), sequence=SEQUENCE)


def read_tokens(
    folder: Path, windows: Mapping[str, slice] = _WINDOWS
) -> dict[tuple[str, str], np.ndarray]:
    """Read received tokens by family and method, [L, M, N], of a window of microbatches."""
    found = {}
    for family in windows:
        rows: dict[str, dict[tuple[int, int, int], int]] = {}
        with (folder / f"laer_ae_tokens_{family}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                key = int(row["layer"]), int(row["iter"]), int(row["rank"])
                rows.setdefault(row["method"], {})[key] = int(row["token_num"])
        for method, tokens in rows.items():
            shape = [1 + max(key[axis] for key in tokens) for axis in range(3)]
            tokens_LMN = np.zeros(shape)
            for key, number in tokens.items():
                tokens_LMN[key] = number
            found[family, method] = tokens_LMN[:, windows[family]]
    return found


def read_ablation(folder: Path) -> dict[str, float]:
    """Read the published times of ablations, in milliseconds."""
    with (folder / "laer_ae_ablation_ms.csv").open(newline="") as file:
        return {row["method"]: float(row["avg_time_ms"]) for row in csv.DictReader(file)}


class Profiled(NamedTuple):
    """Seconds of a profiled iteration, mean over ranks."""

    tokens_s: float
    expert_s: float
    total_s: float


def read_breakdown(folder: Path) -> dict[tuple[str, str], Profiled]:
    """Read token exchanges', experts' and total seconds by model and method."""
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    with (folder / "laer_ae_breakdown_seconds.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["model_name"], row["method"]
            times = (row[f"{name}_time"] for name in ("alltoall", "expert", "total"))
            found.setdefault(key, []).append(tuple(map(float, times)))
    return {key: Profiled(*np.mean(times, axis=0).tolist()) for key, times in found.items()}


@dataclass(frozen=True)
class Predicted:
    """Seconds of an iteration, and what experts' forward takes a rank on average."""

    seconds: float
    expert_forward_s: float


class Published:
    """Predicts cells from the published tokens."""

    def __init__(
        self,
        folder: Path,
        *,
        quick: bool = False,
        constants: Mapping[str, float] | None = None,
    ) -> None:
        self._quick = quick
        self.cells = read_cells(folder)
        self._tokens = read_tokens(folder)
        cluster = load_cluster(_CLUSTER)
        self._spreads = rate_sets(Rates(cluster, bytes_per_element=2))
        self._rates = Rates(cluster.with_constants(constants or {}), bytes_per_element=2)
        self._predict = cache(self._uncached)

    def predict(self, cell: Cell, constants: Constants, corner: int | None = None) -> Predicted:
        """Predict a cell; auxiliary losses of 0 and 1e-4 are the same to the simulator.

        Args:
            corner: one of the sets of rates that the cluster's spreads allow.
        """
        return self._predict(cell.model, cell.method, constants, corner, True)

    def unscheduled(self, cell: Cell, constants: Constants) -> Predicted:
        """Predict a cell with all exchanges exposed."""
        return self._predict(cell.model, cell.method, constants, None, False)

    def range(self, cell: Cell, constants: Constants) -> tuple[float, float]:
        """Return the least and most over the spreads of the cluster's links and GEMMs.

        The factor of backward is a fitted one, so that it does not vary here.
        """
        found = [
            self.predict(cell, constants, corner).seconds for corner in range(len(self._spreads))
        ]
        return min(found), max(found)

    def _uncached(
        self, model_name: str, method: str, constants: Constants, corner: int | None, overlaps: bool
    ) -> Predicted:
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
        schedule = make_schedule(overlaps=overlaps and not is_megatron)
        of_method = _method(model, schedule, is_megatron, family)
        # As many whole iterations as there are microbatches whose tokens are known.
        known = tokens_LMN.shape[1]
        iterations = 1 if is_megatron or self._quick else known // run.microbatches
        found = []
        for iteration in range(iterations):
            first = iteration * run.microbatches

            def work(layer: int, microbatch: int, first: int = first) -> LayerWork:
                return works[layer][(first + microbatch) % known]

            found.append(run_iteration(of_method, timing, work).seconds)
        pairs = run.tokens * model.topk * run.microbatches * len(works)
        forward_s = pairs * 2 * model.expert_weights / rates.best_flops_per_s
        return Predicted(float(np.mean(found)), forward_s)


def _run(family: str, is_megatron: bool) -> RunShape:
    if not is_megatron:
        tokens = SEQUENCE * BATCH // RANKS // 2
        return RunShape(RANKS, NODE_SIZE, tokens, 2, recompute=Recompute.COMPUTE)
    tensor = 8 if family == "e8k2" else 4
    microbatches = BATCH // (RANKS // tensor)
    return RunShape(RANKS, NODE_SIZE, SEQUENCE // tensor, microbatches, tensor=tensor)


def _method(model: ModelShape, schedule: Schedule, is_megatron: bool, family: str) -> Method:
    """Megatron owns its experts, eight ranks have all of them; the others share one engine."""
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
    """Make the work of every layer and microbatch; 8x22B takes the first layers of its family."""
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
        exchange = Exchange(intra, inter, intra, inter, False, 1, RANKS, NODE_SIZE)
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
        unit_s_N=rates.slot_unit_seconds(per_slot_N) * slots,
        pairs_N=pairs_N,
        intra_N=(np.maximum(pairs_N, mean) * others).astype(np.int64),
        inter_N=np.zeros_like(pairs_N),
        mean_intra=float(mean * others),
        mean_inter=0.0,
        restore=exchange,
        reduce=exchange,
        change=None,
        solve_s=0.0,
        slots=slots,
        group=None if exchange is not None else NODE_SIZE,
    )


# Fitting.


@dataclass(frozen=True)
class Fit:
    """Holds fitted constants, and how well the data determine them.

    Attributes:
        sigma: of each constant, as a share of it, if a cell is off by one percent.
        singular: values of the scaled Jacobian, largest first; small ones are directions in which
            constants can be exchanged for each other.
    """

    constants: Constants
    error: float
    sigma: Mapping[str, float]
    singular: tuple[float, ...]


def fit(predict: Callable[[Constants], np.ndarray], measured: np.ndarray, start: Constants) -> Fit:
    """Fit constants by Gauss-Newton steps on relative errors, damped, none below zero."""
    values = np.array([getattr(start, name) for name in NAMES])
    # What a constant may reasonably change by.
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
        tried[0] = np.clip(tried[0], 1.0, 1.73)  # what the cluster's file has as its range
        then = errors(tried)
        gained = float(now @ now - then @ then)
        if gained > 0:
            values, now, damping = tried, then, damping / 5
        else:
            damping *= 10
        if 0 <= gained < 1e-7:
            break
    slopes = jacobian(values, now)
    _, singular, directions = np.linalg.svd(slopes, full_matrices=False)
    # One percent of each measured time, through the pseudo-inverse.
    variance = ((directions / np.maximum(singular, 1e-9)[:, None]) ** 2).sum(axis=0)
    sigma = 0.01 * np.sqrt(variance) * size / np.maximum(np.abs(values), 1e-9)
    return Fit(
        Constants.of(values),
        float(np.abs(np.expm1(now)).mean()),
        dict(zip(NAMES, sigma.tolist(), strict=True)),
        tuple(singular.tolist()),
    )
