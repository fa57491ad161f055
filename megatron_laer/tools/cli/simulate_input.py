"""Arguments of `simulate` for its inputs: routing, model, cluster and parallel sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_laer.choices import PlanMode, Recompute, Sharding, TokenExchange
from megatron_laer.files import memory
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.tools.cli import fp8_flags, routing_input
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    between,
    named,
    number,
    option,
    refuse_repeated,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.outputs import bar, check_outputs
from megatron_laer.tools.cli.prediction_settings import DEFAULT_CLUSTER, recording_of
from megatron_laer.tools.model_flags import MAX_WIDTH
from megatron_laer.tools.report.run_files import metrics_beside
from megatron_laer.tools.simulator.iteration.model_shape import (
    LORA_TARGETS,
    Lora,
    ModelShape,
    read_model,
)
from megatron_laer.tools.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.traces.paper import PAPERS_MICROBATCHES
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import PAPER, PAPER_FIRST, WorkloadShape, workload_counts

_MAX_COUNT = 2**16
# Options that take several values.
_SWEPT = "--ranks --node-size --capacity --tokens --sharding --mode --method".split()
# Sizes of workloads: layers differ by their seed; 8 steps show the longest pattern. The paper's has
# all layers, since their mean is compared with its own, and two microbatches in a step.
_WORKLOAD_LAYERS, _WORKLOAD_STEPS, _WORKLOAD_MICROBATCHES = 4, 8, 8
# Bytes per count of a workload: 8 to make it, 4 to keep it.
_BYTES_PER_COUNT = 12

# Word of --recompute for the module `moe` of Megatron's selective recomputation.
_ALL_BUT_ATTENTION = "moe"

# Part of a card's memory that stays free, for fragments and all that is not counted.
_MARGIN_GIB = 1.0

# Megatron-FSDP's strategies with which FSEP trains.
STRATEGIES = ("optim", "optim_grads", "optim_grads_params")

# Returns the routing of a number of ranks.
TraceOf = Callable[[int], Trace]


def add_arguments(parser: argparse.ArgumentParser, *, groups: bool = True) -> None:
    """Add the arguments, with those of a stage's groups unless they are the question."""
    routing_input.add_arguments(parser)
    option(parser, "--model NAME|YAML", "of configs/models, or a file", required=True)
    shared(parser, "--cluster NAME|YAML", f"the recorded, else {DEFAULT_CLUSTER}")
    sizes = parser.add_argument_group("the run")
    for flag, high, text in (
        (
            "--microbatches M",
            _MAX_COUNT,
            f"of an iteration; default: as in the trace, {_WORKLOAD_MICROBATCHES} for a workload",
        ),
        ("--pipeline P", _MAX_COUNT, "pipeline stages, each with its own FSEP groups"),
        ("--virtual-pipeline V", _MAX_COUNT, "model chunks of a stage (interleaved schedule)"),
        ("--tensor-parallel T", MOST_RANKS, "ranks that share a sequence in attention"),
    ):
        option(sizes, flag, text, between(1, high))
    if groups:
        _add_groups(sizes)
    text = (
        "how stock sends tokens: a row per expert, or once per node as DeepEP; default: %(default)s"
    )
    option(sizes, "--stock-dispatcher", text, choices=("alltoall", "flex"), default="flex")
    text = "what backward computes again: nothing; all of a layer, token exchanges included; that"
    text = f"{text} but attention (moe); or its compute alone; default: %(default)s"
    choices = [*(word.value for word in Recompute), _ALL_BUT_ATTENTION]
    option(sizes, "--recompute", text, choices=choices, default=Recompute.NONE.value)
    fp8_flags.add_arguments(sizes)
    text = "Megatron-FSDP's, of dense layers"
    option(sizes, "--data-parallel-sharding-strategy", text, choices=STRATEGIES)
    text = "rank q of Megatron-Bridge's LoRA, with all else frozen; default: all is trained"
    option(sizes, "--lora-rank Q", text, between(1, MAX_WIDTH))
    text = "linear layers that it adapts, each expert's by itself; default: all four"
    option(sizes, "--lora-targets NAME", text, nargs="+", choices=LORA_TARGETS)
    text = "once per iteration, as of the data loader; default: none"
    option(sizes, "--host-gap-ms X", text, number(0.0, 1e9), default=0.0)
    shared(parser, "--hours X", "never")
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
        ("--no-distributed-optimizer", "optimizer states are not sharded"),
        (
            "--no-data-parallel-overlap",
            "gradients of dense layers are exchanged after the last backward",
        ),
    ):
        sizes.add_argument(flag, action="store_true", help=text)


