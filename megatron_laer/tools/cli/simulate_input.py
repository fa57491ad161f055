"""These arguments of `simulate` say what is simulated: routing, model, cluster, parallel sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megatron_laer.choices import Recompute
from megatron_laer.config import PlanMode
from megatron_laer.files import memory
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.telemetry.trace_records import Trace
from megatron_laer.tools.cli.argument_types import add_hours, between, number
from megatron_laer.tools.cli.plan_input import add_routing_arguments
from megatron_laer.tools.simulator.iteration import estimate
from megatron_laer.tools.simulator.iteration.estimate import Work
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.traces import read_trace
from megatron_laer.tools.traces.workloads import WORKLOADS, Shape, workload_counts

MAX_RANKS = 2**16
_MAX_COUNT = 2**16
_DEFAULT_CLUSTER = "a100-4x8-ib800"
# Of workloads: layers differ by their seed; steps are as many as the longest of them needs to show
# what it does.
_WORKLOAD_LAYERS, _WORKLOAD_STEPS = 4, 8
_WORKLOAD_MICROBATCHES = 8
_BYTES_PER_COUNT = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of what is simulated to `parser`."""
    add_routing_arguments(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME|YAML", help="of configs/models, or a file"
    )
    parser.add_argument(
        "--cluster",
        default=_DEFAULT_CLUSTER,
        metavar="NAME|YAML",
        help="hardware constants, a name from configs/clusters or a file; default: %(default)s",
    )
    sizes = parser.add_argument_group("the run")
    for flag, high, metavar, told in (
        (
            "--microbatches",
            _MAX_COUNT,
            "M",
            f"of an iteration; default: as in the trace, {_WORKLOAD_MICROBATCHES} for a workload",
        ),
        ("--pipeline", _MAX_COUNT, "P", "pipeline stages, each with its own FSEP groups"),
        ("--virtual-pipeline", _MAX_COUNT, "V", "model chunks of a stage (interleaved schedule)"),
        ("--tensor-parallel", MAX_RANKS, "T", "ranks that share a sequence in attention"),
        ("--expert-data-parallel", _MAX_COUNT, "D", "FSEP groups of a stage; default: 1"),
        ("--world", MAX_RANKS, "W", "ranks of a stage, which gives its number of FSEP groups"),
    ):
        sizes.add_argument(flag, type=between(1, high), metavar=metavar, help=told)
    sizes.add_argument(
        "--stock-expert-parallel",
        type=between(1, MAX_EXPERTS),
        metavar="X",
        help="ranks among which stock EP has every expert once; default: as many as fit",
    )
    sizes.add_argument(
        "--recompute",
        choices=list(Recompute),
        default=Recompute.NONE.value,
        help="what backward computes again: nothing; all of a layer, token exchanges included; or "
        "its compute alone; default: %(default)s",
    )
    sizes.add_argument(
        "--host-gap-ms",
        type=number(0.0, 1e9),
        default=0.0,
        metavar="X",
        help="once per iteration, as of the data loader; default: none",
    )
    add_hours(parser)
    sizes.add_argument(
        "--no-distributed-optimizer", action="store_true", help="optimizer states are not sharded"
    )
    sizes.add_argument(
        "--no-data-parallel-overlap",
        action="store_true",
        help="gradients of dense layers are exchanged after the last backward",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse a trace and a workload, or neither.

    Raises:
        ValueError: with what was passed and what would work.
    """
    if args.world is not None:
        if args.expert_data_parallel is not None:
            raise ValueError("--world and --expert-data-parallel say the same; leave one out")
        for ranks in args.ranks or []:
            if args.world % ranks != 0:
                raise ValueError(f"--world {args.world} is no multiple of --ranks {ranks}")
    given = f"--workload {args.workload}"
    if args.workload is None:
        if args.trace is None:
            raise ValueError(
                "nothing to simulate: give a TRACE, or --workload with one of "
                f"{', '.join(WORKLOADS)}"
            )
        return
    if args.trace is not None:
        raise ValueError(f"both a trace, {str(args.trace)!r}, and {given}; leave one out")
    for flag, value in (("--format", args.format), ("--trace-ranks", args.trace_ranks)):
        if value is not None:
            raise ValueError(f"{flag} {value}: no effect here; {given} reads no file")
    if args.ranks is None:
        raise ValueError(f"{given} has no ranks of its own; give --ranks")


def routing_of(
    args: argparse.Namespace,
    model: ModelShape,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Callable[[int, int | None], Trace]:
    """Return what gives the trace for a number of ranks, and for tokens if it is a workload's.

    Raises:
        ValueError, OSError: the trace cannot be read.
    """
    if args.workload is None:
        trace = read_trace(
            args.trace,
            args.format,
            ranks=args.trace_ranks,
            num_experts=model.num_experts,
            progress=progress,
        )
        return lambda ranks, tokens: trace
    return lambda ranks, tokens: _workload(args, model, ranks, tokens)


def _workload(args: argparse.Namespace, model: ModelShape, ranks: int, tokens: int | None) -> Trace:
    """Make a workload's trace: layers with a microbatch each, in several steps."""
    steps, layers = _workload_sizes(args, model)
    shape = Shape(ranks, model.num_experts, model.topk, tokens or model.sequence)
    memory.check_enough(
        _BYTES_PER_COUNT * steps * layers * ranks * model.num_experts,
        f"{steps} steps of {ranks} ranks and {model.num_experts} experts",
        "give fewer --ranks, or a smaller --lag",
    )
    counts_RNE = np.stack(
        [
            workload_counts(args.workload, shape, step, seed=layer)
            for step in range(steps)
            for layer in range(layers)
        ]
    )
    step_R, layer_R = (axis.reshape(-1) for axis in np.indices((steps, layers), dtype=np.int64))
    names = tuple(f"layer {layer + 1}" for layer in range(layers))
    return Trace(names, step_R, layer_R, np.zeros_like(step_R), counts_RNE.astype(np.int32))


def _workload_sizes(args: argparse.Namespace, model: ModelShape) -> tuple[int, int]:
    """Return the steps and the layers of a workload."""
    return max(_WORKLOAD_STEPS, args.lag + 1), min(_WORKLOAD_LAYERS, model.moe_layers)


def microbatches_of(args: argparse.Namespace, trace: Trace | None) -> int:
    """Return the microbatches of an iteration; a workload says none."""
    if args.microbatches is not None:
        return int(args.microbatches)
    if trace is None or args.workload is not None:
        return _WORKLOAD_MICROBATCHES
    return int(trace.microbatch_R.max()) + 1


def check_fits(
    args: argparse.Namespace,
    model: ModelShape,
    trace: Trace | None,
    cases: Sequence[tuple[Geometry, str]],
    rates: int,
) -> None:
    """Refuse cases that would take longer than --hours, or more memory than is free.

    Args:
        trace: None for a workload, which is drawn later.
        cases: shapes and plan modes.
        rates: sets of constants.

    Raises:
        ValueError: with the estimate.
    """
    if trace is None:
        steps, layers = _workload_sizes(args, model)
        records, found_steps = steps * layers, steps
    else:
        layers, records = len(trace.layers), len(trace)
        found_steps = len(set(trace.step_R.tolist()))
    microbatches = microbatches_of(args, trace)
    works = [
        Work(
            geometry=geometry,
            methods=args.method,
            strategy=args.strategy,
            mode=PlanMode(mode),
            rates=rates,
            layers=len(model.layer_has_experts),
            traced_layers=layers,
            microbatches=microbatches,
            stages=args.pipeline or 1,
            chunks=args.virtual_pipeline or 1,
            steps=min(args.steps, found_steps),
            records=records,
            cases=min(layers * microbatches, -(-records // found_steps)),
            lag=args.lag,
            draws=trace is None,
            timeline=args.timeline is not None,
        )
        for geometry, mode in cases
    ]
    estimate.check_fits(works, args.hours)


def replicas_of(args: argparse.Namespace, ranks: int) -> int:
    """Return the FSEP groups of a stage.

    Raises:
        ValueError: a world that is no multiple of the ranks of a trace.
    """
    if args.world is None:
        return int(args.expert_data_parallel or 1)
    if args.world % ranks != 0:
        raise ValueError(f"--world {args.world} is no multiple of the trace's {ranks} ranks")
    return int(args.world) // ranks
