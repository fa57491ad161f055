"""The command `simulate` predicts whole iterations of stock EP, FSEP and others on a cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from tqdm import tqdm

from megatron_laer.choices import (
    Auto,
    OverlapScheduler,
    Sharding,
    TokenExchange,
)
from megatron_laer.config import ExchangeAlgorithm, FSEPConfig, PlanMode, lays_out_freely
from megatron_laer.files.checks import one_line
from megatron_laer.files.writing import write_output
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.guard import GUARD_MODES
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.planner.sharding_choice import Candidate, choose_geometry
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.planner.token_exchange import (
    choose_token_exchange,
    counting_visits,
    with_token_exchange,
)
from megatron_laer.tools.cli import simulate_input
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    between,
    describe,
    named,
    number,
    option,
    path,
)
from megatron_laer.tools.cli.fp8_flags import ROWS_IN_FP8
from megatron_laer.tools.cli.routing_input import MAX_TOKENS
from megatron_laer.tools.simulator import iteration_output as output
from megatron_laer.tools.simulator.iteration.advice import Case, advice
from megatron_laer.tools.simulator.iteration.methods import (
    METHODS,
    STOCK,
    Method,
    MethodSettings,
    make_method,
)
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction, predict_iterations
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.iteration.stock_group import Predict, fastest_stock
from megatron_laer.tools.traces.records import Trace

_MAX_STEPS = 10**5
_FLEX = "flex"
_TOKENS = (*(exchange.value for exchange in TokenExchange), _FLEX, Auto.AUTO.value)

_ROWS_SHARDED = (
    "--data-parallel-sharding-strategy: Megatron-FSDP takes experts as stock's parameters; give "
    "--sharding experts, or leave it out"
)
_ROWS_ADAPTED = (
    "--lora-rank: rows of experts have no linear layers to adapt; give --sharding experts, or "
    "--lora-targets of attention alone"
)

_EXAMPLES = """\
examples:
  %(prog)s traces/group-0.trace --model tiny-moe --cluster cpu-gloo
  %(prog)s traces --model my-model.yaml --cluster my-cluster.yaml --ranks 64 --json x.json
  %(prog)s --workload W1 --model mixtral-8x7b-e8k2 --ranks 32 64 --capacity 2 3
  %(prog)s --workload W6 --model mixtral-8x7b-e8k2 --ranks 8 --pipeline 4 --virtual-pipeline 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Time of an iteration of stock EP, FSDP+EP, FlexMoE, LAER and FSEP for recorded or made-up "
        "routing, as a range over the cluster's constants, and whether FSEP is worth it.",
        _EXAMPLES,
    )
    simulate_input.add_arguments(parser)
    swept = parser.add_argument_group("what is compared; several values are a sweep")
    for flag, high, text in (
        ("--ranks N", MOST_RANKS, "of an FSEP group; default: as in the trace"),
        ("--node-size G", MOST_RANKS, "ranks of a node; default: the cluster's"),
        ("--capacity C", MAX_EXPERTS, "slots per rank; default: as in training"),
        (
            "--tokens T",
            MAX_TOKENS,
            "of a rank in a microbatch; default: as in the trace, a sequence for a workload",
        ),
    ):
        option(swept, flag, text, between(1, high), nargs="+")
    text = "experts at home, or rows of each on every rank; default: auto, as in training"
    shardings = [*(sharding.value for sharding in Sharding), Auto.AUTO.value]
    option(swept, "--sharding", text, nargs="+", choices=shardings, default=[Auto.AUTO.value])
    modes, text = [mode.value for mode in GUARD_MODES], "default: as in training"
    option(swept, "--mode", text, nargs="+", choices=modes)
    text = f"of {', '.join(METHODS)}; default: all"
    option(swept, "--method", text, nargs="+", choices=METHODS, default=list(METHODS))
    ours = parser.add_argument_group("FSEP")
    algorithms = [*(algorithm.value for algorithm in ExchangeAlgorithm), Auto.AUTO.value]
    fetched = "how experts are fetched; default: %(default)s"
    for flag, choices, default, text in (
        ("--strategy", strategy_names(), FSEPConfig().planner, "of the planner"),
        ("--restore-algorithm", algorithms, Auto.AUTO.value, fetched),
        ("--token-exchange", _TOKENS, Auto.AUTO.value, "as in training, or flex: DeepEP's"),
        ("--restore", ("layer", "step"), "layer", "as in training"),
        ("--scheduler", ("on", "off"), "on", "as in training"),
    ):
        option(ours, flag, text, choices=choices, default=default)
    steps = between(1, _MAX_STEPS)
    option(ours, "--lag", "age of a forecast, in steps", steps, default=1)
    text = "of the trace that are simulated, spread over it; default: %(default)s"
    option(parser, "--steps S", text, steps, default=3)
    text = "of a rank, for MFU; default: what the cluster's fastest GEMM reaches"
    option(parser, "--peak-tflops X", text, number(1e-6, 1e9))
    text = (
        "of a rank; stock and the advice take nothing that needs more; default: the card's less 1"
    )
    option(parser, "--memory-gib X", text, number(1e-3, 1e6))
    option(parser, "--json FILE", "write all figures there", path)


