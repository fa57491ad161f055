"""Megatron's two flags of fp8, for commands that predict times and bytes."""

from __future__ import annotations

import argparse

from megatron_laer.precision import QUANTISED, Precision
from megatron_laer.tools.cli.argument_types import option
from megatron_laer.tools.model_flags import precision_of

_FORMATS = ("e4m3", "hybrid")
ROWS_IN_FP8 = (
    "--fp8-format: rows of experts are kept and moved without fp8; give --sharding experts, or "
    "leave out --fp8-format"
)


def add_arguments(parser: argparse._ActionsContainer, default: str = "the model's") -> None:
    text = f"layers and their experts compute in fp8, with --sharding experts; default: {default}"
    option(parser, "--fp8-format", text, choices=_FORMATS)
    text = "scales in fp8, as in Megatron; goes with --fp8-format"
    option(parser, "--fp8-recipe", text, choices=QUANTISED)


def given_precision[T](args: argparse.Namespace, default: T) -> Precision | T:
    """Return the precision of the flags, or `default` where neither is given."""
    if args.fp8_format is None and args.fp8_recipe is None:
        return default
    return precision_of(args.fp8_format, args.fp8_recipe)
