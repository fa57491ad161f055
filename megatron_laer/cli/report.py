"""The command `report` writes one page of HTML on a run, also while the run goes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_laer.choices import Choice, ExchangeAlgorithm, Recompute
from megatron_laer.cli.argument_types import add_hours, between, path
from megatron_laer.files import memory
from megatron_laer.files.checks import one_line, quoted, refuse_overwriting, refuse_unwritable
from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.writing import write_output
from megatron_laer.layout import MAX_EXPERTS, default_capacity
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.report.page import page
from megatron_laer.report.recorded import recorded_run
from megatron_laer.report.replayed import replay_work, replayed_run
from megatron_laer.report.run_data import RunData
from megatron_laer.report.sources import Sources, find
from megatron_laer.report.verdict import judge
from megatron_laer.report.what_if import BYTES_PER_ELEMENT, WhatIf, what_if, what_if_work
from megatron_laer.simulator.estimate import Work
from megatron_laer.simulator.sizes import DEFAULT_SIZES, ExpertSizes, model_sizes
from megatron_laer.trace import Trace, read_trace

_DEFAULT_CLUSTER = "a100-4x8-ib800"
_DEFAULT_OUT = "report.html"
_MAX_CASES = 10**6
_MAX_RANKS = 2**16

_EXAMPLES = """\
examples:
  %(prog)s runs/one
  %(prog)s runs/one --compare runs/two --out one-and-two.html
  %(prog)s traces/group-0.trace --cluster h100-8 --config mixtral-8x7b-e8k2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report` to `parser`."""
    parser.description = (
        "One page of HTML on a run: what it kept of forced balance, where time went, and what "
        "other settings would have made of its routing."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "run",
        metavar="RUN",
        type=path,
        help="a folder of --fsep-record-metrics, with --fsep-record-trace, --fsep-record-layouts "
        "and Megatron's log beside it; or a trace alone, of any format that `plan` reads",
    )
    parser.add_argument("--compare", type=path, metavar="RUN", help="another run, shown beside it")
    parser.add_argument(
        "--out", type=path, default=Path(_DEFAULT_OUT), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--group",
        type=between(0, _MAX_RANKS),
        metavar="I",
        help="of several FSEP groups; default: the first",
    )
    parser.add_argument(
        "--cases",
        type=between(0, _MAX_CASES),
        default=120,
        metavar="K",
        help="microbatches that other capacities and modes are tried on, at most; default: "
        "%(default)s",
    )
    add_hours(parser)
    parser.add_argument(
        "--cluster",
        metavar="NAME|YAML",
        help=f"hardware constants; default: the run's, else {_DEFAULT_CLUSTER}",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|YAML",
        help="of a trace alone: a model, for its experts' sizes; default: those of "
        "mixtral-8x7b-e8k2",
    )
    parser.add_argument(
        "--capacity",
        type=between(1, MAX_EXPERTS),
        metavar="C",
        help="of a trace alone: slots per rank; default: min(E, ceil(E/N) + 1)",
    )
    parser.add_argument(
        "--node-size",
        type=between(1, _MAX_RANKS),
        metavar="G",
        help="of a trace alone: ranks per node; default: the cluster's, at most N",
    )


def run(args: argparse.Namespace) -> int:
    """Run `report`.

    Raises:
        ValueError, OSError: what was passed does not work, or a recording is damaged.
    """
    refuse_unwritable(args.out, "--out")
    for flag, kind, given in (
        ("cluster", "cluster", args.cluster),
        ("config", "model", args.config),
    ):
        if given is not None:
            used_file = _named(f"--{flag}", given, partial(yaml_file, kind))
            refuse_overwriting(args.out, [used_file], "--out")
    sources = find(args.run, args.group)
    others = None if args.compare is None else find(args.compare, args.group)
    for used in (sources, others):
        if used is not None:
            inputs = (used.metrics, used.trace, used.layouts, *used.logs)
            refuse_overwriting(args.out, [file for file in inputs if file is not None], "--out")
    shown, rows = _read(args, sources, args.cases)
    other = None if others is None else _read(args, others, 0)[0]
    content = page(shown, rows, other).encode()
    write_output(args.out, content, "--out")
    print(one_line(f"{shown.name}: {judge(shown).sentence()}"))
    print(one_line(f"{args.out}: {len(content):,} bytes"))
    return 0


def _read(args: argparse.Namespace, sources: Sources, cases: int) -> tuple[RunData, list[WhatIf]]:
    """Read a run, and work out what other settings would have made of it."""
    sizes = None if args.config is None else _named("--config", args.config, model_sizes)
    trace = None
    if sources.trace is not None:
        num_experts = None if sizes is None else sizes.num_experts
        trace = read_trace(sources.trace, num_experts=num_experts, progress=_bar("reading"))
    if sources.metrics is not None:
        for flag, value in (
            ("--config", args.config),
            ("--capacity", args.capacity),
            ("--node-size", args.node_size),
        ):
            if value is not None:
                raise ValueError(
                    f"{flag} {quoted(value)}: no effect on {quoted(sources.name)}, which recorded "
                    "its metrics; leave it out"
                )
        shown = recorded_run(sources, trace)
        name, cluster = _cluster(args.cluster, dict(shown.settings).get("cluster"))
        shape = shown.shape
        geometry = Geometry(shape.num_ranks, shape.num_experts, shape.capacity, shape.node_size)
        costs = replace(
            _costs(cluster, _recorded_sizes(shown)),
            restore_algorithm=_recorded(shown, "restore_algorithm", ExchangeAlgorithm.FLAT),
            recompute=_recorded(shown, "recompute", Recompute.NONE),
        )
    else:
        assert trace is not None
        name, cluster = _cluster(args.cluster, None)
        geometry = _geometry(args, trace, cluster)
        costs = _costs(cluster, sizes or DEFAULT_SIZES)
        _check_fits(
            [replay_work(trace, geometry)], args.hours, "another trace, such as of fewer ranks"
        )
        shown = replayed_run(sources.name, trace, geometry, costs, _bar("deciding"))
    rows: list[WhatIf] = []
    if trace is not None:
        _check_fits(what_if_work(trace, geometry, cases), args.hours, "fewer --cases")
        rows = what_if(str(sources.trace), trace, geometry, costs, cases, name, _bar("what if"))
    return shown, rows


def _check_fits(works: Sequence[Work], longest_hours: float, remedy: str) -> None:
    """Refuse what would take longer, or more memory than is free.

    Raises:
        ValueError: with the estimate, and what to give.
    """
    for work in works:
        what = f"{work.cases:,} microbatches of {work.geometries[0].num_ranks:,} ranks"
        memory.check_enough(work.bytes, what, f"give {remedy}")
        hours = work.seconds / 3600
        if hours > longest_hours:
            raise ValueError(
                f"{what} would take about {hours:.2g} hours, more than the {longest_hours:.2g} of "
                f"--hours; give {remedy}, or --hours {hours * 1.1:.2g}"
            )


def _geometry(args: argparse.Namespace, trace: Trace, cluster: Cluster) -> Geometry:
    num_ranks, num_experts = trace.num_ranks, trace.num_experts
    node_size = args.node_size or min(cluster.ranks_per_node, num_ranks)
    if num_ranks % node_size != 0:
        works = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
        raise ValueError(
            f"--node-size {node_size} does not divide the {num_ranks} ranks; use one of {works}"
        )
    least = -(-num_experts // num_ranks)
    capacity = args.capacity or default_capacity(num_ranks, num_experts)
    if not least <= capacity <= num_experts:
        raise ValueError(
            f"--capacity {capacity}: {num_ranks} ranks need {least}..{num_experts} slots each for "
            f"{num_experts} experts"
        )
    return Geometry(num_ranks, num_experts, capacity, node_size)


def _costs(cluster: Cluster, sizes: ExpertSizes) -> CostModel:
    return CostModel(
        cluster=cluster,
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        gated=sizes.gated,
        bytes_per_element=BYTES_PER_ELEMENT,
    )


def _recorded_sizes(shown: RunData) -> ExpertSizes:
    """Return an expert's sizes as the run noted them; the default ones where it did not."""
    settings = dict(shown.settings)
    try:
        return ExpertSizes(
            between(1, 2**20)(settings["hidden"]),
            between(1, 2**20)(settings["ffn"]),
            settings["gated"] == "True",
        )
    except (KeyError, argparse.ArgumentTypeError):
        return DEFAULT_SIZES


def _recorded[T: Choice](shown: RunData, setting: str, otherwise: T) -> T:
    """Return a setting as the run noted it; `otherwise` where it noted no word that we know."""
    try:
        return type(otherwise)(dict(shown.settings)[setting])
    except (KeyError, ValueError):
        return otherwise


def _cluster(given: str | None, recorded: str | None) -> tuple[str, Cluster]:
    """Return the constants' name and content: as given, the run's, or the default.

    Raises:
        ValueError: what was given cannot be read.
    """
    if given is not None:
        return given, _named("--cluster", given, load_cluster)
    # A name only: what a recording says is no reason to open a path.
    if recorded is not None and "/" not in recorded and not recorded.endswith((".yaml", ".yml")):
        try:
            return recorded, load_cluster(recorded)
        except (OSError, ValueError):  # constants of its own, in a file that is elsewhere
            pass
    return _DEFAULT_CLUSTER, load_cluster(_DEFAULT_CLUSTER)


def _named[T](flag: str, given: str, load: Callable[[str], T]) -> T:
    try:
        return load(given)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {quoted(given)}: {error}") from error


def _bar(title: str) -> Any:
    """Return a progress bar, which shows on a terminal only."""

    def wrapped(items: Sequence[Any]) -> Iterable[Any]:
        bar: Iterable[Any] = tqdm(items, desc=title, leave=False, disable=None)
        return bar

    return wrapped
