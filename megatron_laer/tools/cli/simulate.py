"""The command `simulate` predicts whole iterations of stock EP and FSEP on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from megatron_laer.choices import Auto, Dispatch, Recompute, Restore, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import one_line
from megatron_laer.life import Kind, kinds_of
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.planner.sharding_choice import Candidate, choose_geometry
from megatron_laer.tools.cli import prediction_input
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    add_force,
    between,
    option,
    refuse_repeated,
    shared,
)
from megatron_laer.tools.cli.outputs import write_json
from megatron_laer.tools.cli.prediction_input import ROWS_IN_FP8
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.cli.progress import bar
from megatron_laer.tools.simulator import output
from megatron_laer.tools.simulator.iteration.methods import METHODS, STOCK, MethodSettings
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.predict import (
    IterationPrediction,
    fastest_stock,
    predict_iterations,
)
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.replay import Routing
from megatron_laer.tools.simulator.run_settings import priced
from megatron_laer.tools.traces import read_trace

_MAX_COUNT, _MAX_STEPS = 2**16, 10**5
_AUTO = Auto.AUTO.value
# Word of --recompute for the module `moe` of Megatron's selective recomputation.
_ALL_BUT_ATTENTION = "moe"
_STOCK_DISPATCHERS = ("alltoall", Dispatch.FLEX.value)

_EXAMPLES = """\
examples:
  %(prog)s traces/group-0.trace --model tiny-moe --cluster cpu-gloo
  %(prog)s traces --model my-model.yaml --cluster my-cluster.yaml --ranks 64 --json x.json
  %(prog)s --workload W1 --model mixtral-8x7b-e8k2 --ranks 32 --capacity 3
  %(prog)s --workload W6 --model mixtral-8x7b-e8k2 --ranks 8 --pipeline 4 --virtual-pipeline 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Time of an iteration of stock EP and FSEP for recorded or made-up routing, as a range "
        "over the cluster's constants, and whether FSEP is worth it.",
        _EXAMPLES,
    )
    prediction_input.add_inputs(parser)
    run = parser.add_argument_group("the run")
    shared(run, "--ranks N", "as in the trace")
    shared(run, "--node-size G", "the cluster's")
    shared(run, "--tokens T", "as in the trace, a sequence for a workload")
    usual = prediction_input.WORKLOAD_MICROBATCHES
    microbatches = f"of an iteration; default: as in the trace, {usual} for a workload"
    for flag, high, default, text in (
        ("--microbatches M", _MAX_COUNT, None, microbatches),
        ("--pipeline P", _MAX_COUNT, 1, "pipeline stages, each with its own FSEP groups"),
        ("--virtual-pipeline V", _MAX_COUNT, 1, "model chunks of a stage (interleaved schedule)"),
        ("--tensor-parallel T", MOST_RANKS, 1, "ranks that share a sequence in attention"),
        ("--world W", MOST_RANKS, None, "ranks of a stage; default: those of one FSEP group"),
        ("--stock-expert-parallel X", MAX_EXPERTS, None, "of stock; default: the fastest group"),
    ):
        option(run, flag, text, between(1, high), default=default)
    for flag, text in (
        ("--overlap", "Megatron's combined 1F1B with delayed weight gradients"),
        ("--account-for-embedding", "as a layer of the pipeline's first chunk"),
        ("--account-for-loss", "with the LM head, as a layer of the last chunk"),
    ):
        run.add_argument(flag, action="store_true", help=text)
    again = (
        "what backward computes again; moe: layers without attention; compute: no exchanges; auto: "
        "none, and full if memory is too small without"
    )
    ours = parser.add_argument_group("FSEP")
    shared(ours, "--capacity C", "as in training")
    sent = "how stock sends tokens: a row per expert, once per node, or the faster of them"
    for group, flag, words, word, text in (
        (run, "--recompute", [*Recompute, _ALL_BUT_ATTENTION, _AUTO], _AUTO, again),
        (run, "--stock-dispatcher", [*_STOCK_DISPATCHERS, _AUTO], _AUTO, sent),
        (ours, "--sharding", [*Sharding, _AUTO], _AUTO, "experts at home, or rows on every rank"),
        (ours, "--token-exchange", [*Dispatch, _AUTO], _AUTO, "flex: DeepEP's"),
        (ours, "--restore", [*Restore], Restore.LAYER.value, "as in training"),
    ):
        text = f"{text}; default: %(default)s"
        option(group, flag, text, choices=[*map(str, words)], default=word)
    text = f"of {', '.join(METHODS)}; default: all"
    option(parser, "--method", text, nargs="+", choices=METHODS, default=list(METHODS))
    text = "of the trace that are simulated, spread over it; default: %(default)s"
    option(parser, "--steps S", text, between(1, _MAX_STEPS), default=3)
    shared(parser, "--memory-gib X", "the card's less 1")
    shared(parser, "--json FILE")
    add_force(parser)


