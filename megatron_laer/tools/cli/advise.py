"""The command `advise` finds the fastest settings of FSEP for a run, or says to take stock."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_laer.choices import Dispatch, Recompute, Sharding, Unproven
from megatron_laer.config import flag_name
from megatron_laer.files.checks import one_line
from megatron_laer.planner.clusters import Cluster
from megatron_laer.rules import sharding_for
from megatron_laer.tools.cli import prediction_input, run_flags
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    add_force,
    between,
    option,
    shared,
)
from megatron_laer.tools.cli.megatron_flags import parsed
from megatron_laer.tools.cli.outputs import write_json
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.cli.progress import bar
from megatron_laer.tools.recipes.command_lines import script_flags
from megatron_laer.tools.simulator.advisor import output
from megatron_laer.tools.simulator.advisor.predictor import Predictor, Run, Variant
from megatron_laer.tools.simulator.advisor.search import search
from megatron_laer.tools.simulator.advisor.settings import group_flags, group_sizes
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.replay import Routing
from megatron_laer.tools.traces import read_trace
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import NATURAL

_EXAMPLES = """\
examples:
  %(prog)s --model qwen3-30b-a3b --cluster h100-8 --gpus 64
  %(prog)s traces/group-0.trace --model my-model.yaml --cluster my-cluster.yaml --gpus 64
  %(prog)s --model qwen3-235b-a22b --cluster h100-8 --gpus 256 -- --seq-length 4096 \\
      --tensor-model-parallel-size 2 --pipeline-model-parallel-size 8 --micro-batch-size 1 \\
      --global-batch-size 1024 --num-layers-per-virtual-pipeline-stage 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Size of the FSEP group, sharding, slots and exchanges with the shortest predicted "
        "iteration that fits in memory, next to the fastest stock, and Megatron's flags for them. "
        "Megatron's flags after -- give the shape of the run.",
        _EXAMPLES,
    )
    prediction_input.add_inputs(parser)
    option(parser, "--gpus N", "of the whole run", between(2, MOST_RANKS), required=True)
    shared(parser, "--memory-gib X", "the card's less 1")
    shared(parser, "--json FILE")
    add_force(parser)
    parser.set_defaults(ranks=None)


def run(args: argparse.Namespace) -> int:
    if args.trace is None and args.workload is None:
        args.workload = NATURAL
    args.ranks = args.gpus  # a workload has the ranks of each group
    cluster, model, most_gib = prediction_input.read_inputs(args, "advise on")
    if most_gib is None:
        raise ValueError(f"--cluster {cluster.name} has no card; give --memory-gib")
    words = script_flags(args.flags)
    settings = parsed(words) if words else Namespace(**run_flags.DEFAULTS)
    model = run_flags.model_with(settings, model)
    asked, balanced = _runs(args, cluster, model, settings, most_gib)
    predictor = Predictor(asked)
    results = search(
        predictor, Predictor(balanced), lambda title, items: bar(title, leave=False)(items)
    )
    shape = asked.shape
    recompute = ", or ".join(
        [shape.recompute, *["full where that does not fit"] * (len(asked.variants) > 1)]
    )
    routing = f"workload {args.workload}" if args.trace is None else str(args.trace)
    title = (
        f"{args.model} on {args.gpus} GPUs of {cluster.name}, {routing}: {shape.tokens} tokens per "
        f"rank and microbatch, {shape.microbatches} microbatches; tensor {shape.tensor}, pipeline "
        f"{shape.stages} x {shape.chunks}; recompute {recompute}"
    )
    write_json(args.json, {"title": title} | output.content(asked, results))
    print(output.text(one_line(title), asked, results))
    return 0 if results.best.found or results.stocks.found else 1  # nothing fits


def _allowed(args: argparse.Namespace, asked: Run, words: Sequence[str]) -> tuple[Unproven, ...]:
    """Return what the flags need of `--fsep-allow-unproven`; refuse them as training does."""
    whole = [size for size in asked.sizes if size > 1 and not asked.model.num_experts % size]
    group = group_flags(max(whole or asked.sizes), "alltoall")
    if Sharding.ROWS not in asked.shardings:
        group += [flag_name("sharding"), Sharding.EXPERTS.value]
    return run_flags.allowed(args.model, [*words, *group], args.gpus)