def _add_groups(sizes: argparse._ArgumentGroup) -> None:
    text = "ranks of a stage, which are several FSEP groups; default: one group's"
    option(sizes, "--world W", text, between(1, MOST_RANKS))
    text = (
        "ranks among which stock EP has every expert once; default: the fastest, of a node or "
        "more, or of all that fit the memory"
    )
    option(sizes, "--stock-expert-parallel X", text, between(1, MAX_EXPERTS))


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Return the cluster of the flag, else of the run that recorded the trace, else the default."""
    if args.cluster is None and args.trace is not None:
        recording = recording_of(metrics_beside(args.trace))
        if recording is not None and recording.clusters:
            return recording.clusters[-1]
    return named("--cluster", args.cluster or DEFAULT_CLUSTER, load_cluster)


def rates_of(args: argparse.Namespace, model: ModelShape, cluster: Cluster) -> tuple[Rates, ...]:
    rates = Rates(cluster, model.bytes_per_element, args.host_gap_ms / 1e3)
    cluster.gemm_in(model.precision)  # refuses an unknown speed
    return rate_sets(replace(rates, precision=model.precision))


def model_of(args: argparse.Namespace) -> ModelShape:
    """Return the model, with fp8 and LoRA of the flags if they are given."""
    model = named("--model", args.model, read_model)
    lora = _lora(args, model)
    return replace(model, precision=fp8_flags.given_precision(args, model.precision), lora=lora)


def most_gib(args: argparse.Namespace, cluster: Cluster) -> float | None:
    """Return the limit of a rank's memory: the flag's, else below the card's, if there is one."""
    if args.memory_gib is not None:
        return float(args.memory_gib)
    return None if cluster.card is None else cluster.card.memory_gib - _MARGIN_GIB


def recompute_of(args: argparse.Namespace) -> Recompute:
    """Return the recomputation of layers with experts."""
    return Recompute.FULL if args.recompute == _ALL_BUT_ATTENTION else Recompute(args.recompute)


def _lora(args: argparse.Namespace, model: ModelShape) -> Lora | None:
    refuse_repeated(args, ["--lora-targets"])
    if args.lora_rank is not None:
        if args.lora_rank > model.hidden:
            raise ValueError(
                f"--lora-rank {args.lora_rank}: is above the model's hidden size, {model.hidden}; "
                "give a smaller one"
            )
        return Lora(args.lora_rank, tuple(args.lora_targets or LORA_TARGETS))
    if args.lora_targets is not None:
        raise ValueError(
            f"--lora-targets {' '.join(args.lora_targets)}: no effect without --lora-rank; give "
            "one, or leave them out"
        )
    return None


def shardings_of(
    args: argparse.Namespace, model: ModelShape, *, trains: bool = True
) -> list[Sharding]:
    """Return the shardings that can be simulated; some settings need experts at home.

    With `trains` False only methods of comparison are, whose dense layers any strategy shards.
    """
    strategy = args.data_parallel_sharding_strategy
    if model.lora is not None and (strategy is not None or model.precision.is_quantised):
        other = (
            "--fp8-format" if strategy is None else f"--data-parallel-sharding-strategy {strategy}"
        )
        raise ValueError(
            f"--lora-rank {model.lora.rank} with {other}: no test proves adapters with it; leave "
            "out one of them"
        )
    if strategy is not None and model.precision.is_quantised:
        raise ValueError(
            f"--data-parallel-sharding-strategy {strategy}: FSEP has no Megatron-FSDP in fp8; "
            "leave out one of them"
        )
    at_home = model.precision.is_quantised or model.expert_adapters > 0
    at_home |= strategy is not None and trains
    return [Sharding.EXPERTS] if at_home else list(Sharding)


