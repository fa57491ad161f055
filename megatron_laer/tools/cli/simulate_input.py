"""Arguments of `simulate` for its inputs: routing, model, cluster and parallel sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from megatron_laer.choices import PlanMode, Recompute, TokenExchange
from megatron_laer.files import memory
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.tools.cli import routing_input
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    between,
    named,
    option,
    refuse_repeated,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.outputs import bar, check_outputs
from megatron_laer.tools.cli.prediction_settings import DEFAULT_CLUSTER, cluster_by
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.run_files import metrics_beside
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape, read_model
from megatron_laer.tools.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.traces import read_trace
from megatron_laer.tools.traces.paper import PAPERS_MICROBATCHES
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import PAPER, PAPER_FIRST, WorkloadShape, workload_counts

_MAX_COUNT = 2**16
# Options that take several values.
_SWEPT = "--ranks --node-size --capacity --tokens --sharding --mode --method".split()
# Sizes of workloads: layers differ by their seed; 8 steps show the longest pattern. The paper's has
# all layers, since their mean is compared with its own, and two microbatches in a step.
_WORKLOAD_LAYERS, _WORKLOAD_STEPS, WORKLOAD_MICROBATCHES = 4, 8, 8
# Bytes per count of a workload: 8 to make it, 4 to keep it.
_BYTES_PER_COUNT = 12

# Word of --recompute for the module `moe` of Megatron's selective recomputation.
_ALL_BUT_ATTENTION = "moe"

# Part of a card's memory that stays free, for fragments and all that is not counted.
_MARGIN_GIB = 1.0


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add routing, model and cluster."""
    routing_input.add_arguments(parser)
    option(parser, "--model NAME|YAML", "of configs/models, or a file", required=True)
    shared(parser, "--cluster NAME|YAML", f"the recorded, else {DEFAULT_CLUSTER}")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the run's parallel sizes."""
    sizes = parser.add_argument_group("the run")
    for flag, high, text in (
        (
            "--microbatches M",
            _MAX_COUNT,
            f"of an iteration; default: as in the trace, {WORKLOAD_MICROBATCHES} for a workload",
        ),
        ("--pipeline P", _MAX_COUNT, "pipeline stages, each with its own FSEP groups"),
        ("--virtual-pipeline V", _MAX_COUNT, "model chunks of a stage (interleaved schedule)"),
        ("--tensor-parallel T", MOST_RANKS, "ranks that share a sequence in attention"),
        (
            "--world W",
            MOST_RANKS,
            "ranks of a stage, which are several FSEP groups; default: one group's",
        ),
        (
            "--stock-expert-parallel X",
            MAX_EXPERTS,
            "ranks among which stock EP has every expert once; default: the fastest, of a node or "
            "more, or of all that fit the memory",
        ),
    ):
        option(sizes, flag, text, between(1, high))
    text = (
        "how stock sends tokens: a row per expert, or once per node as DeepEP; default: %(default)s"
    )
    option(sizes, "--stock-dispatcher", text, choices=("alltoall", "flex"), default="flex")
    text = "what backward computes again: nothing; all of a layer, token exchanges included; that"
    text = f"{text} but attention (moe); or its compute alone; default: %(default)s"
    choices = [*(word.value for word in Recompute), _ALL_BUT_ATTENTION]
    option(sizes, "--recompute", text, choices=choices, default=Recompute.NONE.value)
    for flag, text in (
        (
            "--overlap",
            "Megatron's combined 1F1B with delayed weight gradients, for stock and FSEP: tokens "
            "travel during another microbatch's compute",
        ),
        (
            "--account-for-embedding",
            "the embedding counts as a layer of the pipeline's first chunk",
        ),
        ("--account-for-loss", "the LM head and loss count as a layer of the last chunk"),
    ):
        sizes.add_argument(flag, action="store_true", help=text)


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Return the cluster of the flag, else of the run that recorded the trace, else the default."""
    beside = None
    if args.cluster is None and args.trace is not None:
        beside = metrics_beside(args.trace)
    return cluster_by(args.cluster, None if beside is None else read_metrics(beside))


def rates_of(model: ModelShape, cluster: Cluster) -> tuple[Rates, ...]:
    cluster.gemm_in(model.precision)  # refuses an unknown speed
    return rate_sets(Rates(cluster, model.bytes_per_element, precision=model.precision))


def model_of(args: argparse.Namespace) -> ModelShape:
    return named("--model", args.model, read_model)


def most_gib(args: argparse.Namespace, cluster: Cluster) -> float | None:
    """Return the limit of a rank's memory: the flag's, else below the card's, if there is one."""
    if args.memory_gib is not None:
        return float(args.memory_gib)
    return None if cluster.card is None else cluster.card.memory_gib - _MARGIN_GIB


