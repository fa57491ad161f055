"""The command `advise` finds the fastest settings of FSEP for a run, or says to take stock."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from megatron_laer.choices import Sharding, Unproven
from megatron_laer.config import flag_name
from megatron_laer.files.checks import one_line
from megatron_laer.files.writing import write_output
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.rules import sharding_for
from megatron_laer.tools.cli import routing_input, run_flags, simulate_input
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    between,
    describe,
    named,
    option,
    path,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.megatron_flags import parsed
from megatron_laer.tools.cli.outputs import bar, check_outputs
from megatron_laer.tools.recipes.command_lines import flags_in_file, script_flags
from megatron_laer.tools.simulator.advisor import output
from megatron_laer.tools.simulator.advisor.answer import turns
from megatron_laer.tools.simulator.advisor.predictor import Predictor, Run
from megatron_laer.tools.simulator.advisor.search import search
from megatron_laer.tools.simulator.advisor.settings import Dispatch, group_flags, group_sizes
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import NATURAL

_STEPS, _LAG = 3, 1
# Exit status if nothing fits in memory.
_NOTHING_FITS = 1

_EXAMPLES = """\
examples:
  %(prog)s --model qwen3-30b-a3b --cluster h100-8 --gpus 64 --tokens 8192
  %(prog)s traces/group-0.trace --model my-model.yaml --cluster my-cluster.yaml --gpus 64
  %(prog)s --model qwen3-235b-a22b --cluster h100-8 --gpus 256 -- --seq-length 4096 \\
      --tensor-model-parallel-size 2 --pipeline-model-parallel-size 8 --micro-batch-size 1 \\
      --global-batch-size 1024 --num-layers-per-virtual-pipeline-stage 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Size of the FSEP group, sharding, slots and exchanges with the shortest predicted "
        "iteration that fits in memory, next to the fastest stock, and Megatron's flags for them.",
        _EXAMPLES,
    )
    simulate_input.add_arguments(parser, groups=False)
    option(parser, "--gpus N", "of the whole run", between(2, MOST_RANKS), required=True)
    shared(parser, "--tokens T", "as in the flags, the trace, or a sequence")
    shared(parser, "--memory-gib X", "the card's less 1")
    text = (
        "Megatron's flags, which give the shape of the run, as a command line or YAML; or after --"
    )
    option(parser, "--recipe FILE", text, path)
    shared(parser, "--json FILE")
    parser.set_defaults(
        lag=_LAG,
        ranks=None,
        world=None,
        stock_expert_parallel=None,
        flex_backend="deepep",  # Megatron's default
        overlaps_shared=False,
    )


def run(args: argparse.Namespace) -> int:
    if args.trace is None and args.workload is None:
        args.workload = NATURAL
    inputs = yaml_inputs(cluster=("cluster", args.cluster), model=("model", args.model))
    check_outputs({"--json": args.json}, [*inputs, args.recipe], args.trace)
    cluster = simulate_input.cluster_of(args)
    model = simulate_input.model_of(args)
    model, dispatches, at_home, words = _with_flags(args, model)
    most_gib = simulate_input.most_gib(args, cluster)
    if most_gib is None:
        raise ValueError(f"--cluster {cluster.name} has no card; give --memory-gib")
    asked, trace = _run(args, cluster, model, dispatches, at_home, most_gib)
    common = [] if words else run_flags.flags_of(asked.shape)
    if args.fp8_format is not None:
        common += ["--fp8-format", args.fp8_format, "--fp8-recipe", str(model.precision)]
    if words:
        asked = replace(asked, allow=_allowed(args, asked, [*words, *common]))
    predictor = Predictor(asked)
    tokens = asked.shape.tokens
    balanced = replace(asked, trace_of=_trace_of(args, model, "W0", tokens), tokens=None)
    results = search(
        predictor, Predictor(balanced), lambda title, items: bar(title, leave=False)(items)
    )
    decided = turns(predictor, results)
    shape = asked.shape
    routing = str(args.trace) if trace is not None else f"workload {args.workload}"
    title = (
        f"{args.model} on {args.gpus} GPUs of {cluster.name}, {routing}: {shape.tokens} tokens per "
        f"rank and microbatch, {shape.microbatches} microbatches; tensor {shape.tensor}, pipeline "
        f"{shape.stages} x {shape.chunks}; recompute {shape.recompute}"
    )
    if model.lora is not None:
        title += f"; LoRA of rank {model.lora.rank}, for which Megatron has no flags"
    if args.json is not None:
        content = {"title": title} | output.content(asked, results, decided, common)
        write_output(args.json, json.dumps(content, indent=1) + "\n", "--json")
    print(one_line(title), output.text(asked, results, decided, common), sep="\n\n")
    return 0 if results.best or results.stocks else _NOTHING_FITS


