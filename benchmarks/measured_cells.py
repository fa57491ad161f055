"""Step times of the end-to-end benchmark on two ranks of this machine, measured and predicted.

`calibrate` measures the hardware's constants. Balanced steps of stock at two sizes give two
more: the dense layers' time beyond FLOPs and bytes, and the fixed time of a step. These two sizes
are compared with nothing else. Other sizes, skews and modes are predicted.

Legend: P steps, L layers, N ranks, E experts, T tokens of a rank, K experts of a token.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.end_to_end import KEEP_MEMORY
from benchmarks.end_to_end_cases import HALF, QUICK, Configuration, Size, configurations
from benchmarks.training_run import measure
from megatron_laer.choices import OverlapScheduler, PlanMode, Recompute
from megatron_laer.config import FSEPConfig
from megatron_laer.cpu.ranks import RankPool
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import default_capacity
from megatron_laer.tools.data import default_text_sources, prepare_data
from megatron_laer.tools.simulator.iteration.methods import FSEP, METHODS, STOCK, MethodSettings
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.predict import predict_iterations
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.replay import Routing
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import WorkloadShape, workload_trace

RANKS = 2
# Size of the byte vocabulary, padded as Megatron pads.
_VOCABULARY = 384
_BALANCED_STEPS = 4

# Balanced steps of stock at these sizes give two constants; the last size is only predicted.
_CALIBRATED = (replace(HALF, sequences=8), replace(HALF, hidden=192, ffn=768, sequences=8))
_OTHER = replace(HALF, hidden=320, ffn=1280, sequences=8)
_NAMES = (
    *("stock, W1", "fsep, W1", "stock, W2", "fsep, W2", "stock, W5", "fsep, W5"),
    *("stock, W6", "fsep, W6", "stock, drifting", "fsep, drifting"),
    *("fsep balanced, adaptive", "fsep balanced, exact", "fsep balanced, scheduler off"),
    *("stock balanced, recompute", "fsep balanced, recompute"),
)
_OTHER_NAMES = ("ideal", "stock, W2", "fsep, W2")
_QUICK_NAMES = ("stock, W2", "fsep, W2")


@dataclass(frozen=True)
class Job:
    size: Size
    case: Configuration
    is_calibrated: bool

    @property
    def name(self) -> str:
        size = self.size
        return (
            f"{self.case.name}; hidden {size.hidden}, ffn {size.ffn}, "
            f"{size.sequence * size.sequences} tokens"
        )


def compare(*, quick: bool = False, cluster: Path | None = None) -> list[dict[str, Any]]:
    """Measure and predict; return a row for each configuration.

    `quick` chooses a few at the smallest size, which shows nothing about accuracy. `cluster` is a
    file of `calibrate`, which otherwise runs first.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if cluster is None:
            cluster = scratch / "here.yaml"
            _calibrate(cluster, quick=quick)
        jobs = list(jobs_of(scratch, quick=quick))
        times = _measured(jobs, scratch)
        rates = Rates(load_cluster(cluster), bytes_per_element=4)
        found = fitted(rates, [(job, times[job.name]) for job in jobs if job.is_calibrated])
        return [
            {
                "name": job.name,
                "measured_s": times[job.name],
                "predicted_s": predicted_seconds(job, found),
                "calibrated": job.is_calibrated,
            }
            for job in jobs
        ]


def _calibrate(output: Path, *, quick: bool) -> None:
    size = QUICK if quick else HALF
    words = f"--nproc-per-node {RANKS} --standalone -m megatron_laer calibrate {output}"
    model = output.with_name("size.yaml")
    sizes = f"hidden-size: {size.hidden}, moe-ffn-hidden-size: {size.ffn}, num-experts: 8"
    model.write_text(f"description: its experts\nmoe: {{{sizes}, swiglu: true}}\n")
    words += f" --config {model}" + (" --quick" if quick else "")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words.split()], check=True)


def jobs_of(scratch: Path, *, quick: bool) -> Iterator[Job]:
    sizes: list[tuple[Size, Sequence[str], bool]]
    if quick:
        small = replace(QUICK, sequences=8)
        sizes = [(small, ["ideal"], True), (replace(small, hidden=64, ffn=256), ["ideal"], True)]
        sizes.append((QUICK, _QUICK_NAMES, False))
    else:
        sizes = [(size, ["ideal"], True) for size in _CALIBRATED]
        sizes += [(HALF, _NAMES, False), (_OTHER, _OTHER_NAMES, False)]
    for number, (size, names, is_calibrated) in enumerate(sizes):
        folder = scratch / str(number)
        folder.mkdir()
        cases = {case.name: case for case in configurations(size, RANKS, folder)}
        for name in names:
            yield Job(size, cases[name], is_calibrated)