@dataclass
class _Results:
    predicted: dict[Case, dict[str, IterationPrediction]] = field(default_factory=dict)
    refused: dict[Case, dict[str, str]] = field(default_factory=dict)
    runs: list[RunShape] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    simulate_input.check(args)
    cluster = named("--cluster", args.cluster, load_cluster)
    model = simulate_input.model_of(args)
    rates = simulate_input.rates_of(args, model, cluster)
    shardings = _shardings(args, model)
    routing_of = simulate_input.routing_of(args, model)
    # A trace has its ranks; a workload needs --ranks.
    ranks = args.ranks or [routing_of(1, None).num_ranks]
    wanted = [
        (
            resolve_geometry(
                model.num_experts,
                num_ranks,
                capacity,
                node_size,
                sharding=Sharding.ROWS if sharding == Auto.AUTO else Sharding(sharding),
                flags=("--capacity", _node_size_flag(args, cluster)),
            ),
            FSEPConfig(
                planner=args.strategy,
                sharding=sharding,
                capacity=capacity,
                plan_mode=mode,
                restore=args.restore,
                scheduler=OverlapScheduler(args.scheduler),
            ),
            tokens,
        )
        for num_ranks in ranks
        for node_size in args.node_size or [min(cluster.ranks_per_node, num_ranks)]
        for capacity, sharding, mode, tokens in product(
            args.capacity or [None],
            shardings,
            args.mode or [None],
            args.tokens or [None],
        )
    ]
    made: dict[tuple[int, int | None], Trace] = {}
    results = _Results()
    for geometry, config, tokens in wanted:
        key = geometry.num_ranks, None if args.workload is None else tokens
        if key not in made:
            made = {key: routing_of(*key)}  # one at a time, for memory
        _simulate(args, model, rates, geometry, config, tokens, made[key], results)
    cases = results.predicted
    sentence = advice(cases, _most_bytes(args, cluster))
    about = {
        "trace": str(args.trace) if args.workload is None else f"workload {args.workload}",
        "model": args.model,
        "cluster": cluster.name,
        "run": asdict(results.runs[0]),
        "steps": args.steps,
        "lag": args.lag,
        "peak_flops_per_s": _peak(args, rates[0]),
        "memory_gib": simulate_input.most_gib(args, cluster),
        "not_given": output.not_given(cluster),
    }
    _write(args, about, results, sentence)
    _print(about, results, sentence)
    return 0


def _simulate(
    args: argparse.Namespace,
    model: ModelShape,
    rates: tuple[Rates, ...],
    geometry: Geometry,
    config: FSEPConfig,
    tokens: int | None,
    trace: Trace,
    results: _Results,
) -> None:
    num_ranks = geometry.num_ranks
    scaled = tokens if args.workload is None else None  # a workload is made with its tokens
    routing = Routing.of_run(trace, num_ranks, model.topk, scaled, args.lag)
    tokens = routing.tokens(model.topk)
    costs = model.costs(rates[0].cluster, simulate_input.recompute_of(args), routing.pairs)
    chosen = _chosen(args, geometry, config, model, costs)
    costs = chosen.costs
    visited = TokenExchange.RANK if args.token_exchange == _FLEX else costs.tokens.exchange
    geometry = counting_visits(chosen.geometry, visited, model.topk)
    shape = simulate_input.run_shape(args, geometry, tokens, trace)
    simulate_input.can_overlap(args, shape, model)
    shape.layers_by_chunk(len(model.layer_has_experts))  # refuses stages without a layer
    sizes = num_ranks, geometry.node_size, geometry.capacity
    case = Case(*sizes, geometry.sharding.value, config.mode.value, shape.tokens, shape.world)

    def predict(
        methods: Sequence[Method], sets: tuple[Rates, ...], **options: Any
    ) -> list[IterationPrediction]:
        return predict_iterations(
            routing, model, shape, methods, sets, steps=args.steps, lag=args.lag, **options
        )

    methods, results.refused[case] = _methods(
        args,
        geometry,
        costs,
        config.mode,
        model.topk,
        rates[0],
        lambda methods: predict(methods, rates[:1]),
    )
    total = min(args.steps, len(routing.steps())) * routing.layers * shape.microbatches
    with tqdm(desc=case.label, total=total, unit="microbatch", disable=None, leave=False) as bar:
        found = predict(
            methods,
            rates,
            peak_flops_per_s=_peak(args, rates[0]),
            progress=bar.update,
        )
    results.predicted[case] = {prediction.method: prediction for prediction in found}
    results.runs.append(shape)


