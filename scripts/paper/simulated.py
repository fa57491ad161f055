"""Figures 8 and 10b by `simulate`, with planning of its own and nothing fitted; needs no GPU.

Routing is `--workload paper`, with the skew and drift of published tokens. Megatron's routers are
trained by other code than those, and its tokens are not published: its two rows show the skew of
the first iterations, and the later one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

from benchmarks.command_line import program
from benchmarks.flexmoe import FLEXMOE
from benchmarks.published_files import FLEX, FSDP, LAER, MEGATRON, MODELS, NO_LOSS, read_cells
from megatron_laer.tools.cli.program import Parser
from megatron_laer.tools.simulator.iteration.methods import FSEP, STOCK
from megatron_laer.tools.traces.workloads import PAPER, PAPER_FIRST
from scripts.paper.experiments import GPUS_PER_NODE, NODES, family
from scripts.paper.figure8 import EXPERIMENT
from scripts.paper.methods import FSDP_EP, simulated
from scripts.paper.methods import LAER as LAER_METHOD
from scripts.paper.published import END_TO_END, TOKENS, missing, read_balance
from scripts.paper.runner import add_result_options, check_result_options, finish
from scripts.paper.tables import Result, Table, ratio

_TITLE = "End to end, by simulation"
_RANKS, _BATCH, _MICROBATCHES = NODES * GPUS_PER_NODE, 128, 2
_METHODS = {FSDP: FSDP_EP, FLEX: FLEXMOE, LAER: LAER_METHOD, None: FSEP}
# Steps of the workload that have a forecast; their mean is predicted.
_STEPS = 7


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="scripts/paper/simulated.py", description=f"{_TITLE}; needs no GPU.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add_result_options(parser)
    options = parser.parse_args(arguments)
    check_result_options(options)
    lacks = missing(options.published, [END_TO_END, *TOKENS])
    paper_s: Mapping[tuple[str, str], float] = {}
    balance: Mapping[tuple[str, str], float] = {}
    if not lacks:
        paper_s = {
            (cell.model, cell.method): cell.measured_s
            for cell in read_cells(options.published)
            if cell.aux_loss == NO_LOSS and cell.dataset == "wikitext"
        }
        curves = read_balance(options.published)
        balance = {key: sum(curve) / len(curve) for key, curve in curves.items()}
    rows = [row for model in options.models for row in _rows(model, paper_s, balance)]
    result = Result(8, _TITLE, "simulated")
    result.tables.append(Table("Seconds per step, and LAER's speed over each", rows))
    result.notes += [*lacks, "Published balance with 8 experts is of iterations 3 to 5."]
    return finish(result, Path(options.work_dir) / "simulated")


def _rows(
    model: str,
    paper_s: Mapping[tuple[str, str], float],
    balance: Mapping[tuple[str, str], float],
) -> list[dict[str, Any]]:
    topk = family(model).partition("k")[2]
    ours = ["--recompute", "compute", "--microbatches", str(_MICROBATCHES), "--capacity", topk]
    ours += ["--tokens", str(EXPERIMENT.sequence * EXPERIMENT.sequences), "--sharding", "rows"]
    found = _predicted(model, PAPER, [*ours, "--method", *_METHODS.values()])
    laer_s, paper_laer_s = _seconds(found[LAER_METHOD]), paper_s.get((model, LAER))
    # A tensor-parallel group has one sequence at a time.
    tensor = EXPERIMENT.stock_tensor[family(model)]
    stock = ["--tensor-parallel", str(tensor), "--tokens", str(EXPERIMENT.sequence // tensor)]
    stock += ["--microbatches", str(_BATCH * tensor // _RANKS), "--method", STOCK]
    stock += ["--stock-expert-parallel", str(GPUS_PER_NODE), "--stock-dispatcher", "alltoall"]
    of_stock = [
        (MEGATRON, workload, _predicted(model, workload, stock)[STOCK])
        for workload in (PAPER_FIRST, PAPER)
    ]
    others = [(paper, PAPER, found[name]) for paper, name in _METHODS.items()]
    rows = []
    for paper, workload, method in [*of_stock, *others]:
        published_s, seconds = paper_s.get((model, paper or "")), _seconds(method)
        rows.append(
            {"model": model, "paper": paper, "ours": method["title"], "workload": workload}
            | {"paper s": published_s, "s": seconds}
            | {"paper speed": ratio(published_s, paper_laer_s), "speed": seconds / laer_s}
            | {"paper max/mean": balance.get((family(model), paper or ""))}
            | {"max/mean": method["max_over_mean"]}
        )
    return rows


def _predicted(model: str, workload: str, words: Sequence[str]) -> Mapping[str, Any]:
    run = ["--model", model, "--workload", workload, "--ranks", str(_RANKS)]
    # Some runs of the paper fit their cards only by what is not simulated.
    run += ["--cluster", "a100-4x8-ib800", "--memory-gib", "1000", "--steps", str(_STEPS)]
    case = simulated([*run, *words], ranges=False)
    return {name: {"title": name, **method} for name, method in case["methods"].items()}


def _seconds(method: Mapping[str, Any]) -> float:
    return float(method["iteration_s"]["value"])


if __name__ == "__main__":
    program("scripts/paper/simulated.py", main)
