"""Figure 11 times the planner by ranks and capacity; it trains nothing and needs no GPU.

Shapes: 32 experts, 64 to 1024 ranks, 1 to 16 slots per rank. Counts are drawn uniformly from 0 to
999; times are means of ten solves.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

import numpy as np

from benchmarks.command_line import program
from benchmarks.costs import paper_costs
from benchmarks.published_files import LAER, read_cells
from benchmarks.report import times_ms
from megatron_laer.files.checks import shell_words
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.tools.cli.program import Parser
from scripts.paper.published import END_TO_END, PLANNER, missing, read_planner
from scripts.paper.runner import add_result_options, check_result_options, finish, split_words
from scripts.paper.tables import Result, Table

EXPERTS, NODE_SIZE, LARGEST_COUNT, SOLVES = 32, 8, 999, 10
RANKS, CAPACITIES = (64, 128, 256, 512, 1024), (1, 2, 4, 8, 16)
TOY_RANKS, TOY_CAPACITIES = (64, 128), (1, 4)
STRATEGIES = ("laer", "greedy")
_TITLE = "Solve time of the planner"
# Layers and microbatches of the paper's iteration, over which its time limit for solves is spread.
_LAYERS, _MICROBATCHES = 32, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the planner at all shapes; raise ValueError or OSError for bad input before that."""
    parser = Parser(
        prog="scripts/paper/figure11.py",
        description=f"The paper's figure 11: {_TITLE}. It needs a processor alone.",
    )
    scale = parser.add_mutually_exclusive_group(required=True)
    scale.add_argument("--toy", action="store_true", help="few shapes, on this machine")
    scale.add_argument("--here", action="store_true", help="all shapes, on this machine")
    scale.add_argument("--slurm", action="store_true", help="all shapes, on a node that srun gets")
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: print the command")
    parser.add_argument(
        "--srun", help='with --slurm: more of srun, such as --srun="--partition cpu"'
    )
    add_result_options(parser)
    options = parser.parse_args(arguments)
    check_result_options(options)
    if not options.slurm and (options.dry_run or options.srun is not None):
        raise ValueError("--dry-run and --srun are for --slurm; nothing else is submitted")
    options.srun = split_words(options.srun, "--srun")
    # Read before the work, since it may be unreadable.
    paper_s = {} if missing(options.published, [PLANNER]) else read_planner(options.published)
    allowed = _allowed(options.published)
    if options.slurm:
        return _on_a_node(options)
    shapes = product(TOY_RANKS, TOY_CAPACITIES) if options.toy else product(RANKS, CAPACITIES)
    result = Result(11, _TITLE, "toy" if options.toy else "here")
    result.tables += [Table("Milliseconds of a solve, mean of ten", rows([*shapes], paper_s))]
    result.notes += missing(options.published, [PLANNER])
    result.notes += allowed
    result.notes += [
        f"E = {EXPERTS}. The paper's times are of its authors' machine and code. laer is their "
        "planner as it is here, in Python; greedy, the default, has a C++ core."
    ]
    return finish(result, Path(options.work_dir) / f"figure11-{result.scale}")


def rows(
    shapes: Sequence[tuple[int, int]], paper_s: Mapping[tuple[int, int], float]
) -> list[dict[str, Any]]:
    found = []
    for num_ranks, capacity in shapes:
        geometry = Geometry(num_ranks, EXPERTS, capacity, NODE_SIZE)
        static = ExpertLayout.static(num_ranks, capacity, EXPERTS)
        row: dict[str, Any] = {"ranks": num_ranks, "capacity": capacity}
        seconds = paper_s.get((num_ranks, capacity))
        row["paper"] = None if seconds is None else 1e3 * seconds
        for name in STRATEGIES:
            strategy = make_strategy(name, geometry=geometry, costs=paper_costs())
            rng = np.random.default_rng(0)
            counts_NE = rng.integers(0, LARGEST_COUNT + 1, (num_ranks, EXPERTS))
            solve = partial(strategy.plan, counts_NE, static)
            row[name] = statistics.fmean(times_ms(solve, SOLVES))
        found.append(row)
    return found


def _allowed(folder: Path | None) -> list[str]:
    """Describe the time per solve that the paper's iteration allows, for the line in its figure."""
    if missing(folder, [END_TO_END]) or folder is None:
        return []
    found = [
        cell.measured_s
        for cell in read_cells(folder)
        if (cell.model, cell.method, float(cell.aux_loss)) == ("mixtral-8x7b-e8k2", LAER, 1e-4)
    ]
    if not found:
        return []
    return [
        "The paper's line, LAER's time for a layer and microbatch of mixtral-8x7b-e8k2: "
        f"{1e3 * found[0] / _LAYERS / _MICROBATCHES:.1f} ms."
    ]


def _on_a_node(options: argparse.Namespace) -> int:
    """Run this file under srun, or print the command."""
    words = ["srun", "--nodes", "1", "--ntasks", "1", *options.srun]
    words += [sys.executable, str(Path(__file__).resolve()), "--here"]
    words += ["--work-dir", str(Path(options.work_dir).resolve())]
    if options.published is not None:
        words += ["--published", str(options.published.resolve())]
    if options.dry_run:
        print(shell_words(words))
        return 0
    return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    program("scripts/paper/figure11.py", main)
