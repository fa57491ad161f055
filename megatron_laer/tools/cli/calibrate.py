"""The command `calibrate` measures a cluster's constants, on the ranks that a launcher starts.

Torch is imported only after arguments and launcher have been checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_laer.files.checks import (
    one_line,
    quoted,
    refuse_overwriting,
    refuse_unwritable,
)
from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.writing import write_file
from megatron_laer.planner.cluster_files import cluster_text, parse_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.runtime.comm import launcher
from megatron_laer.tools.calibration.constants import implausible, off_curve
from megatron_laer.tools.calibration.settings import START
from megatron_laer.tools.cli.argument_types import (
    MOST_RANKS,
    add_force,
    between,
    named,
    option,
    path,
)
from megatron_laer.tools.cli.outputs import refuse_replacing
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.cli.progress import bar
from megatron_laer.tools.model_flags import ExpertSizes, model_sizes
from megatron_laer.tools.simulator.output import not_given

if TYPE_CHECKING:
    from megatron_laer.tools.calibration.sampling import Job

_ENDINGS = (".yaml", ".yml")

_EXAMPLES = """\
examples:
  torchrun --nproc-per-node 2 -m megatron_laer calibrate my-machine.yaml --quick
  torchrun --nnodes 4 --nproc-per-node 8 ... -m megatron_laer calibrate my-cluster.yaml
  torchrun --nproc-per-node 8 -m megatron_laer calibrate my-node.yaml --config qwen3-235b-a22b
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Measures GEMMs, exchanges and the host on all ranks of a launcher, and writes a cluster "
        "file for --fsep-set cluster and for --cluster of plan.",
        _EXAMPLES,
    )
    parser.add_argument("output", metavar="FILE", type=path, help="the cluster file, a .yaml")
    add_force(parser, "the file if it is there")
    parser.add_argument("--quick", action="store_true", help="fewer points, and seconds in all")
    text = "ranks per node; default: what the launcher says"
    option(parser, "--node-size G", text, between(1, MOST_RANKS))
    text = "a model, whose experts' GEMMs are measured; default: Mixtral-8x7B's on GPUs, small ones"
    option(parser, "--config NAME|YAML", f"{text} on processors")


def run(args: argparse.Namespace) -> int:
    try:
        launcher.check_ranks(os.environ)
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
            raise ValueError(f"exchanges need several ranks; {START}")
    except ValueError:
        _checked(args, writes=True)  # errors of arguments come first
        raise
    import torch.distributed as dist

    from megatron_laer.tools.calibration import run as calibration

    with calibration.all_ranks() as control:
        rank = dist.get_rank()
        expert = calibration.together(control, lambda: _checked(args, writes=rank == 0))

        def progress(jobs: Sequence[Job]) -> Iterable[Job]:
            if rank:
                yield from jobs
                return
            with bar("calibrate")(jobs) as shown:
                for job in shown:
                    shown.set_postfix_str(str(job.quantity))
                    yield job

        settings, device = calibration.agree_on_settings(
            expert,
            args.node_size,
            quick=args.quick,
            control=control,
        )
        cluster = calibration.calibrate(args.output.stem, settings, device, control, progress)
        calibration.together(control, lambda: _write(cluster, args.output))
    return 0


def _checked(args: argparse.Namespace, *, writes: bool) -> ExpertSizes | None:
    if args.output.suffix not in _ENDINGS or not args.output.stem.strip():
        raise ValueError(
            f"{quoted(args.output)} does not end in {' or '.join(_ENDINGS)}, by which --cluster "
            "tells files from names, or has no name before that"
        )
    expert = None if args.config is None else named("--config", args.config, model_sizes)
    if writes:
        refuse_unwritable(args.output, "FILE")
        if args.config is not None:
            refuse_overwriting(args.output, [yaml_file("model", args.config)], "FILE")
        # Its own files too, whose figures no other run gives.
        refuse_replacing(args.output, "FILE", force=args.force, may_replace=lambda _: False)
    return expert


def _write(cluster: Cluster | None, output: Path) -> None:
    if cluster is None:
        return
    text = "# Written by `python -m megatron_laer calibrate`; docs/predict.md says what is what.\n"
    text += cluster_text(cluster)
    assert parse_cluster(text) == cluster
    write_file(output, text)
    print(
        f"{quoted(output)}: {len(cluster.figures)} figures of {dict(cluster.measured)['hardware']}"
    )
    if lacking := not_given(cluster):
        print(one_line(lacking))
    way_out = "measure again, without other work on the machine"
    for problem, found in (
        ("implausible", implausible(cluster)),
        ("points off their curve", off_curve(cluster)),
    ):
        if found:
            print(f"calibrate: {problem}: {'; '.join(found)}: {way_out}", file=sys.stderr)
