"""Refusals of `simulate`: contradictory flags, and files that cannot be written."""

from __future__ import annotations

import argparse

from megatron_laer.choices import TokenExchange
from megatron_laer.config import PlanMode
from megatron_laer.files.checks import quoted
from megatron_laer.tools.cli import simulate_input
from megatron_laer.tools.cli.argument_types import refuse_repeated, yaml_inputs
from megatron_laer.tools.cli.outputs import check_outputs
from megatron_laer.tools.simulator.rendering import check_can_plot

FLEX = "flex"
ROWS_SHARDED = (
    "--data-parallel-sharding-strategy: Megatron-FSDP takes experts as stock's parameters; give "
    "--sharding experts, or leave it out"
)
ROWS_ADAPTED = (
    "--lora-rank: rows of experts have no linear layers to adapt; give --sharding experts, or "
    "--lora-targets of attention alone"
)


def check(args: argparse.Namespace) -> None:
    sizes = ("--ranks", "--node-size", "--capacity", "--tokens")
    repeatable = (*sizes, "--sharding", "--mode", "--method")
    refuse_repeated(args, repeatable)
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
    simulate_input.check(args)
    inputs = yaml_inputs(cluster=("cluster", args.cluster), model=("model", args.model))
    check_outputs({"--json": args.json, "--png": args.png}, inputs, args.trace)
    if args.png is not None:
        if args.png.suffix.lower() != ".png":
            raise ValueError(f"--png {quoted(args.png)}: give a file that ends in .png")
        check_can_plot(args.png, "--png")