def _takes(args: argparse.Namespace, asked: Run, words: Sequence[str]) -> bool:
    """Return True if training takes these flags next to the given ones."""
    try:
        _allowed(args, asked, [*script_flags(args.flags), *words])
    except ValueError:
        return False
    return True


def _with_open_flags(args: argparse.Namespace, settings: Namespace, asked: Run) -> Run:
    """Return the run with what flags leave open: a sharded optimizer, and recompute."""
    given = asked.as_given
    assumed = given.flags
    if args.flags:
        assumed = tuple(flag for flag in run_flags.ASSUMED if not getattr(settings, _name(flag)))
        if not _takes(args, asked, assumed):
            assumed = ()
    shape = given.shape
    if assumed:
        shape = replace(shape, shards_optimizer=True, overlaps_data_parallel=True)
    variants = [Variant(shape, assumed, given.overlaps)]
    again = (*assumed, *run_flags.RECOMPUTE)
    is_open = settings.recompute_granularity is None and given.overlaps != (True,)
    if is_open and (not args.flags or _takes(args, asked, again)):
        shape = replace(shape, recompute=Recompute.FULL, attention_again=True)
        variants.append(Variant(shape, again, (False,)))
    return replace(asked, variants=tuple(variants))


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _runs(
    args: argparse.Namespace,
    cluster: Cluster,
    model: ModelShape,
    settings: Namespace,
    most_gib: float,
) -> tuple[Run, Run]:
    """Return the run, and the same with perfectly balanced counts."""
    trace = None
    tokens, microbatches = model.sequence, prediction_input.WORKLOAD_MICROBATCHES
    if args.workload is None:
        trace = read_trace(args.trace, num_experts=model.num_experts)
        tokens = Routing(trace, trace.num_ranks, model.topk).tokens(model.topk)
        microbatches = int(trace.microbatch_R.max()) + 1
    shape = run_flags.run_shape(settings, args.gpus, model, tokens, microbatches)
    sizes = group_sizes(shape.ranks, cluster.ranks_per_node, shape.tensor)
    if trace is not None:
        sizes = [size for size in sizes if trace.divides(size)]
        if max(sizes, default=1) < 2:
            trace.check_divides(shape.ranks)
    if max(sizes, default=1) < 2:
        raise ValueError(
            f"--gpus {args.gpus}: a stage of {shape.ranks} ranks has no group that fills nodes of "
            f"{cluster.ranks_per_node} or divides one; give another number"
        )
    dispatches = [Dispatch.RANK]
    if not settings.moe_permute_fusion:  # training refuses both
        dispatches.append(Dispatch.NODE)
    gives_flex = settings.moe_token_dispatcher_type == "flex"
    if gives_flex or not settings.gives_dispatcher:
        dispatches.append(Dispatch.FLEX)
    at_home = model.precision.is_quantised
    if args.flags:
        at_home |= sharding_for(settings)[0] == Sharding.EXPERTS
    flags = () if args.flags else run_flags.ASSUMED
    as_given = Variant(shape, flags, run_flags.overlaps(settings, shape))
    asked = Run(
        model=model,
        as_given=as_given,
        gives_flex=gives_flex,
        variants=(as_given,),
        sizes=tuple(sizes),
        node_size=min(cluster.ranks_per_node, max(sizes)),
        rates=prediction_input.rates_of(model, cluster),
        trace_of=_trace_of(model, args.workload, shape.tokens, trace),
        tokens=None if trace is None else shape.tokens,
        most_bytes=most_gib * 2**30,
        dispatches=tuple(dispatches),
        flex_backend=settings.moe_flex_dispatcher_backend,
        shardings=(Sharding.EXPERTS,) if at_home else tuple(Sharding),
        allow=(Unproven.FP8_EXPERTS,) if model.precision.is_quantised else (),
    )
    if args.flags:
        asked = replace(asked, allow=_allowed(args, asked, script_flags(args.flags)))
    asked = _with_open_flags(args, settings, asked)
    even = _trace_of(model, "W0", shape.tokens, None)
    return asked, replace(asked, trace_of=even, tokens=None)


def _trace_of(
    model: ModelShape, workload: str, tokens: int, trace: Trace | None
) -> Callable[[int], Trace]:
    """Return a function of the group's ranks: the trace that was read, or a workload's."""
    if trace is not None:
        return lambda ranks: trace
    return lambda ranks: prediction_input.workload(model, workload, ranks, tokens)