def recompute_of(args: argparse.Namespace) -> Recompute:
    """Return the recomputation of layers with experts."""
    return Recompute.FULL if args.recompute == _ALL_BUT_ATTENTION else Recompute(args.recompute)


def check(args: argparse.Namespace) -> None:
    """Refuse contradictory flags, a routing that is missing, and a file that cannot be written."""
    refuse_repeated(args, _SWEPT)
    if args.restore == "step" and args.mode not in (None, [PlanMode.FORECAST.value]):
        raise ValueError(
            f"--restore step keeps layouts over a step, got --mode {' '.join(args.mode)}; give "
            f"--mode {PlanMode.FORECAST}, or leave it out"
        )
    if args.overlap:
        _check_overlap(args)
    for ranks in args.ranks or []:
        if args.world is not None and args.world % ranks != 0:
            raise ValueError(f"--world {args.world} is no multiple of --ranks {ranks}")
    routing_input.check(args, "simulate")
    inputs = yaml_inputs(cluster=("cluster", args.cluster), model=("model", args.model))
    check_outputs({"--json": args.json}, inputs, args.trace)


def _check_overlap(args: argparse.Namespace) -> None:
    """Refuse combined 1F1B where Megatron does, and where it hides nothing."""
    if args.token_exchange == TokenExchange.NODE:
        raise ValueError(
            "--overlap with --token-exchange node: inside a node tokens move with the experts' "
            "compute, which hides none of them; give --token-exchange rank or flex"
        )
    reasons = {
        "--recompute full or moe: give --recompute compute": recompute_of(args) == Recompute.FULL,
        f"--pipeline {args.pipeline} without --virtual-pipeline: give one": (args.pipeline or 1) > 1
        and (args.virtual_pipeline or 1) == 1,
    }
    for why in (why for why, holds in reasons.items() if holds):
        raise ValueError(f"--overlap with {why}, or leave out --overlap")


def routing_of(args: argparse.Namespace, model: ModelShape) -> Callable[[int, int | None], Trace]:
    """Return a function that returns the trace for a number of ranks and a workload's tokens."""
    if args.workload is None:
        trace = read_trace(args.trace, num_experts=model.num_experts)
        return lambda ranks, tokens: trace
    return lambda ranks, tokens: workload(model, args.workload, ranks, tokens)


def workload(model: ModelShape, name: str, ranks: int, tokens: int | None) -> Trace:
    """Make a workload's trace of some steps and layers."""
    layers, microbatches = min(_WORKLOAD_LAYERS, model.moe_layers), 1
    if name in (PAPER, PAPER_FIRST):
        layers, microbatches = model.moe_layers, PAPERS_MICROBATCHES
    shape = WorkloadShape(ranks, model.num_experts, model.topk, tokens or model.sequence)
    memory.check_enough(
        _BYTES_PER_COUNT * _WORKLOAD_STEPS * layers * microbatches * ranks * model.num_experts,
        f"{_WORKLOAD_STEPS} steps of {ranks} ranks and {model.num_experts} experts",
        "give fewer --ranks",
    )
    axes = np.indices((_WORKLOAD_STEPS, layers, microbatches), dtype=np.int64)
    step_R, layer_R, microbatch_R = (axis.reshape(-1) for axis in axes)
    drawn_R = step_R * microbatches + microbatch_R
    counts_RNE = np.stack(
        [
            workload_counts(name, shape, int(drawn_R[record]), seed=int(layer_R[record]))
            for record in bar("drawing", leave=False)(range(len(drawn_R)))
        ]
    )
    names = tuple(f"layer {layer + 1}" for layer in range(layers))
    return Trace(names, step_R, layer_R, microbatch_R, counts_RNE.astype(np.int32))


def run_shape(args: argparse.Namespace, geometry: Geometry, tokens: int, trace: Trace) -> RunShape:
    """Return the shape; `trace` has the number of microbatches, unless a workload is asked."""
    ranks = geometry.num_ranks
    if args.microbatches is not None:
        microbatches = args.microbatches
    elif args.workload is not None:
        microbatches = WORKLOAD_MICROBATCHES
    else:
        microbatches = int(trace.microbatch_R.max()) + 1
    replicas, left = divmod(args.world or ranks, ranks)
    if left:
        raise ValueError(f"--world {args.world} is no multiple of the trace's {ranks} ranks")
    return RunShape(
        ranks=ranks,
        node_size=geometry.node_size,
        tokens=tokens,
        microbatches=microbatches,
        stages=args.pipeline or 1,
        chunks=args.virtual_pipeline or 1,
        replicas=replicas,
        tensor=args.tensor_parallel or 1,
        recompute=recompute_of(args),
        attention_again=args.recompute != _ALL_BUT_ATTENTION,
        embedding_counts=args.account_for_embedding,
        loss_counts=args.account_for_loss,
    )
