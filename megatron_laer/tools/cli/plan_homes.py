"""`plan --homes`: a file of homes by pairs of experts, from a trace with pairs."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from megatron_laer.arrays import Int64
from megatron_laer.choices import Sharding
from megatron_laer.files.checks import one_line, quoted
from megatron_laer.files.writing import write_output
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.homes_file import read_homes, write_homes
from megatron_laer.tools.cli.argument_types import option, path
from megatron_laer.tools.cli.outputs import bar
from megatron_laer.tools.cli.routing_input import refuse
from megatron_laer.tools.simulator.homes import LayerHomes, homes_by_pairs
from megatron_laer.tools.simulator.rendering import aligned
from megatron_laer.tools.traces.records import Trace


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
    flags = ("--capacity", "--token-exchange", "--recompute", "--restore-algorithm")
    more = ("--strategy", "--mode", "--fp8-format", "--fp8-recipe", "--hidden", "--ffn")
    unset = {name: None for name in ("lag", "every") if getattr(args, name) == 1}
    given_flags = argparse.Namespace(**vars(args) | unset)
    refuse(given_flags, (*flags, *more, "--lag", "--every"), f"{given} compares no strategies")


def run(
    args: argparse.Namespace, trace: Trace, num_ranks: int, node_size: int, tolerance: float
) -> int:
    """Write the homes, and print rows and balance of each layer."""
    geometry = _geometry(args, trace, num_ranks, node_size)
    orders = _orders_of_other_traces(args, geometry)
    bar_ = bar("placing", unit="layer")
    layers = homes_by_pairs(trace, geometry, tolerance, bar_)
    orders |= {one.layer: one.home_slot_order_E for one in layers}
    write_homes(args.homes, num_ranks, orders)
    about = {
        "trace": str(args.trace),
        "ranks": num_ranks,
        "experts": trace.num_experts,
        "node_size": node_size,
        "tolerance": tolerance,
    }
    if args.json is not None:
        rows = [_json_row(one) for one in layers]
        write_output(args.json, json.dumps({**about, "homes": rows}, indent=1) + "\n", "--json")
    print(one_line(f"homes for {num_ranks} ranks in nodes of {node_size}: {args.homes}"))
    print(f"\n{table_text(layers)}\n\n{_causes(layers)}\n{_legend(layers)}")
    return 0


def table_text(layers: list[LayerHomes]) -> str:
    head = ["layer", "rows, stock's", "rows", "saved", "max/mean, stock's", "max/mean", "homes"]
    lines = [
        [
            one_line(one.layer, 40),
            f"{one.stock_rows:.3f}",
            f"{one.rows:.3f}",
            f"{one.saved:.1%}",
            f"{one.stock_max_over_mean:.3f}",
            f"{one.max_over_mean:.3f}",
            one.homes,
        ]
        for one in layers
    ]
    return aligned([head, *lines], (0, len(head) - 1))


def _geometry(args: argparse.Namespace, trace: Trace, num_ranks: int, node_size: int) -> Geometry:
    given, experts = f"--homes {quoted(args.homes)}", trace.num_experts
    if trace.pairs is None:
        raise ValueError(
            f"{given}: {quoted(args.trace)} has no pairs of experts for these ranks; record them "
            "with --fsep-record DIR trace --fsep-set pairs_interval=1, and leave --trace-ranks out"
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


def _json_row(one: LayerHomes) -> dict[str, Any]:
    row = {field.name: getattr(one, field.name) for field in fields(one)}
    return row | {"saved": one.saved, "home_slot_order_E": one.home_slot_order_E.tolist()}


def _causes(layers: list[LayerHomes]) -> str:
    """Return the mean rows of a token by cause, in the manner of `simulator.node_rows`."""
    pair_rows, stock_rows, rows = (
        sum(getattr(one, name) for one in layers) / len(layers)
        for name in ("pair_rows", "stock_rows", "rows")
    )
    return (
        f"rows by cause, mean of layers: {pair_rows:.3f} with a row for each expert - "
        f"{pair_rows - stock_rows:.3f} shared by experts of stock's homes - "
        f"{stock_rows - rows:.3f} by these homes = {rows:.3f}"
    )


def _legend(layers: list[LayerHomes]) -> str:
    tokens = min(one.sampled_tokens for one in layers)
    source = f"counted on {tokens} or more tokens' experts" if tokens else "expected from pairs"
    steps = """of the later half of the steps;
the earlier half planned."""
    if min(one.steps for one in layers) == 1:
        steps = """of the one step with pairs;
it planned too, so other tokens may save less: record more steps."""
    return f"""\
rows: between nodes per token, {source} {steps} Tokens travel once per
node, and each expert has one copy. max/mean: of the experts at home, over all steps; replicas even
it out. homes: stock's, where others save no rows or load a rank more by --tolerance."""