def run(args: argparse.Namespace) -> int:
    refuse_repeated(args, ["--method"])
    if args.overlap and args.token_exchange == Dispatch.NODE:
        raise ValueError(
            "--overlap with --token-exchange node: inside a node tokens move with the experts' "
            "compute, which hides none of them; give --token-exchange rank or flex"
        )
    cluster, model, most_gib = prediction_input.read_inputs(args, "simulate")
    rates = prediction_input.rates_of(model, cluster)
    at_home = model.precision.is_quantised
    if at_home and args.sharding == Sharding.ROWS:
        raise ValueError(ROWS_IN_FP8)
    sharding = Sharding.EXPERTS if at_home else args.sharding
    if args.workload is None:
        trace = read_trace(args.trace, num_experts=model.num_experts)
    else:
        trace = prediction_input.workload(model, args.workload, args.ranks, args.tokens)
    num_ranks = args.ranks or trace.num_ranks
    flag = "--node-size" if args.node_size else f"--node-size is not given, and {cluster.name}'s"
    asked = resolve_geometry(
        model.num_experts,
        num_ranks,
        args.capacity,
        args.node_size or min(cluster.ranks_per_node, num_ranks),
        sharding=Sharding.ROWS if sharding == Auto.AUTO else Sharding(sharding),
        flags=("--capacity", flag),
    )
    config = FSEPConfig(sharding=sharding, capacity=args.capacity, restore=args.restore)
    scaled = args.tokens if args.workload is None else None
    routing = Routing(trace, num_ranks, model.topk, scaled)
    most_bytes = None if most_gib is None else most_gib * 2**30
    for recompute, attention_again in _recomputes(args):
        chosen = _chosen(args, model, rates[0], config, asked, routing, recompute)
        geometry, recorded = chosen.geometry, int(trace.microbatch_R.max()) + 1
        shape = replace(
            _run_shape(args, model, geometry, routing.tokens(model.topk), recorded),
            recompute=recompute,
            attention_again=attention_again,
        )
        _check_overlap(args, shape)
        predicted = _predicted(args, model, chosen, config, shape, routing, rates, most_bytes)
        if most_bytes is None or all(of.peak_bytes <= most_bytes for of in predicted.values()):
            break
    dispatch = chosen.costs.tokens.dispatch
    label = output.setting_label(geometry, dispatch, config.restore, combined=args.overlap)
    is_full = shape.recompute == Recompute.FULL
    label += ", full recompute" * is_full

    over_nodes = geometry.num_nodes > 1
    sentence = output.advice(
        label, predicted, most_gib, leaves_nodes=over_nodes, can_recompute=not is_full
    )
    source = str(args.trace) if args.workload is None else f"workload {args.workload}"
    about = {
        "trace": source,
        "model": args.model,
        "cluster": cluster.name,
        "run": asdict(shape) | {"world": shape.world},
        "capacity": geometry.capacity,
        "sharding": geometry.sharding,
        "mode": config.mode,
        "steps": args.steps,
        "memory_gib": most_gib,
        "not_given": output.not_given(cluster),
        "advice": sentence,
        "methods": {name: output.content(of) for name, of in predicted.items()},
    }
    write_json(args.json, about)
    limit = "" if most_gib is None else f" with {most_gib:g} GiB each"
    title = (
        f"{args.model} on {cluster.name}, {source}: {label}, {config.mode}; {num_ranks} ranks in "
        f"nodes of {geometry.node_size}, {shape.tokens} tokens per rank and microbatch, "
        f"{shape.microbatches} microbatches; pipeline {shape.stages} x {shape.chunks}, "
        f"{shape.world} ranks in all{limit}; recompute {shape.recompute}"
    )
    parts = [
        output.filled(sentence),
        *filter(None, [output.filled(one_line(output.not_given(cluster)))]),
        output.filled(one_line(title)),
        output.methods_text(predicted),
        output.parts_text(predicted),
        output.LEGEND,
    ]
    print("\n\n".join(parts))
    return 0


