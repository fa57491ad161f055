"""The command `simulate` predicts whole iterations of stock EP, FSEP and others on a cluster."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

from tqdm import tqdm

from megatron_laer.choices import (
    Auto,
    ExchangeAlgorithm,
    OverlapScheduler,
    Sharding,
    TokenExchange,
)
from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import one_line
from megatron_laer.files.writing import write_output
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.guard import GUARD_MODES
from megatron_laer.planner.sharding_choice import Candidate, choose_geometry
from megatron_laer.planner.strategies import strategy_names
from megatron_laer.planner.token_exchange import choose_token_exchange, with_token_exchange
from megatron_laer.rules import lays_out_freely
from megatron_laer.tools.cli import simulate_input
from megatron_laer.tools.cli.argument_types import between, describe, option, shared
from megatron_laer.tools.cli.prediction_settings import ROWS_IN_FP8
from megatron_laer.tools.simulator import iteration_output as output
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
from megatron_laer.tools.simulator.iteration_output import Case
from megatron_laer.tools.traces.records import Trace

_MAX_STEPS = 10**5
_FLEX = "flex"
_TOKENS = (*(exchange.value for exchange in TokenExchange), _FLEX, Auto.AUTO.value)

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
        "Time of an iteration of stock EP, FSDP+EP, LAER and FSEP for recorded or made-up "
        "routing, as a range over the cluster's constants, and whether FSEP is worth it.",
        _EXAMPLES,
    )
    simulate_input.add_inputs(parser)
    simulate_input.add_sizes(parser)
    swept = parser.add_argument_group("what is compared; several values are a sweep")
    for flag, default in (
        ("--ranks N", "as in the trace"),
        ("--node-size G", "the cluster's"),
        ("--capacity C", "as in training"),
        ("--tokens T", "as in the trace, a sequence for a workload"),
    ):
        shared(swept, flag, default, nargs="+")
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
    text = "of the trace that are simulated, spread over it; default: %(default)s"
    option(parser, "--steps S", text, between(1, _MAX_STEPS), default=3)
    shared(parser, "--memory-gib X", "the card's less 1")
    shared(parser, "--json FILE")


def run(args: argparse.Namespace) -> int:
    simulate_input.check(args)
    cluster = simulate_input.cluster_of(args)
    model = simulate_input.model_of(args)
    rates = simulate_input.rates_of(model, cluster)
    shardings = _shardings(args, model)
    routing_of = simulate_input.routing_of(args, model)
    # A trace has its ranks; a workload needs --ranks.
    ranks = args.ranks or [routing_of(1, None).num_ranks]
    flag = "--node-size" if args.node_size else f"--node-size is not given, and {cluster.name}'s"
    wanted = [
        (
            resolve_geometry(
                model.num_experts,
                num_ranks,
                capacity,
                node_size,
                sharding=Sharding.ROWS if sharding == Auto.AUTO else Sharding(sharding),
                flags=("--capacity", flag),
            ),
            FSEPConfig(
                planner=args.strategy,
                sharding=sharding,
                capacity=capacity,
                plan_mode=mode,
                restore=args.restore,
                scheduler=OverlapScheduler(args.scheduler),
            ),
        )
        for num_ranks in ranks
        for node_size in args.node_size or [min(cluster.ranks_per_node, num_ranks)]
        for capacity, sharding, mode in product(
            args.capacity or [None], shardings, args.mode or [None]
        )
    ]
    cases = _Cases(args, model, rates)
    made: dict[tuple[int, int | None], Trace] = {}
    for geometry, config in wanted:
        for tokens in args.tokens or [None]:
            key = geometry.num_ranks, None if args.workload is None else tokens
            if key not in made:
                made = {key: routing_of(*key)}  # one at a time, for memory
            cases.predict(geometry, config, tokens, made[key])
    about = {
        "trace": str(args.trace) if args.workload is None else f"workload {args.workload}",
        "model": args.model,
        "cluster": cluster.name,
        "run": asdict(cases.runs[0]),
        "steps": args.steps,
        "memory_gib": cases.most_gib,
        "not_given": output.not_given(cluster),
    }
    sentence = output.advice(cases.predicted, cases.most_gib)
    if args.json is not None:
        content = output.content(about, cases.predicted, cases.refused, sentence)
        write_output(args.json, json.dumps(content, indent=1) + "\n", "--json")
    _print(about, cases, sentence)
    return 0


class _Cases:
    """Predictions of all methods in each case of a sweep, and the reasons of those left out."""

    def __init__(
        self, args: argparse.Namespace, model: ModelShape, rates: tuple[Rates, ...]
    ) -> None:
        self.predicted: dict[Case, dict[str, IterationPrediction]] = {}
        self.refused: dict[Case, dict[str, str]] = {}
        self.runs: list[RunShape] = []
        self.most_gib = simulate_input.most_gib(args, rates[0].cluster)
        self.most_bytes = None if self.most_gib is None else self.most_gib * 2**30
        self._args, self._model, self._rates = args, model, rates

    def predict(
        self, geometry: Geometry, config: FSEPConfig, tokens: int | None, trace: Trace
    ) -> None:
        """Predict a case; a workload's trace has the tokens of the case."""
        args, model, num_ranks = self._args, self._model, geometry.num_ranks
        scaled = tokens if args.workload is None else None
        routing = Routing(trace, num_ranks, model.topk, scaled)
        chosen = self._chosen(geometry, config, routing)
        geometry, costs = chosen.geometry, chosen.costs
        shape = simulate_input.run_shape(args, geometry, routing.tokens(model.topk), trace)
        shape.layers_by_chunk(len(model.layer_has_experts))  # refuses stages without a layer
        sizes = num_ranks, geometry.node_size, geometry.capacity
        case = Case(*sizes, geometry.sharding.value, config.mode.value, shape.tokens, shape.world)
        predict = partial(predict_iterations, routing, model, shape, steps=args.steps)
        settings = MethodSettings(
            geometry,
            costs,
            config.mode,
            args.strategy,
            overlaps=args.scheduler == "on",
            holds_step=args.restore == "step",
            stock_group=args.stock_expert_parallel,
            topk=model.topk,
            flex=args.token_exchange == _FLEX,
            stock_flex=args.stock_dispatcher == _FLEX,
            combined=args.overlap,
            one_queue=(args.tensor_parallel or 1) > 1,  # for which Megatron asks
        )
        nominal = self._rates[:1]
        methods, self.refused[case] = self._methods(
            settings, lambda methods: predict(methods, nominal)
        )
        layers = min(routing.layers, model.moe_layers)
        total = min(args.steps, len(routing.steps())) * layers * shape.microbatches
        bar = tqdm(desc=case.label, total=total, unit="microbatch", disable=None, leave=False)
        with bar:
            found = predict(methods, self._rates, progress=bar.update)
        self.predicted[case] = {prediction.method: prediction for prediction in found}
        self.runs.append(shape)

    def _chosen(self, geometry: Geometry, config: FSEPConfig, routing: Routing) -> Candidate:
        """Return the sharding, slots and prices that training takes."""
        args, topk = self._args, self._model.topk
        recompute = simulate_input.recompute_of(args)
        costs = self._model.costs(self._rates[0].cluster, recompute, routing.pairs)
        word = args.restore_algorithm
        algorithm = Auto.AUTO if word == Auto.AUTO else ExchangeAlgorithm(word)
        tokens = max(round(routing.pairs) // topk, 1)

        def priced(of: Geometry) -> CostModel:
            sizes = of, topk, tokens
            exchange = TokenExchange.NODE
            if args.token_exchange == Auto.AUTO:
                exchange = choose_token_exchange(costs, *sizes)
                if args.overlap:  # which hides nothing of `node` inside nodes
                    exchange = TokenExchange.RANK
            elif args.token_exchange != _FLEX:  # whose rows are those of `node`
                exchange = TokenExchange(args.token_exchange)
            return with_token_exchange(costs, exchange, *sizes).with_exchange(algorithm, of)

        shape = geometry.num_ranks, geometry.num_experts, geometry.node_size
        chosen, _ = choose_geometry(config, shape, 1, topk, priced)
        return chosen

    def _methods(
        self, settings: MethodSettings, predict: Predict
    ) -> tuple[list[Method], dict[str, str]]:
        methods, refused, nominal = [], {}, self._rates[0]
        for name in self._args.method:
            try:
                if name == STOCK:
                    methods.append(fastest_stock(settings, nominal, predict, self.most_bytes))
                else:
                    methods.append(make_method(name, settings, nominal))
            except ValueError as error:
                if name == STOCK and settings.stock_group is not None:
                    raise
                refused[name] = str(error)
        if not methods:
            raise ValueError("; ".join(refused.values()))
        return methods, refused


def _shardings(args: argparse.Namespace, model: ModelShape) -> list[Sharding | Auto]:
    """Return the asked shardings, `auto` as the only one where there is no choice."""
    at_home = model.precision.is_quantised
    if lays_out_freely(args.strategy) and (at_home or Sharding.EXPERTS in args.sharding):
        of = "fp8 needs" if at_home else "--sharding experts asks for"
        raise ValueError(
            f"--strategy {args.strategy}: moves every expert, so it does not run with experts at "
            f"home, which {of}; use another strategy"
        )
    if not at_home:
        return [Auto.AUTO if word == Auto.AUTO else Sharding(word) for word in args.sharding]
    if Sharding.ROWS in args.sharding:
        raise ValueError(ROWS_IN_FP8)
    return [Sharding.EXPERTS]


def _print(about: dict[str, Any], cases: _Cases, sentence: str) -> None:
    predicted, shape = cases.predicted, cases.runs[0]
    first = next(iter(predicted))
    sizes = f"{shape.tokens} tokens per rank and microbatch, {shape.microbatches} microbatches"
    parallel = f"pipeline {shape.stages} x {shape.chunks}, {shape.world} ranks in all"
    if about["memory_gib"] is not None:
        parallel += f" with {about['memory_gib']:g} GiB each"
    print(sentence, end="\n\n")
    if about["not_given"]:
        print(one_line(about["not_given"]), end="\n\n")
    print(one_line(f"{about['model']} on {about['cluster']}, {about['trace']}"))
    print(f"{first.label}: {sizes}; {parallel}; recompute {shape.recompute}\n")
    print(output.table_text(predicted[first], cases.refused[first]), end="\n\n")
    print(output.parts_text(predicted[first]), end="\n\n")
    if len(predicted) > 1:
        print(output.sweep_text(predicted), end="\n\n")
    print(output.LEGEND)
