"""Figure 1 motivates: skewed loads of experts, and the token exchange's share of a step.

Both are of recorded routing, or of routing as the paper's. Shares are predicted by `simulate`.

Legend: R records, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

import numpy as np

from benchmarks.command_line import program
from benchmarks.published_files import FSDP, read_breakdown
from megatron_laer.tools.cli import prediction_input
from megatron_laer.tools.cli.argument_types import path
from megatron_laer.tools.cli.program import Parser
from megatron_laer.tools.simulator.iteration.methods import STOCK
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.traces import read_trace
from megatron_laer.tools.traces.records import Trace
from megatron_laer.tools.traces.workloads import PAPER
from scripts.paper.methods import FSDP_EP, simulated
from scripts.paper.published import BREAKDOWN, missing
from scripts.paper.runner import add_result_options, check_result_options, finish, split_extra
from scripts.paper.tables import Result, Table

_TITLE = "Skewed loads, and the share of the token exchange"
# The paper's sizes, of routing that is not recorded.
_RANKS, _TOKENS = 32, 16384
_NOTES = (
    "The token exchange includes waits for the busiest rank, as in the paper.",
    "balanced is --workload W0 with as many ranks and tokens.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the skew and predict shares; raise ValueError or OSError for bad input first."""
    words, extra = split_extra(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        prog="scripts/paper/figure1.py",
        description=f"The paper's figure 1: {_TITLE}. It needs no GPU.",
        epilog="What follows -- is given to simulate, such as --ranks 64.",
    )
    parser.add_argument(
        "trace", nargs="?", type=path, help=f"by --fsep-record DIR trace; default: workload {PAPER}"
    )
    parser.add_argument("--model", default="mixtral-8x7b-e8k2", help="default %(default)s")
    parser.add_argument("--cluster", default="a100-4x8-ib800", help="default %(default)s")
    add_result_options(parser)
    options = parser.parse_args(words)
    check_result_options(options)
    lacks = missing(options.published, [BREAKDOWN])
    published = {} if lacks else read_breakdown(options.published)
    about = ["--model", options.model, "--cluster", options.cluster, "--recompute", "compute"]
    about += ["--method", STOCK, FSDP_EP, *extra]
    if options.trace is None:
        about = ["--microbatches", "2", *about]
        sizes = ["--ranks", str(_RANKS), "--tokens", str(_TOKENS)]
        skewed = simulated(["--workload", PAPER, *sizes, *about])
    else:
        skewed = simulated([str(options.trace), *about])
    run = skewed["run"]
    sizes = ["--ranks", str(run["ranks"]), "--tokens", str(run["tokens"])]
    even = simulated(["--workload", "W0", *sizes, *about])
    model = read_model(options.model)
    if options.trace is None:
        trace = prediction_input.workload(model, PAPER, run["ranks"], run["tokens"])
    else:
        trace = read_trace(options.trace, num_experts=model.num_experts)
    of_paper = published.get((options.model, FSDP))
    share = None if of_paper is None else of_paper.tokens_s / of_paper.total_s
    result = Result(1, _TITLE, "simulated")
    result.tables += [
        Table("Loads over the mean, means over microbatches", _skew(trace)),
        Table(
            "Token exchange's share of a step",
            [*_shares("as given", skewed, {FSDP_EP: share}), *_shares("balanced", even, {})],
        ),
    ]
    result.notes += [*lacks, *_NOTES]
    return finish(result, Path(options.work_dir) / "figure1")


def _skew(trace: Trace) -> list[dict[str, Any]]:
    """Describe each layer's loads; `stays` is how often the hottest expert is the one before."""
    names = "hottest expert", "coldest expert", "stays"
    rows = []
    for layer, name in enumerate(trace.layers):
        loads_RE = trace.counts_RNE[trace.layer_R == layer].sum(axis=1, dtype=np.int64)
        over_RE = loads_RE / loads_RE.mean(axis=1, keepdims=True)
        hottest_R = over_RE.argmax(axis=1)
        stays = (hottest_R[1:] == hottest_R[:-1]).mean() if len(hottest_R) > 1 else np.nan
        means = over_RE.max(axis=1).mean(), over_RE.min(axis=1).mean(), stays
        rows.append({"layer": name, **dict(zip(names, map(float, means), strict=True))})
    mean = {name: float(np.mean([row[name] for row in rows])) for name in names}
    return [*rows, {"layer": "mean", **mean}]


def _shares(
    routing: str, case: dict[str, Any], paper: dict[str, float | None]
) -> list[dict[str, Any]]:
    """Make a row of each method's predicted step; `paper` are published shares by method."""
    rows = []
    for method, found in case["methods"].items():
        exchange_s = found["exposed_s"]["tokens"] + found["waiting_s"]
        step_s = found["iteration_s"]["value"]
        rows.append(
            {"routing": routing, "method": method, "paper share": paper.get(method)}
            | {"share": exchange_s / step_s, "exchange s": exchange_s, "step s": step_s}
            | {"max/mean": found["max_over_mean"]}
        )
    return rows


if __name__ == "__main__":
    program("scripts/paper/figure1.py", main)
