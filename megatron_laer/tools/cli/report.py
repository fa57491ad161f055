"""The command `report` writes one page of HTML on a run, even while it trains."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_laer.files.checks import one_line, quoted, refuse_overwriting, refuse_unwritable
from megatron_laer.files.writing import write_output
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    add_force,
    between,
    option,
    path,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.outputs import MARK, refuse_replacing
from megatron_laer.tools.cli.prediction_input import prediction_settings
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.cli.progress import bar
from megatron_laer.tools.report.assessment import assess
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.recorded import recorded_run
from megatron_laer.tools.report.run_files import find_run, refuse_as_source
from megatron_laer.tools.report.what_if import WhatIf, what_if
from megatron_laer.tools.traces import read_trace

_DEFAULT_OUT = "report.html"
_SUFFIXES = (".html", ".htm")
_MAX_CASES = 10**6

_EXAMPLES = """\
examples:
  %(prog)s runs/one
  %(prog)s runs/one --cluster my-cluster.yaml --out one.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "One page of HTML on a run: its share of perfectly balanced speed, where time went, and "
        "predictions for other settings on its routing.",
        _EXAMPLES,
    )
    text = "a folder of --fsep-record, with metrics, trace, layouts and Megatron's log in it"
    parser.add_argument("run", metavar="RUN", type=path, help=text)
    option(parser, "--out FILE", "default: %(default)s", path, default=Path(_DEFAULT_OUT))
    text = "of several FSEP groups; default: the first"
    option(parser, "--group I", text, between(0, MOST_RANKS))
    text = "microbatches that other capacities and modes are tried on, at most; default:"
    option(parser, "--cases K", f"{text} %(default)s", between(0, _MAX_CASES), default=120)
    shared(parser, "--cluster NAME|YAML", "the run's")
    add_force(parser)


def run(args: argparse.Namespace) -> int:
    try:
        from megatron_laer.tools.report.page import page
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        raise ImportError(
            "report needs the package jinja2: `pip install 'megatron_laer[tools]'`"
        ) from error
    refuse_unwritable(args.out, "--out")
    refuse_overwriting(args.out, yaml_inputs(cluster=("cluster", args.cluster)), "--out")
    files = find_run(args.run, args.group)
    refuse_overwriting(args.out, files.all_files(), "--out")
    refuse_as_source(args.out, args.run, "--out")
    if args.out.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"--out {quoted(args.out)}: the page is HTML; give a name that ends in "
            f"{' or '.join(_SUFFIXES)}"
        )
    refuse_replacing(args.out, "--out", force=args.force)

    recording = read_metrics(files.metrics)
    settings = prediction_settings(vars(args) | {"config": None}, recording, files.metrics)
    trace = None if files.trace is None else read_trace(files.trace)
    shown = recorded_run(files, recording, trace, settings.sharding)
    rows = list[WhatIf]()
    if trace is not None:
        cluster = [] if args.cluster is None else ["--cluster", args.cluster]
        progress = bar("what if", leave=False)
        of_run = str(files.trace), trace, shown.geometry, settings
        rows = what_if(*of_run, args.cases, cluster, progress, shown.logs.iterations)
    # File names that are not UTF-8 get escapes, as on the terminal.
    content = (page(shown, rows, settings.words()) + MARK).encode(errors="backslashreplace")
    write_output(args.out, content, "--out")
    print(one_line(f"{shown.name}: {assess(shown, shown.logs).sentence()}."))
    print(one_line(f"{args.out}: {len(content):,} bytes"))
    return 0