def _measured(jobs: Sequence[Job], scratch: Path) -> dict[str, float]:
    prefix = str(scratch / "text")
    prepare_data(default_text_sources()[:150], prefix, progress=False)
    found = {}
    with mock.patch.dict(os.environ, KEEP_MEMORY), RankPool(RANKS) as pool:
        for job in jobs:
            flags = [*job.size.flags(prefix, RANKS), "--data-cache-path", str(scratch / "cache")]
            ranks = pool.run(
                measure,
                [*flags, *job.case.flags.split()],
                job.case.routing,
                job.size.routing_shape(RANKS),
                job.case.steps,
                timeout_s=3600,
            )
            found[job.name] = statistics.median(ranks[0].step_ms[job.size.warm_up :]) / 1e3
            print(f"{job.name:70}{found[job.name]:9.3f} s", flush=True)
    return found


def fitted(rates: Rates, known: Sequence[tuple[Job, float]]) -> Rates:
    """Solve for the two constants from the seconds of balanced steps at two sizes.

    Predictions are linear in both.
    """
    (one, one_s), (other, other_s) = known

    def both(overhead: float) -> np.ndarray:
        at = replace(rates, overhead=overhead)
        return np.array([predicted_seconds(job, at) for job in (one, other)])

    base = both(0.0)
    slopes = np.stack([both(1.0) - base, np.ones(2)], axis=1)
    overhead, gap_s = np.linalg.solve(slopes, np.array([one_s, other_s]) - base)
    print(
        f"dense layers take {overhead:.2f} times as long again as their bytes; {gap_s:.3f} s once"
    )
    if gap_s < 0:  # noise; then attribute everything to the layers
        overhead, gap_s = float(((np.array([one_s, other_s]) - base) / slopes[:, 0]).mean()), 0.0
    return replace(rates, overhead=float(overhead), gap_s=float(gap_s))


def predicted_seconds(job: Job, rates: Rates) -> float:
    """Predict a configuration's mean step time, over the counted steps."""
    size, flags = job.size, job.case.flags.split()
    model = _model(size)
    run = RunShape(
        ranks=RANKS,
        node_size=RANKS,
        tokens=size.sequence * size.sequences,
        microbatches=1,
        recompute=Recompute.FULL if "--recompute-granularity" in flags else Recompute.NONE,
        shards_optimizer=False,
        overlaps_data_parallel=False,
    )
    capacity = default_capacity(RANKS, size.experts)
    geometry = Geometry(RANKS, size.experts, capacity, RANKS)
    costs = CostModel(rates.cluster, size.hidden, size.ffn, False, 4, run.recompute)
    mode = PlanMode.ADAPTIVE
    if "--fsep-plan-mode" in flags:
        mode = PlanMode(flags[flags.index("--fsep-plan-mode") + 1])
    scheduler = OverlapScheduler.OFF if "scheduler=off" in flags else OverlapScheduler.ON
    config = FSEPConfig(plan_mode=mode, scheduler=scheduler)
    settings = MethodSettings(geometry, costs, config)
    name = FSEP if "--expert-parallel-mode" in flags else STOCK
    trace = _trace(job)
    steps = len(set(trace.step_R.tolist())) - job.size.warm_up
    method = METHODS[name](settings, rates)
    routing = Routing(trace, RANKS, model.topk)
    found = predict_iterations(routing, model, run, [method], [rates], steps=steps)
    return found[0].iteration_s


def _model(size: Size) -> ModelShape:
    return ModelShape(
        flash_attention=False,
        hidden=size.hidden,
        layer_has_experts=(True,) * size.layers,
        heads=8,
        query_width=size.hidden,
        key_value_width=size.hidden,
        dense_ffn=size.ffn,
        expert_ffn=size.ffn,
        shared_ffn=0,
        gated=False,
        num_experts=size.experts,
        topk=size.topk,
        sequence=size.sequence,
        vocabulary=_VOCABULARY,
        prediction_heads=1,
        bytes_per_element=4,
    )


def _trace(job: Job) -> Trace:
    """Return the counts of the replayed routing, or of routing that is forced to balance."""
    size = job.size
    if job.case.routing.trace is None:
        shape = WorkloadShape(RANKS, size.experts, size.topk, size.sequence * size.sequences)
        return workload_trace("W0", shape, size.warm_up + _BALANCED_STEPS)
    chosen_PLNTK = np.load(job.case.routing.trace)[: job.case.steps]
    steps, layers = chosen_PLNTK.shape[:2]
    counts_RNE = np.stack(
        [
            [np.bincount(chosen_TK.ravel(), minlength=size.experts) for chosen_TK in chosen_NTK]
            for chosen_NTK in chosen_PLNTK.reshape(steps * layers, *chosen_PLNTK.shape[2:])
        ]
    ).astype(np.int32)
    step_R, layer_R = (axis.reshape(-1) for axis in np.indices((steps, layers), dtype=np.int64))
    names = tuple(f"layer {layer + 1}" for layer in range(layers))
    return Trace(names, step_R, layer_R, np.zeros_like(step_R), counts_RNE)