def _chosen(
    args: argparse.Namespace,
    geometry: Geometry,
    config: FSEPConfig,
    model: ModelShape,
    costs: CostModel,
) -> Candidate:
    """Return the sharding, slots and exchange that training takes."""
    word = args.restore_algorithm
    algorithm = Auto.AUTO if word == Auto.AUTO else ExchangeAlgorithm(word)
    shape = geometry.num_ranks, geometry.num_experts, geometry.node_size
    tokens = max((costs.pairs_per_rank or 0) // model.topk, 1)

    def priced(of: Geometry) -> CostModel:
        sizes = of, model.topk, tokens
        exchange = TokenExchange.NODE
        if args.token_exchange == Auto.AUTO:
            exchange = choose_token_exchange(costs, *sizes)
            if args.overlap:  # which hides nothing of `node` inside nodes
                exchange = TokenExchange.RANK
        elif args.token_exchange != _FLEX:  # whose rows are those of `node`
            exchange = TokenExchange(args.token_exchange)
        return with_token_exchange(costs, exchange, *sizes).with_exchange(algorithm, of)

    chosen, _ = choose_geometry(config, shape, 1, model.topk, priced)
    return chosen


def _methods(
    args: argparse.Namespace,
    geometry: Geometry,
    costs: CostModel,
    mode: PlanMode,
    topk: int,
    nominal: Rates,
    predict: Predict,
) -> tuple[list[Method], dict[str, str]]:
    settings = MethodSettings(
        geometry,
        costs,
        mode,
        args.strategy,
        overlaps=args.scheduler == "on",
        holds_step=args.restore == "step",
        stock_group=args.stock_expert_parallel,
        topk=topk,
        flex=args.token_exchange == _FLEX,
        stock_flex=args.stock_dispatcher == _FLEX,
        combined=args.overlap,
        one_queue=(args.tensor_parallel or 1) > 1,  # for which Megatron asks
    )
    methods, refused = [], {}
    for name in args.method:
        try:
            if name == STOCK:
                limit = _most_bytes(args, nominal.cluster)
                methods.append(fastest_stock(settings, nominal, predict, limit))
            else:
                methods.append(make_method(name, settings, nominal))
        except ValueError as error:
            if name == STOCK and args.stock_expert_parallel is not None:
                raise
            refused[name] = str(error)
    if not methods:
        raise ValueError("; ".join(refused.values()))
    return methods, refused


def _shardings(args: argparse.Namespace, model: ModelShape) -> list[Sharding | Auto]:
    """Return the asked shardings, `auto` as the only one where there is no choice."""
    possible = simulate_input.shardings_of(args, model)
    if lays_out_freely(args.strategy) and (
        Sharding.EXPERTS in args.sharding or Sharding.ROWS not in possible
    ):
        of = "--sharding experts asks for" if Sharding.ROWS in possible else "these flags need"
        raise ValueError(
            f"--strategy {args.strategy}: moves every expert, so it does not run with experts at "
            f"home, which {of}; use another strategy"
        )
    if Sharding.ROWS in possible:
        return [Auto.AUTO if word == Auto.AUTO else Sharding(word) for word in args.sharding]
    if Sharding.ROWS in args.sharding:
        if model.fp8 is not None:
            raise ValueError(ROWS_IN_FP8)
        raise ValueError(_ROWS_SHARDED if model.lora is None else _ROWS_ADAPTED)
    return list(possible)


def _node_size_flag(args: argparse.Namespace, cluster: Cluster) -> str:
    return "--node-size" if args.node_size else f"--node-size is not given, and {cluster.name}'s"


def _most_bytes(args: argparse.Namespace, cluster: Cluster) -> float | None:
    most_gib = simulate_input.most_gib(args, cluster)
    return None if most_gib is None else most_gib * 2**30


def _peak(args: argparse.Namespace, nominal: Rates) -> float:
    return nominal.peak_flops_per_s if args.peak_tflops is None else args.peak_tflops * 1e12


def _print(about: dict[str, Any], results: _Results, text: str) -> None:
    cases, shape = results.predicted, results.runs[0]
    first = next(iter(cases))
    sizes = f"{shape.tokens} tokens per rank and microbatch, {shape.microbatches} microbatches"
    parallel = f"pipeline {shape.stages} x {shape.chunks}, {shape.world} ranks in all"
    if about["memory_gib"] is not None:
        parallel += f" with {about['memory_gib']:g} GiB each"
    print(one_line(f"{about['model']} on {about['cluster']}, {about['trace']}"))
    print(f"{first.label}: {sizes}; {parallel}; recompute {shape.recompute}\n")
    print(output.table_text(cases[first], results.refused[first]), end="\n\n")
    print(output.parts_text(cases[first]), end="\n\n")
    if len(cases) > 1:
        print(output.sweep_text(cases), end="\n\n")
    if about["not_given"]:
        text = f"{one_line(about['not_given'])}\n\n{text}"
    print(output.LEGEND, text, sep="\n\n")


def _write(args: argparse.Namespace, about: dict[str, Any], results: _Results, text: str) -> None:
    cases = results.predicted
    if args.json is not None:
        content = output.content(about, cases, results.refused, text)
        write_output(args.json, json.dumps(content, indent=1) + "\n", "--json")