def _with_flags(
    args: argparse.Namespace, model: ModelShape
) -> tuple[ModelShape, tuple[Dispatch, ...], bool, list[str]]:
    """Return the model with sequences and fp8 of flags, and ways of tokens.

    Then return if flags need experts at home, and the flags.
    """
    if args.recipe is not None and args.flags:
        raise ValueError(f"both --recipe {args.recipe} and flags after --; remove one of them")
    if args.recipe is None:
        words = script_flags(args.flags)
    else:
        words = named("--recipe", str(args.recipe), lambda file: flags_in_file(Path(file)))
    dispatches, at_home = [Dispatch.RANK, Dispatch.NODE], False
    if words:
        settings = parsed(words)
        model = run_flags.model_with(args, settings, model)
        run_flags.fill_in(args, settings, model)
        if settings.moe_permute_fusion:
            dispatches.remove(Dispatch.NODE)  # training refuses both
        at_home = sharding_for(settings)[0] == Sharding.EXPERTS
        args.overlaps_shared = settings.moe_shared_expert_overlap  # Megatron refuses both
    if args.stock_dispatcher == "flex":
        dispatches.append(Dispatch.FLEX)
    return model, tuple(dispatches), at_home, words


def _allowed(args: argparse.Namespace, asked: Run, words: list[str]) -> tuple[Unproven, ...]:
    """Return what the flags need of `--fsep-allow-unproven`; refuse them as training does."""
    whole = [size for size in asked.sizes if size > 1 and not asked.model.num_experts % size]
    group = group_flags(max(whole or asked.sizes), is_flex=False)
    if Sharding.ROWS not in asked.shardings:
        group += [flag_name("sharding"), Sharding.EXPERTS.value]
    return run_flags.allowed(args.model, [*words, *group], args.gpus)


def _run(
    args: argparse.Namespace,
    cluster: Cluster,
    model: ModelShape,
    dispatches: tuple[Dispatch, ...],
    at_home: bool,
    most_gib: float,
) -> tuple[Run, Trace | None]:
    stages, tensor = args.pipeline or 1, args.tensor_parallel or 1
    ranks, left = divmod(args.gpus, stages)
    if left or ranks % tensor:
        raise ValueError(
            f"--gpus {args.gpus}: is no multiple of {stages} pipeline stages times {tensor} "
            "tensor-parallel ranks; give one"
        )
    sizes = group_sizes(ranks, cluster.ranks_per_node, tensor)
    args.ranks = [ranks]
    routing_input.check(args, "advise on")
    trace = None
    if args.workload is None:
        trace = routing_input.read(args, model.num_experts)
        sizes = [size for size in sizes if trace.divides(size)]
        if max(sizes, default=1) < 2:
            trace.check_divides(ranks)
    if max(sizes, default=1) < 2:
        raise ValueError(
            f"--gpus {args.gpus}: a stage of {ranks} ranks has no group that fills nodes of "
            f"{cluster.ranks_per_node} or divides one; give another number"
        )
    node_size = min(cluster.ranks_per_node, max(sizes))
    if trace is None:
        tokens = args.tokens or model.sequence
    else:
        recorded = Routing.of_run(trace, trace.num_ranks, model.topk, args.tokens, args.lag)
        tokens = recorded.tokens(model.topk)
    whole = Geometry(ranks, model.num_experts, model.num_experts, 1)
    shape = simulate_input.run_shape(args, whole, tokens, trace)
    shape.layers_by_chunk(len(model.layer_has_experts))  # refuses stages without a layer
    may_overlap = simulate_input.can_overlap(args, shape, model) and not args.overlaps_shared
    overlaps = (True,) if args.overlap else (False, True) if may_overlap else (False,)
    shardings = simulate_input.shardings_of(args, model)
    asked = Run(
        model=model,
        shape=shape,
        sizes=tuple(sizes),
        node_size=node_size,
        rates=simulate_input.rates_of(args, model, cluster),
        trace_of=_trace_of(args, model, args.workload, tokens, trace),
        tokens=None if trace is None else tokens,
        lag=args.lag,
        steps=_STEPS,
        most_bytes=most_gib * 2**30,
        dispatches=dispatches,
        stock_flex=args.stock_dispatcher == "flex",
        flex_backend=args.flex_backend,
        overlaps=overlaps,
        shardings=(Sharding.EXPERTS,) if at_home else tuple(shardings),
        allow=(Unproven.FP8_EXPERTS,) if model.precision.is_quantised else (),
    )
    return asked, trace


def _trace_of(
    args: argparse.Namespace,
    model: ModelShape,
    workload: str,
    tokens: int,
    trace: Trace | None = None,
) -> simulate_input.TraceOf:
    """Return a function of the group's ranks: the trace that was read, or a workload's."""
    if trace is not None:
        return lambda ranks: trace
    return lambda ranks: simulate_input.workload(args, model, workload, ranks, tokens)
