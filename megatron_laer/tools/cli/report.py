"""The command `report` writes one page of HTML on a run, even while it trains."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from megatron_laer.files.checks import one_line, quoted, refuse_overwriting, refuse_unwritable
from megatron_laer.files.writing import write_output
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    between,
    describe,
    option,
    path,
    shared,
    yaml_inputs,
)
from megatron_laer.tools.cli.outputs import bar
from megatron_laer.tools.cli.prediction_settings import (
    DEFAULT_CLUSTER,
    prediction_settings,
    recording_of,
)
from megatron_laer.tools.report.assessment import assess
from megatron_laer.tools.report.recorded import check_same_run, recorded_run
from megatron_laer.tools.report.replayed import replayed_run
from megatron_laer.tools.report.run_data import RunData
from megatron_laer.tools.report.run_files import RunFiles, find_run, naming, refuse_as_source
from megatron_laer.tools.report.what_if import WhatIf, what_if
from megatron_laer.tools.traces import read_trace

_DEFAULT_OUT = "report.html"
_MAX_CASES = 10**6

_EXAMPLES = """\
examples:
  %(prog)s runs/one
  %(prog)s runs/one --compare runs/two --out one-and-two.html
  %(prog)s traces/group-0.trace --cluster h100-8 --config mixtral-8x7b-e8k2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "One page of HTML on a run: its share of perfectly balanced speed, where time went, and "
        "predictions for other settings on its routing.",
        _EXAMPLES,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        type=path,
        help="a folder of --fsep-record, with metrics, trace, layouts and Megatron's log in it; or "
        "a trace alone",
    )
    option(parser, "--compare RUN", "another run to compare with", path)
    option(parser, "--out FILE", "default: %(default)s", path, default=Path(_DEFAULT_OUT))
    text = "of several FSEP groups; default: the first"
    option(parser, "--group I", text, between(0, MOST_RANKS))
    text = "microbatches that other capacities and modes are tried on, at most; default:"
    option(parser, "--cases K", f"{text} %(default)s", between(0, _MAX_CASES), default=120)
    shared(parser, "--hours X", "never")
    shared(parser, "--cluster NAME|YAML", f"the run's, else {DEFAULT_CLUSTER}")
    text = "of a trace alone: a model, for its experts' sizes; default: the recorded, else those of"
    option(parser, "--config NAME|YAML", f"{text} mixtral-8x7b-e8k2")
    shared(parser, "--capacity C", "of a trace alone, the recorded, else min(E, ceil(E/N) + 1)")
    shared(parser, "--node-size G", "of a trace alone, the recorded, else the cluster's, at most N")


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
    inputs = yaml_inputs(cluster=("cluster", args.cluster), config=("model", args.config))
    refuse_overwriting(args.out, inputs, "--out")
    files = find_run(args.run, args.group)
    others = None if args.compare is None else find_run(args.compare, args.group)
    for given, used in ((args.run, files), (args.compare, others)):
        if used is not None:
            refuse_overwriting(args.out, used.all_files(), "--out")
            refuse_as_source(args.out, given, "--out")
    shown, rows, predicted_for = _read(args, files, args.cases)
    other = None if others is None else _read(args, others, 0)[0]
    # File names that are not UTF-8 get escapes, as on the terminal.
    content = page(shown, rows, other, predicted_for).encode(errors="backslashreplace")
    write_output(args.out, content, "--out")
    print(one_line(f"{shown.name}: {assess(shown).sentence()}"))
    print(one_line(f"{args.out}: {len(content):,} bytes"))
    return 0


def _read(
    args: argparse.Namespace, files: RunFiles, cases: int
) -> tuple[RunData, list[WhatIf], str]:
    """Return a run, its what-if rows, and the settings of their prediction in words."""
    if files.metrics is not None:
        for flag, value in (
            ("--config", args.config),
            ("--capacity", args.capacity),
            ("--node-size", args.node_size),
        ):
            if value is not None:
                raise ValueError(
                    f"{flag} {quoted(value)}: no effect on {quoted(files.name)}, which recorded "
                    "its metrics; leave it out"
                )
    metrics = files.metrics or files.metrics_beside
    recording = recording_of(metrics)
    given = {"cluster": args.cluster, "config": args.config}
    settings = prediction_settings(given, recording, metrics)
    trace = None
    if files.trace is not None:
        with naming(files.trace):
            trace = read_trace(files.trace, num_experts=settings.sizes.num_experts)
    if files.metrics is not None:
        assert recording is not None
        shown = recorded_run(files, recording, trace)
        shape = shown.shape
        with naming(files.metrics):
            geometry = Geometry(
                shape.num_ranks,
                shape.num_experts,
                shape.capacity,
                shape.node_size,
                settings.sharding,
            )
        shown = replace(shown, sharding=settings.sharding)
    else:
        assert trace is not None
        if metrics is not None and recording is not None:
            check_same_run(metrics, recording.shape, files.trace, trace)
        ((geometry,), _) = settings.geometries(
            trace.num_ranks,
            trace.num_experts,
            [] if args.capacity is None else [args.capacity],
            args.node_size,
        )
        ((of, costs),) = settings.priced(trace, [geometry]).items()
        shown = replayed_run(files.name, trace, of, costs, bar("deciding", leave=False))
    rows: list[WhatIf] = []
    if trace is not None:
        rows = what_if(
            str(files.trace),
            trace,
            geometry,
            settings,
            cases,
            [
                word
                for flag, value in given.items()
                if value is not None
                for word in (f"--{flag}", value)
            ],
            bar("what if", leave=False),
        )
    if settings.note and (rows or not shown.is_measured):
        print(one_line(f"report: {settings.note}"), file=sys.stderr)
        shown = replace(shown, notes=[*shown.notes, settings.note])
    return shown, rows, settings.words()
