"""The command `simulate` predicts whole iterations of stock EP, FSEP and others on a cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_laer.choices import Recompute
from megatron_laer.config import ExchangeAlgorithm, FSEPConfig, PlanMode
from megatron_laer.files.checks import (
    is_same_file,
    one_line,
    quoted,
    refuse_overwriting,
    refuse_unwritable,
)
from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.writing import write_output
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.guard import GUARD_MODES
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.telemetry.trace_records import Trace
from megatron_laer.tools.cli import simulate_input
from megatron_laer.tools.cli.argument_types import between, named, number, path
from megatron_laer.tools.cli.plan_input import MAX_TOKENS
from megatron_laer.tools.simulator.iteration import report
from megatron_laer.tools.simulator.iteration.advice import Case, advice
from megatron_laer.tools.simulator.iteration.methods import METHODS, Method, Settings, make_method
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape, read_model
from megatron_laer.tools.simulator.iteration.predict import Prediction, predict
from megatron_laer.tools.simulator.iteration.predicted_timeline import PredictedTimeline
from megatron_laer.tools.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.report import check_can_plot

_MAX_STEPS = 10**5
_DEFAULT_STEPS = 3

_EXAMPLES = """\
examples:
  %(prog)s traces/group-0.trace --model tiny-moe --cluster cpu-gloo
  %(prog)s traces --model my-model.yaml --cluster my-cluster.yaml --ranks 64 --json x.json
  %(prog)s --workload W1 --model mixtral-8x7b-e8k2 --ranks 32 64 --capacity 2 3 --png x.png
  %(prog)s --workload W6 --model mixtral-8x7b-e8k2 --ranks 8 --pipeline 4 --virtual-pipeline 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate` to `parser`."""
    parser.description = (
        "What an iteration of stock EP, FSDP+EP, FlexMoE, LAER and FSEP takes for recorded or "
        "made-up routing, as a range over the cluster's constants, and whether FSEP is worth it."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    simulate_input.add_arguments(parser)
    swept = parser.add_argument_group("what is compared; several values are a sweep")
    for flag, high, metavar, told in (
        ("--ranks", simulate_input.MAX_RANKS, "N", "of an FSEP group; default: as in the trace"),
        ("--node-size", simulate_input.MAX_RANKS, "G", "ranks of a node; default: the cluster's"),
        ("--capacity", MAX_EXPERTS, "C", "slots per rank; default: min(E, ceil(E/N) + 1)"),
        (
            "--tokens",
            MAX_TOKENS,
            "T",
            "of a rank in a microbatch; default: as in the trace, a sequence for a workload",
        ),
    ):
        swept.add_argument(flag, type=between(1, high), nargs="+", metavar=metavar, help=told)
    modes = [mode.value for mode in GUARD_MODES]
    default_mode = PlanMode.ADAPTIVE.value
    swept.add_argument(
        "--mode", nargs="+", choices=modes, default=[default_mode], help=f"default: {default_mode}"
    )
    swept.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help=f"of {', '.join(METHODS)}; default: all",
    )
    ours = parser.add_argument_group("FSEP")
    ours.add_argument(
        "--strategy", choices=strategy_names(), default=FSEPConfig().planner, help="of the planner"
    )
    ours.add_argument(
        "--restore-algorithm",
        choices=[algorithm.value for algorithm in ExchangeAlgorithm],
        default=ExchangeAlgorithm.FLAT.value,
        help="how experts are fetched; default: %(default)s",
    )
    ours.add_argument(
        "--restore", choices=("layer", "step"), default="layer", help="as in training"
    )
    ours.add_argument("--scheduler", choices=("on", "off"), default="on", help="as in training")
    ours.add_argument(
        "--lag", type=between(1, _MAX_STEPS), default=1, help="age of a forecast, in steps"
    )
    parser.add_argument(
        "--steps",
        type=between(1, _MAX_STEPS),
        default=_DEFAULT_STEPS,
        metavar="S",
        help="of the trace that are simulated, spread over it; default: %(default)s",
    )
    parser.add_argument(
        "--peak-tflops",
        type=number(1e-6, 1e9),
        metavar="X",
        help="of a rank, for MFU; default: what the cluster's fastest GEMM reaches",
    )
    parser.add_argument(
        "--memory-gib",
        type=number(1e-3, 1e6),
        metavar="X",
        help="of a rank; no advice to take what needs more",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write all figures there")
    parser.add_argument("--png", type=path, metavar="FILE", help="draw them (needs matplotlib)")
    parser.add_argument(
        "--timeline",
        type=path,
        metavar="FILE",
        help="write the first step of the first case, for ui.perfetto.dev",
    )


def run(args: argparse.Namespace) -> int:
    """Run `simulate`.

    Raises:
        ValueError, OSError, ImportError: what was passed does not work; said before the work where
            it can be known by then.
    """
    _check(args)
    cluster = named("--cluster", args.cluster, load_cluster)
    model = named("--model", args.model, lambda name: read_model(name, args.experts))
    rates = rate_sets(Rates(cluster, model.bytes_per_element, args.host_gap_ms / 1e3))
    routing_of = simulate_input.routing_of(args, model, _reading)
    # A trace tells its ranks; a workload needs --ranks.
    ranks = args.ranks or [routing_of(1, None).num_ranks]
    cases: dict[Case, dict[str, Prediction]] = {}
    refused: dict[Case, dict[str, str]] = {}
    timeline = None
    made: dict[tuple[int, int | None], Trace] = {}
    runs: list[RunShape] = []
    wanted = [
        (resolve_geometry(model.num_experts, num_ranks, capacity, node_size), mode, tokens)
        for num_ranks in ranks
        for node_size in args.node_size or [min(cluster.ranks_per_node, num_ranks)]
        for capacity, mode, tokens in product(
            args.capacity or [None],
            args.mode,
            args.tokens or [None],
        )
    ]
    recorded = None if args.workload else routing_of(1, None)
    simulate_input.check_fits(args, model, recorded, [case[:2] for case in wanted], len(rates))
    for geometry, mode, tokens in wanted:
        num_ranks = geometry.num_ranks
        key = num_ranks, None if args.workload is None else tokens
        if key not in made:
            made = {key: routing_of(*key)}  # one at a time, for memory
        trace = made[key]
        pairs = None if tokens is None else float(tokens * model.topk)
        routing = Routing(trace, num_ranks, None if args.workload else pairs)
        shape = _run_shape(args, geometry, max(round(routing.pairs / model.topk), 1), trace)
        shape.layers_by_chunk(len(model.layer_has_experts))
        sizes = num_ranks, geometry.node_size, geometry.capacity
        case = Case(*sizes, mode, shape.tokens, shape.world)
        methods, refused[case] = _methods(args, geometry, cluster, model, PlanMode(mode), rates[0])
        record = None
        if args.timeline is not None and timeline is None:
            timeline = PredictedTimeline(num_ranks)
            record = timeline.recorder
        found = _simulated(args, case, routing, model, shape, methods, rates, record)
        cases[case] = {prediction.method: prediction for prediction in found}
        runs.append(shape)
    sentence = advice(cases, None if args.memory_gib is None else args.memory_gib * 2**30)
    about = {
        "trace": str(args.trace) if args.workload is None else f"workload {args.workload}",
        "model": args.model,
        "cluster": cluster.name,
        "run": asdict(runs[0]),
        "steps": args.steps,
        "lag": args.lag,
        "peak_flops_per_s": _peak(args, rates[0]),
    }
    _write(args, about, cases, refused, sentence, timeline)
    _print(about, runs[0], cases, refused, sentence)
    return 0


def _simulated(
    args: argparse.Namespace,
    case: Case,
    routing: Routing,
    model: ModelShape,
    shape: RunShape,
    methods: list[Method],
    rates: tuple[Rates, ...],
    record: Any,
) -> list[Prediction]:
    """Predict all methods of one case, with a bar."""
    steps = min(args.steps, len(routing.steps()))
    total = steps * routing.layers * shape.microbatches
    with tqdm(desc=case.label, total=total, unit="microbatch", disable=None, leave=False) as bar:
        return predict(
            routing,
            model,
            shape,
            methods,
            rates,
            steps=args.steps,
            lag=args.lag,
            peak_flops_per_s=_peak(args, rates[0]),
            progress=bar.update,
            record=record,
        )


def _methods(
    args: argparse.Namespace,
    geometry: Geometry,
    cluster: Cluster,
    model: ModelShape,
    mode: PlanMode,
    nominal: Rates,
) -> tuple[list[Method], dict[str, str]]:
    """Make the methods that can run with these sizes, and say why the others cannot."""
    costs = CostModel(
        cluster=cluster,
        hidden=model.hidden,
        ffn=model.expert_ffn,
        gated=model.gated,
        bytes_per_element=model.bytes_per_element,
        recompute=Recompute(args.recompute),
        restore_algorithm=ExchangeAlgorithm(args.restore_algorithm),
    )
    settings = Settings(
        geometry,
        costs,
        mode,
        args.strategy,
        overlaps=args.scheduler == "on",
        holds_step=args.restore == "step",
        stock_group=args.stock_expert_parallel,
    )
    methods, refused = [], {}
    for name in args.method:
        try:
            methods.append(make_method(name, settings, nominal))
        except ValueError as error:
            if name == "stock" and args.stock_expert_parallel is not None:
                raise
            refused[name] = str(error)
    if not methods:
        raise ValueError("; ".join(refused.values()))
    return methods, refused


def _run_shape(args: argparse.Namespace, geometry: Geometry, tokens: int, trace: Trace) -> RunShape:
    return RunShape(
        ranks=geometry.num_ranks,
        node_size=geometry.node_size,
        tokens=tokens,
        microbatches=simulate_input.microbatches_of(args, trace),
        stages=args.pipeline or 1,
        chunks=args.virtual_pipeline or 1,
        replicas=simulate_input.replicas_of(args, geometry.num_ranks),
        tensor=args.tensor_parallel or 1,
        recompute=Recompute(args.recompute),
        shards_optimizer=not args.no_distributed_optimizer,
        overlaps_data_parallel=not args.no_data_parallel_overlap,
    )


def _peak(args: argparse.Namespace, nominal: Rates) -> float:
    return nominal.best_flops_per_s if args.peak_tflops is None else args.peak_tflops * 1e12


# Output.


def _print(
    about: dict[str, Any], shape: RunShape, cases: report.Cases, refused: report.Refused, told: str
) -> None:
    first = next(iter(cases))
    sizes = f"{shape.tokens} tokens per rank and microbatch, {shape.microbatches} microbatches"
    parallel = f"pipeline {shape.stages} x {shape.chunks}, {shape.world} ranks in all"
    print(one_line(f"{about['model']} on {about['cluster']}, {about['trace']}"))
    print(f"{first.label}: {sizes}; {parallel}; recompute {shape.recompute}\n")
    print(report.table_text(cases[first], refused[first]), end="\n\n")
    print(report.parts_text(cases[first]), end="\n\n")
    if len(cases) > 1:
        print(report.sweep_text(cases), end="\n\n")
    print(report.LEGEND, told, sep="\n\n")


def _write(
    args: argparse.Namespace,
    about: dict[str, Any],
    cases: report.Cases,
    refused: report.Refused,
    told: str,
    timeline: PredictedTimeline | None,
) -> None:
    """Write the files that were asked for.

    Raises:
        ValueError: one cannot be written.
    """
    if args.json is not None:
        content = report.content(about, cases, refused, told)
        write_output(args.json, json.dumps(content, indent=1) + "\n", "--json")
    if args.png is not None:
        drawn = BytesIO()
        title = f"{Path(args.model).stem} on {about['cluster']}, {Path(about['trace']).name}"
        report.draw(title, cases).savefig(drawn, format="png")
        write_output(args.png, drawn.getvalue(), "--png")
    if timeline is not None:
        write_output(args.timeline, timeline.content(), "--timeline")


# Checks.


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not fit each other, or outputs that cannot be written.

    Raises:
        ValueError, OSError, ImportError: with what was passed and what would work.
    """
    for flag in ("ranks", "node_size", "capacity", "tokens", "mode", "method"):
        values = getattr(args, flag) or []
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ValueError(f"--{flag.replace('_', '-')} names {twice[0]} twice; leave one out")
    if args.restore == "step" and args.mode != [PlanMode.FORECAST.value]:
        raise ValueError(
            f"--restore step keeps layouts over a step, got --mode {' '.join(args.mode)}; give "
            f"--mode {PlanMode.FORECAST}"
        )
    simulate_input.check(args)
    inputs = [
        named("--cluster", args.cluster, lambda name: yaml_file("cluster", name)),
        named("--model", args.model, lambda name: yaml_file("model", name)),
    ]
    inputs += [args.trace] if args.trace is not None else []
    outputs = {"--json": args.json, "--png": args.png, "--timeline": args.timeline}
    given = {flag: output for flag, output in outputs.items() if output is not None}
    for flag, output in given.items():
        refuse_unwritable(output, flag)
        refuse_overwriting(output, inputs, flag)
        for other, there in given.items():
            if other < flag and is_same_file(output, there):
                raise ValueError(f"{other} and {flag} are one file, {quoted(output)}; give two")
    if args.png is not None:
        if args.png.suffix.lower() != ".png":
            raise ValueError(f"--png {quoted(args.png)}: give a file that ends in .png")
        check_can_plot(args.png, "--png")


def _reading(files: Iterable[Any]) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(files, desc="reading", leave=False, disable=None)
    return bar
