"""`plan --homes`: a file of homes by pairs of experts, from a trace with pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.files.checks import one_line, quoted
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.homes_file import read_homes, write_homes
from megatron_laer.tools.cli.argument_types import option, path
from megatron_laer.tools.cli.outputs import write_json
from megatron_laer.tools.cli.prediction_input import refuse
from megatron_laer.tools.cli.progress import bar
from megatron_laer.tools.simulator.homes import LayerHomes, homes_by_pairs
from megatron_laer.tools.simulator.output import table
from megatron_laer.tools.traces.records import Trace

_NO_EFFECT = ("--capacity", "--strategy", "--mode", "--every")
_COLUMNS: Mapping[str, Callable[[LayerHomes], str]] = {
    "layer": lambda one: one_line(one.layer, 40),
    "rows, stock's": lambda one: f"{one.stock_rows:.3f}",
    "rows": lambda one: f"{one.rows:.3f}",
    "saved": lambda one: f"{one.saved:.1%}",
    "max/mean, stock's": lambda one: f"{one.stock_max_over_mean:.3f}",
    "max/mean": lambda one: f"{one.max_over_mean:.3f}",
    "homes": lambda one: one.homes,
}
_LEGEND = """\
rows: between nodes per token, {source}, of the later half of the steps; the earlier half
planned, and a single step does both. Tokens travel once per node, and each expert has one copy.
max/mean: of the experts at home, over all steps; replicas even it out. homes: stock's, where others
save no rows or load a rank more by --tolerance."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "write homes by pairs of experts there, for --fsep-homes, in place of the comparison;"
    option(parser, "--homes FILE", f"{text} layers that the file has from other traces stay", path)


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go with --homes."""
    if args.homes is None:
        return
    given = f"--homes {quoted(args.homes)}"
    if args.workload is not None:
        raise ValueError(
            f"{given}: --workload {args.workload} has no pairs of experts; give a trace with pairs"
        )
    if args.sharding == Sharding.ROWS:
        raise ValueError(
            f"{given}: experts have no home with --sharding rows; give experts, or leave it out"
        )
    refuse(args, _NO_EFFECT, f"{given} compares no strategies")


def run(
    args: argparse.Namespace, trace: Trace, num_ranks: int, node_size: int, tolerance: float
) -> int:
    """Write the homes, and print rows and balance of each layer."""
    geometry = _geometry(args, trace, num_ranks, node_size)
    orders = _orders_of_other_traces(args, geometry)
    layers = homes_by_pairs(trace, geometry, tolerance, bar("placing", unit="layer"))
    orders |= {one.layer: one.home_slot_order_E for one in layers}
    write_homes(args.homes, num_ranks, orders)
    rows = [
        asdict(one) | {"saved": one.saved, "home_slot_order_E": one.home_slot_order_E.tolist()}
        for one in layers
    ]
    write_json(args.json, {"homes": rows})
    print(one_line(f"homes for {num_ranks} ranks in nodes of {node_size}: {args.homes}"))
    source = "counted on tokens' experts" if trace.sets else "expected from pairs"
    text = table(_COLUMNS, layers, (0, len(_COLUMNS) - 1))
    print(f"\n{text}\n\n{_LEGEND.format(source=source)}")
    return 0


def _geometry(args: argparse.Namespace, trace: Trace, num_ranks: int, node_size: int) -> Geometry:
    given, experts = f"--homes {quoted(args.homes)}", trace.num_experts
    if trace.pairs is None:
        raise ValueError(
            f"{given}: {quoted(args.trace)} has no pairs of experts; record them with "
            "--fsep-record DIR trace --fsep-set pairs_interval=1"
        )
    if experts % num_ranks:
        raise ValueError(
            f"{given}: {experts} experts cannot be at home on {num_ranks} ranks; give --ranks that "
            "divide the experts"
        )
    if num_ranks == node_size:
        raise ValueError(
            f"{given}: all {num_ranks} ranks are in one node, and no rows between nodes can be "
            "saved; give more --ranks, or the true --node-size"
        )
    return Geometry(num_ranks, experts, experts // num_ranks, node_size)


def _orders_of_other_traces(args: argparse.Namespace, geometry: Geometry) -> dict[str, Int64]:
    """Return homes that the file has: those of other stages of a pipeline stay."""
    if not args.homes.exists():
        return {}
    before = read_homes(args.homes)
    try:
        before.check_fits(geometry.num_ranks, geometry.num_experts)
    except ValueError as error:
        raise ValueError(f"--homes {quoted(args.homes)} {error}; give another name") from error
    return {layer: order.expert_E for layer, order in before.by_layer.items()}
