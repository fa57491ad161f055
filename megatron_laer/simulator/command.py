"""The command `plan` reads a routing trace and prints a table of strategies."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.files import one_line
from megatron_laer.layout import default_capacity
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.simulator import arguments, estimate
from megatron_laer.simulator.arguments import add_arguments
from megatron_laer.simulator.report import LEGEND, table_text, write_json, write_plot
from megatron_laer.simulator.table import BASELINES, chosen_cases, simulate
from megatron_laer.trace import Trace, read_trace

__all__ = ["add_arguments", "run"]

_BYTES_PER_ELEMENT = 2


def run(args: argparse.Namespace) -> int:
    """Run `plan`.

    Raises:
        ValueError, OSError, ImportError: what was passed does not work; said before the work where
            it can be known by then.
    """
    arguments.check(args)
    cluster = arguments.cluster(args)
    sizes = arguments.expert_sizes(args)
    costs = CostModel(
        cluster=cluster,
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        gated=sizes.gated,
        bytes_per_element=_BYTES_PER_ELEMENT,
        restore_algorithm=ExchangeAlgorithm(args.restore_algorithm),
    )
    num_experts = args.experts if args.experts is not None else sizes.num_experts
    tolerance = arguments.DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance

    recorded = read_trace(
        args.trace, args.format, ranks=args.trace_ranks, num_experts=num_experts, progress=_reading
    )
    num_ranks = recorded.num_ranks if args.ranks is None else args.ranks
    geometries = _geometries(args, recorded, num_ranks, cluster)
    node_size = geometries[0].node_size
    estimate.check_fits(_work(args, recorded, geometries), args.hours)
    trace = recorded.with_ranks(num_ranks)
    about = {
        "trace": str(args.trace),
        "steps": len(set(trace.step_R.tolist())),
        "layers": len(trace.layers),
        "records": len(trace),
        "recorded_ranks": recorded.num_ranks,
        "ranks": num_ranks,
        "experts": trace.num_experts,
        "node_size": node_size,
        "cluster": cluster.name,
        "expert_sizes": asdict(sizes),
        "restore_algorithm": args.restore_algorithm,
        "tolerance": tolerance,
        "lag": args.lag,
        "every": args.every,
    }
    print(
        one_line(
            f"{args.trace}: {about['steps']} steps, {about['layers']} layers, {len(trace)} records"
            f", {trace.num_experts} experts, {recorded.num_ranks} ranks"
        )
    )
    print(
        one_line(
            f"planned for {num_ranks} ranks in nodes of {node_size} on {cluster.name}; experts of "
            f"{sizes.hidden} x {sizes.ffn}{'' if sizes.gated else ', not gated'}"
        ),
        end="\n\n",
    )

    rows = simulate(
        trace,
        geometries,
        costs,
        args.strategy,
        args.mode,
        tolerance=tolerance,
        lag=args.lag,
        every=args.every,
        progress=_planning,
    )
    # First of all, or a reader of the table that stops early would end the command before.
    if args.json is not None:
        write_json(args.json, about, rows)
    if args.plot is not None:
        write_plot(args.plot, f"{args.trace.name}, N={num_ranks}, G={node_size}", rows)
    print(table_text(rows))
    print(
        f"\n{rows[0].cases} cases: microbatches of one layer each, with layouts from counts that "
        f"are {args.lag} recorded step(s) old.\nRows of {' and '.join(BASELINES)} are for "
        "comparison, always in mode forecast."
    )
    if trace.num_experts % num_ranks != 0:
        print(f"No row for stock EP, which needs {trace.num_experts} experts / {num_ranks} ranks.")
    print(LEGEND)
    return 0


# Bars show on a terminal only.


def _reading(files: Iterable[Any]) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(files, desc="reading", leave=False, disable=None)
    return bar


def _planning(cases: Sequence[int]) -> Iterable[int]:
    bar: Iterable[int] = tqdm(cases, desc="planning", unit="case", disable=None)
    return bar


def _geometries(
    args: argparse.Namespace, recorded: Trace, num_ranks: int, cluster: Cluster
) -> list[Geometry]:
    """Return the shapes that are asked for, one per capacity.

    Raises:
        ValueError: an argument that does not fit the trace, by its flag.
    """
    recorded.check_divides(num_ranks)
    num_experts = recorded.num_experts
    node_size, given = args.node_size, "--node-size"
    if node_size is None:
        node_size = min(cluster.ranks_per_node, num_ranks)
        given = f"--node-size is not given, and {cluster.name} has nodes of"
    if num_ranks % node_size != 0:
        works = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        raise ValueError(
            f"{given} {node_size}, which does not divide the {num_ranks} ranks; use one of {works}"
        )
    least = -(-num_experts // num_ranks)
    for capacity in args.capacity or []:
        if not least <= capacity <= num_experts:
            raise ValueError(
                f"--capacity {capacity}: {num_ranks} ranks need {least}..{num_experts} slots each "
                f"for {num_experts} experts"
            )
    capacities = args.capacity or [default_capacity(num_ranks, num_experts)]
    return [Geometry(num_ranks, num_experts, capacity, node_size) for capacity in capacities]


def _work(
    args: argparse.Namespace, recorded: Trace, geometries: Sequence[Geometry]
) -> estimate.Work:
    cases = chosen_cases(recorded, args.lag, args.every)
    keys = {(int(recorded.step_R[case]), int(recorded.layer_R[case])) for case in cases}
    return estimate.Work(
        geometries=geometries,
        strategies=args.strategy,
        modes=args.mode,
        records=len(recorded),
        layers=len(recorded.layers),
        plans=len(keys),
        cases=len(cases),
        lag=args.lag,
    )