def _recomputes(args: argparse.Namespace) -> list[tuple[Recompute, bool]]:
    """Return recomputations of layers with experts, tried until memory suffices.

    Each has whether attention is computed again.
    """
    if args.recompute == _AUTO:
        again = [Recompute.NONE] if args.overlap else [Recompute.NONE, Recompute.FULL]
        return [(recompute, True) for recompute in again]
    if args.recompute == _ALL_BUT_ATTENTION:
        return [(Recompute.FULL, False)]
    return [(Recompute(args.recompute), True)]


def _predicted(
    args: argparse.Namespace,
    model: ModelShape,
    chosen: Candidate,
    config: FSEPConfig,
    shape: RunShape,
    routing: Routing,
    rates: Sequence[Rates],
    most_bytes: float | None,
) -> dict[str, IterationPrediction]:
    """Predict iterations of each method, by name."""
    predict = partial(predict_iterations, routing, model, shape, steps=args.steps)
    progress = bar("simulating", total=args.steps, unit="step", leave=False)
    of_groups = bar("comparing groups of stock", total=args.steps, unit="step", leave=False)
    shortly = partial(predict, progress=of_groups, most=0)
    settings = MethodSettings(
        chosen.geometry,
        chosen.costs,
        config,
        stock_group=args.stock_expert_parallel,
        topk=model.topk,
        combined=args.overlap,
    )
    given = args.stock_dispatcher
    flex = (False, True) if given == _AUTO else (given == Dispatch.FLEX,)
    methods = [
        fastest_stock(settings, rates[0], shortly, most_bytes, flex)
        if name == STOCK
        else METHODS[name](settings, rates[0])
        for name in args.method
    ]
    found = predict(methods, rates, progress=progress)
    return {prediction.method: prediction for prediction in found}


def _chosen(
    args: argparse.Namespace,
    model: ModelShape,
    rates: Rates,
    config: FSEPConfig,
    asked: Geometry,
    routing: Routing,
    recompute: Recompute,
) -> Candidate:
    """Return the sharding, slots and prices that training takes."""
    costs = model.costs(rates.cluster, recompute, routing.pairs)
    layers = len(model.layer_has_experts) * (2 if args.overlap and args.pipeline == 1 else 1)
    kinds = config.kinds | kinds_of({Kind.PARTS: args.overlap})
    costs = replace(costs, layers=layers, sharers=args.tensor_parallel, kinds=kinds)
    dispatch: Dispatch | Auto = Auto.AUTO
    if args.token_exchange != Auto.AUTO:
        dispatch = Dispatch(args.token_exchange)
    elif args.overlap:  # which hides nothing of `node` inside nodes
        dispatch = Dispatch.RANK
    tokens = max(round(routing.pairs) // model.topk, 1)

    def priced_for(geometry: Geometry) -> CostModel:
        return priced(costs, (geometry, model.topk, tokens), dispatch, Auto.AUTO)

    shape = asked.num_ranks, asked.num_experts, asked.node_size
    chosen, _ = choose_geometry(config, shape, 1, model.topk, priced_for)
    return chosen


def _run_shape(
    args: argparse.Namespace,
    model: ModelShape,
    geometry: Geometry,
    tokens: int,
    recorded_microbatches: int,
) -> RunShape:
    ranks, usual = geometry.num_ranks, recorded_microbatches
    if args.workload is not None:
        usual = prediction_input.WORKLOAD_MICROBATCHES
    replicas, left = divmod(args.world or ranks, ranks)
    if left:
        of = f"the trace's {ranks} ranks" if args.ranks is None else f"--ranks {ranks}"
        raise ValueError(f"--world {args.world} is no multiple of {of}")
    shape = RunShape(
        ranks=ranks,
        node_size=geometry.node_size,
        tokens=tokens,
        microbatches=args.microbatches or usual,
        stages=args.pipeline,
        chunks=args.virtual_pipeline,
        replicas=replicas,
        tensor=args.tensor_parallel,
        embedding_counts=args.account_for_embedding,
        loss_counts=args.account_for_loss,
    )
    shape.layers_by_chunk(len(model.layer_has_experts))  # refuses stages without a layer
    model.check_tensor(shape.tensor, "--tensor-parallel")
    return shape


def _check_overlap(args: argparse.Namespace, shape: RunShape) -> None:
    if args.overlap and not shape.can_overlap:
        raise ValueError(
            "--overlap: not with --recompute full or moe, nor with --pipeline without "
            "--virtual-pipeline; leave one out, or give --recompute compute"
        )
