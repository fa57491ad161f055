"""Inputs of predictions, by flags and recordings: routing, model, cluster and `RunSettings`.

`plan`, `report`, `simulate` and `advise` share them, so that they predict one run alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_laer.choices import Auto, Dispatch, ExchangeAlgorithm, Recompute, Restore, Sharding
from megatron_laer.files import memory
from megatron_laer.files.checks import quoted
from megatron_laer.life import Kind, kinds_of
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.precision import Precision
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    between,
    named,
    number,
    option,
    path,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.outputs import check_outputs
from megatron_laer.tools.cli.progress import bar
from megatron_laer.tools.model_flags import DEFAULT_SIZES, MAX_WIDTH, ExpertSizes, model_sizes
from megatron_laer.tools.report.metrics_recording import MetricsRecording, read_metrics
from megatron_laer.tools.report.run_files import metrics_beside
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape, read_model
from megatron_laer.tools.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.tools.simulator.run_settings import RunSettings
from megatron_laer.tools.traces.paper import PAPERS_MICROBATCHES
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import (
    PAPER,
    PAPER_FIRST,
    TITLES,
    WorkloadShape,
    workload_trace,
)

DEFAULT_CLUSTER = "a100-4x8-ib800"
# Bytes per element: default (bf16) and maximum.
_BYTES_PER_ELEMENT, _MOST_BYTES = 2, 8
ROWS_IN_FP8 = (
    "--sharding rows: the model computes in fp8, and rows of experts are kept and moved without; "
    "give --sharding experts"
)
# Sizes of iterations' workloads: layers differ by their seed; 8 steps show the longest pattern. The
# paper's has all layers, since their mean is compared with its own, and two microbatches in a step.
_LAYERS, _STEPS, WORKLOAD_MICROBATCHES = 4, 8, 8
# Bytes per count of a workload: 8 to make it, 4 to keep it.
_BYTES_PER_COUNT = 12
# Part of a card's memory that stays free, for fragments and all that is not counted.
_MARGIN_GIB = 1.0


def add_routing(parser: argparse.ArgumentParser) -> None:
    """Add a recorded trace, or a workload."""
    text = "a recording of --fsep-record DIR trace, or its folder"
    parser.add_argument("trace", metavar="TRACE", nargs="?", type=path, help=text)
    titles = ", ".join(f"{name} {title}" for name, title in TITLES.items())
    instead = f"in place of a trace; W0 to W7 are Megatron's benchmark: {titles}"
    option(parser, "--workload W", instead, choices=TITLES)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add routing, model and cluster."""
    add_routing(parser)
    option(parser, "--model NAME|YAML", "of configs/models, or a file", required=True)
    shared(parser, "--cluster NAME|YAML", f"the recorded, else {DEFAULT_CLUSTER}")


def check_routing(args: argparse.Namespace, purpose: str) -> None:
    """Refuse both trace and workload, or neither, and a workload without ranks."""
    if args.workload is None:
        if args.trace is None:
            raise ValueError(
                f"nothing to {purpose}: give a TRACE, or --workload with one of {', '.join(TITLES)}"
            )
        return
    given = f"--workload {args.workload}"
    if args.trace is not None:
        raise ValueError(f"both a trace, {str(args.trace)!r}, and {given}; remove one of them")
    if args.ranks is None:
        raise ValueError(f"{given} has no ranks of its own; give --ranks")


def refuse(args: argparse.Namespace, flags: tuple[str, ...], way_out: str) -> None:
    for flag in flags:
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(f"{flag} {value}: no effect here; {way_out}, or leave {flag} out")


def read_inputs(args: argparse.Namespace, purpose: str) -> tuple[Cluster, ModelShape, float | None]:
    """Return cluster, model and GiB of a rank; refuse inputs and outputs that contradict.

    The cluster is that of the flag, else of the run that recorded the trace, else the default.
    Memory is the flag's, else less than the card's, if there is one.
    """
    check_routing(args, purpose)
    inputs = yaml_inputs(cluster=("cluster", args.cluster), model=("model", args.model))
    check_outputs({"--json": args.json}, inputs, args.trace, force=args.force)
    beside = None
    if args.cluster is None and args.trace is not None:
        beside = metrics_beside(args.trace)
    cluster = cluster_by(args.cluster, None if beside is None else read_metrics(beside))
    most_gib = args.memory_gib
    if most_gib is None and cluster.card is not None:
        most_gib = cluster.card.memory_gib - _MARGIN_GIB
    return cluster, named("--model", args.model, read_model), most_gib