def can_overlap(args: argparse.Namespace, shape: RunShape, model: ModelShape) -> bool:
    """Return if a run may have combined 1F1B; refuse `--overlap` if it may not."""
    reasons = {
        "--lora-rank on experts: give --lora-targets of attention alone": model.expert_adapters > 0,
        "--recompute full or moe: give --recompute compute": shape.recompute == Recompute.FULL,
        f"--pipeline {shape.stages} without --virtual-pipeline: give one": shape.synchronises,
        "--data-parallel-sharding-strategy: leave it out": shape.dense_sharding is not None,
    }
    for why in (why for why, holds in reasons.items() if holds and args.overlap):
        raise ValueError(f"--overlap with {why}, or leave out --overlap")
    return not any(reasons.values())


def check(args: argparse.Namespace) -> None:
    """Refuse contradictory flags, a routing that is missing, and a file that cannot be written."""
    refuse_repeated(args, _SWEPT)
    if args.restore == "step" and args.mode not in (None, [PlanMode.FORECAST.value]):
        raise ValueError(
            f"--restore step keeps layouts over a step, got --mode {' '.join(args.mode)}; give "
            f"--mode {PlanMode.FORECAST}, or leave it out"
        )
    if args.overlap and args.token_exchange == TokenExchange.NODE:
        raise ValueError(
            "--overlap with --token-exchange node: inside a node tokens move with the experts' "
            "compute, which hides none of them; give --token-exchange rank or flex"
        )
    for ranks in args.ranks or []:
        if args.world is not None and args.world % ranks != 0:
            raise ValueError(f"--world {args.world} is no multiple of --ranks {ranks}")
    routing_input.check(args, "simulate")
    inputs = yaml_inputs(cluster=("cluster", args.cluster), model=("model", args.model))
    check_outputs({"--json": args.json}, inputs, args.trace)


def routing_of(args: argparse.Namespace, model: ModelShape) -> Callable[[int, int | None], Trace]:
    """Return a function that returns the trace for a number of ranks and a workload's tokens."""
    if args.workload is None:
        trace = routing_input.read(args, model.num_experts)
        return lambda ranks, tokens: trace
    return lambda ranks, tokens: workload(args, model, args.workload, ranks, tokens)


def workload(
    args: argparse.Namespace, model: ModelShape, name: str, ranks: int, tokens: int | None
) -> Trace:
    """Make a workload's trace of some steps and layers."""
    steps, layers, microbatches = workload_sizes(args, model, name)
    shape = WorkloadShape(ranks, model.num_experts, model.topk, tokens or model.sequence)
    memory.check_enough(
        _BYTES_PER_COUNT * steps * layers * microbatches * ranks * model.num_experts,
        f"{steps} steps of {ranks} ranks and {model.num_experts} experts",
        "give fewer --ranks, or a smaller --lag",
    )
    axes = np.indices((steps, layers, microbatches), dtype=np.int64)
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


def workload_sizes(args: argparse.Namespace, model: ModelShape, name: str) -> tuple[int, int, int]:
    """Return steps, layers and microbatches of a step that a workload's trace has."""
    steps = max(_WORKLOAD_STEPS, args.lag + 1)
    if name in (PAPER, PAPER_FIRST):
        return steps, model.moe_layers, PAPERS_MICROBATCHES
    return steps, min(_WORKLOAD_LAYERS, model.moe_layers), 1


def run_shape(
    args: argparse.Namespace, geometry: Geometry, tokens: int, trace: Trace | None
) -> RunShape:
    """Return the shape; `trace` has the number of microbatches, unless a workload is asked."""
    ranks = geometry.num_ranks
    if args.microbatches is not None:
        microbatches = args.microbatches
    elif trace is None or args.workload is not None:
        microbatches = _WORKLOAD_MICROBATCHES
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
        shards_optimizer=not args.no_distributed_optimizer,
        overlaps_data_parallel=not args.no_data_parallel_overlap,
        dense_sharding=args.data_parallel_sharding_strategy,
    )