def rates_of(model: ModelShape, cluster: Cluster) -> tuple[Rates, ...]:
    cluster.gemm_in(model.precision)  # refuses an unknown speed
    return rate_sets(Rates(cluster, model.bytes_per_element, precision=model.precision))


def workload(model: ModelShape, name: str, ranks: int, tokens: int | None) -> Trace:
    """Make a workload's trace of some steps and layers of a model, unless memory is too small."""
    layers, microbatches = min(_LAYERS, model.moe_layers), 1
    if name in (PAPER, PAPER_FIRST):
        layers, microbatches = model.moe_layers, PAPERS_MICROBATCHES
    shape = WorkloadShape(ranks, model.num_experts, model.topk, tokens or model.sequence)
    memory.check_enough(
        _BYTES_PER_COUNT * _STEPS * layers * microbatches * ranks * model.num_experts,
        f"{_STEPS} steps of {ranks} ranks and {model.num_experts} experts",
        "give fewer --ranks",
    )
    progress = bar("drawing", leave=False)
    return workload_trace(
        name, shape, _STEPS, layers=layers, microbatches=microbatches, progress=progress
    )


def prediction_settings(
    flags: Mapping[str, Any], recording: MetricsRecording | None, source: Path | None
) -> RunSettings:
    """Return the settings of predictions by a command's flags, which are None if not given.

    Raises ValueError for unusable settings of the recording at `source`.
    """
    model = None if flags["config"] is None else named("--config", flags["config"], model_sizes)
    # Another model is assumed to be in bf16, regardless of this run's dtype.
    given: dict[str, Any] = (
        {} if model is None else asdict(model) | {"bytes_per_element": _BYTES_PER_ELEMENT}
    )
    given |= {name: value for name, value in flags.items() if value is not None}
    recorded = recording.runs[-1][1] if recording is not None and recording.runs else {}

    def value[T](name: str, read: Callable[[str], T], otherwise: T) -> T:
        if name in given:
            found: T = given[name]
            return found
        if name not in recorded:
            return otherwise
        try:
            return read(recorded[name])
        except (ValueError, argparse.ArgumentTypeError) as error:
            of_run = f"the run's {name} {quoted(recorded[name])}"
            raise ValueError(f"{source}: {of_run} cannot be used: {error}") from error

    width = between(1, MAX_WIDTH)
    sizes = ExpertSizes(
        value("hidden", width, DEFAULT_SIZES.hidden),
        value("ffn", width, DEFAULT_SIZES.ffn),
        value("gated", _boolean, DEFAULT_SIZES.gated),
        None if model is None else model.num_experts,
        value("top_k", between(1, MAX_EXPERTS), DEFAULT_SIZES.top_k),
        value("precision", Precision, Precision.PARAMETERS),
    )
    usual = Sharding.EXPERTS if sizes.precision.is_quantised else Sharding.ROWS
    sharding = Sharding(value("sharding", Sharding, usual))
    if sizes.precision.is_quantised and sharding == Sharding.ROWS:
        raise ValueError(ROWS_IN_FP8)
    costs = CostModel(
        cluster=cluster_by(flags["cluster"], recording),
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        gated=sizes.gated,
        bytes_per_element=value("bytes_per_element", between(1, _MOST_BYTES), _BYTES_PER_ELEMENT),
        recompute=value("recompute", Recompute, Recompute.NONE),
        precision=sizes.precision,
        layers=None if model is not None else value("layers", width, None),
        sharers=value("sharers", between(1, MOST_RANKS), 1),
        kinds=kinds_of(
            {
                Kind.PARTS: value("combined", _boolean, False),
                Kind.STEP: value("restore", Restore, Restore.LAYER) == Restore.STEP,
            }
        ),
    )
    return RunSettings(
        sizes,
        costs,
        value("restore_algorithm", _algorithm, _algorithm(ExchangeAlgorithm.FLAT)),
        value("token_exchange", Dispatch, Dispatch.RANK),
        sharding,
        value("imbalance_tolerance", number(0, MOST_RANKS), None),
        flags["cluster"] is not None,
        None if recording is None else recording.shape,
    )


def cluster_by(flag: str | None, recording: MetricsRecording | None) -> Cluster:
    """Return the cluster of the flag, else of the run that was recorded, else the default."""
    if flag is None and recording is not None and recording.clusters:
        return recording.clusters[-1]
    return named("--cluster", flag or DEFAULT_CLUSTER, load_cluster)


def _algorithm(text: str) -> ExchangeAlgorithm | Auto:
    return Auto.AUTO if text == Auto.AUTO else ExchangeAlgorithm(text)


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"{text!r} must be True or False")
    return text == "True"
