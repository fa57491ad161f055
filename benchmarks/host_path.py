"""Times the host between the counts' arrival and the dispatch: `python -m benchmarks.host_path`.

`--before DIR` names a checkout of an earlier commit with its own native core. A worker process of
each commit then processes the same microbatches in turns, so that both meet the same machine:

    git worktree add --detach ../before COMMIT
    (cd ../before && python setup.py -q build_ext --inplace)
    python -m benchmarks.host_path --before ../before

It times our Python and C++ from counts on the host to the last number that the permutation's
kernels need. Parts are the guard, one rank's row and columns, the digest of the decision, splits,
and the uploaded indices. Restores, uploads and Megatron's own work are excluded. Every microbatch
is different, as in training. Times are CPU time of the single thread, so that other work on the
machine matters less.

Legend: N ranks, E experts, C slots per rank.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ((64, 64, 4), (64, 256, 5))
NODE_SIZE, RANK = 8, 11
MICROBATCHES, ROUNDS = 16, 20
# Pairs per rank: with few tokens no change of layout pays, which `adaptive` knows without a solve.
TOKENS, FEW_TOKENS = 65536, 8192
MODES = ("forecast", "adaptive, keeps", "adaptive, solves", "exact")
PARTS = ("decide", "rank", "sizes", "indices")
_ROOT = Path(__file__).resolve().parents[1]

Path_ = Callable[[], dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    # Not at the top: workers run this file with the modules of earlier commits.
    from benchmarks.command_line import checkout, parser_of
    from megatron_laer.tools.cli.argument_types import between

    parser = parser_of("benchmarks.host_path", __doc__)
    parser.add_argument(
        "--before", type=checkout, metavar="DIR", help="a built checkout to compare to"
    )
    parser.add_argument(
        "--rounds", type=between(2, 10**6), default=ROUNDS, help="default %(default)s"
    )
    args = parser.parse_args(argv)
    trees = {"now": _ROOT} | ({"before": args.before} if args.before else {})
    workers = {name: _start(tree) for name, tree in trees.items()}
    try:
        rows = [
            row
            for shape in SHAPES
            for mode in MODES
            for row in _measure(workers, shape, mode, args.rounds)
        ]
    finally:
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()
    report = importlib.import_module("benchmarks.report")
    print(json.dumps(report.machine()))
    report.print_table(rows)
    return 0


def _measure(
    workers: dict[str, subprocess.Popen[str]], shape: tuple[int, int, int], mode: str, rounds: int
) -> Iterator[dict[str, Any]]:
    """Run the workers in turns; a ratio compares two consecutive turns."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name in sorted(workers, reverse=bool(number % 2)):
            answer = _ask(workers[name], {"shape": shape, "mode": mode})
            if number:  # the first one warms up
                taken[name].append(answer)
    wholes = {name: [answer["all"] for answer in answers] for name, answers in taken.items()}
    for name, answers in taken.items():
        row: dict[str, Any] = {"N, E, C": ", ".join(map(str, shape)), "mode": mode, "commit": name}
        for part in (*PARTS, "all"):
            row[f"{part} µs"] = round(statistics.median(answer[part] for answer in answers), 1)
        row["solved"] = answers[0]["solved"]
        row["taken"] = answers[0]["taken"]
        if name == "now" and "before" in wholes:
            ratios = [a / b for a, b in zip(wholes["now"], wholes["before"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row["ratio"], row["quartiles"] = round(middle, 3), f"{low:.3f} to {high:.3f}"
        else:
            row["ratio"], row["quartiles"] = "", ""
        yield row


def _start(tree: Path) -> subprocess.Popen[str]:
    # This file's own worker, with the modules of the tree: an earlier commit may not have it.
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code.replace("sys.argv[0]", repr(__file__)), str(tree), "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
    )


def _ask(worker: subprocess.Popen[str], question: object) -> dict[str, float]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    answer: dict[str, float] = json.loads(worker.stdout.readline())
    return answer


# Code of a worker, whose modules may be those of an earlier commit.


def _work() -> None:
    paths: dict[str, Path_] = {}
    for line in sys.stdin:
        question = json.loads(line)
        key = line
        if key not in paths:
            paths[key] = _host_path(tuple(question["shape"]), question["mode"])
        print(json.dumps(paths[key]()), flush=True)


def _host_path(shape: tuple[int, int, int], mode: str) -> Path_:
    """Prepare microbatches; the returned function processes each once and returns means in µs."""
    from megatron_laer.planner.construct import construct_layout
    from megatron_laer.planner.costs import CostModel
    from megatron_laer.planner.geometry import Geometry
    from megatron_laer.planner.guard import Guard
    from megatron_laer.planner.layout import ExpertLayout

    num_ranks, num_experts, capacity = shape
    geometry = Geometry(num_ranks, num_experts, capacity, NODE_SIZE)
    try:
        clusters = importlib.import_module("megatron_laer.planner.cluster_files")
    except ModuleNotFoundError:  # in earlier commits
        clusters = importlib.import_module("megatron_laer.planner.clusters")
    cluster = clusters.load_cluster("a100-4x8-ib800")
    costs = CostModel(cluster, 4096, 14336, True, 2)
    guard: Any = Guard(mode.split(",")[0], costs, geometry)  # type: ignore[arg-type]
    static = ExpertLayout.static(num_ranks, capacity, num_experts)
    rng = np.random.default_rng(0)
    cases: list[tuple[Any, Any]] = []
    tokens = FEW_TOKENS if mode.endswith("keeps") else TOKENS
    for _ in range(20 * MICROBATCHES):
        share_E = rng.permutation(1.0 / np.arange(1, num_experts + 1))
        before_E = share_E * rng.uniform(0.8, 1.2, num_experts)
        now_NE, before_NE = (
            rng.multinomial(tokens, part_E / part_E.sum(), size=num_ranks)
            for part_E in (share_E, before_E)
        )
        planned = construct_layout(before_NE, static, NODE_SIZE)
        # As they arrive from the exchange: a slice of rows with other numbers.
        arrived_NE = np.concatenate([now_NE, np.zeros((num_ranks, 3), dtype=np.int64)], axis=1)
        counts_NE = arrived_NE[:, :num_experts]
        if mode.startswith("adaptive"):
            solved = guard.decide(counts_NE, planned).solved
            if solved != mode.endswith("solves"):
                continue
        planned.digest  # noqa: B018 - it rode on the exchange
        cases.append((counts_NE, planned))
        if len(cases) == MICROBATCHES:
            break
    assert len(cases) == MICROBATCHES, f"{mode} is too rare at {shape}"
    decisions = [guard.decide(*case) for case in cases]
    facts = {
        "solved": sum(decision.solved for decision in decisions) / MICROBATCHES,
        "taken": sum(decision.replanned for decision in decisions) / MICROBATCHES,
    }
    steps = _steps_now(guard) if hasattr(decisions[0], "rank_quotas") else _steps_before(guard)

    def run() -> dict[str, float]:
        sums = dict.fromkeys((*PARTS, "all"), 0.0)
        for case in cases:
            value: Any = case
            begin = last = time.thread_time()
            for part, step in zip(PARTS, steps, strict=True):
                value = step(value)
                now = time.thread_time()
                sums[part] += now - last
                last = now
            sums["all"] += last - begin
        return {part: total / MICROBATCHES * 1e6 for part, total in sums.items()} | facts

    return run


def _steps_now(guard: Any) -> tuple[Callable[[Any], Any], ...]:
    """Return the steps of the coordinator and the dispatcher, by part."""
    import torch

    from megatron_laer.runtime.comm.collectives import decision_digest

    def rank(decision: Any) -> Any:
        decision_digest(decision.layout, solved=decision.solved)
        return decision.rank_quotas

    def sizes(quotas: Any) -> Any:
        _ = quotas.num_sent, quotas.num_received
        torch.tensor(quotas.tokens_C)
        return quotas

    def indices(quotas: Any) -> Any:
        return torch.from_numpy(quotas.runs)

    return lambda case: guard.decide(*case, RANK), rank, sizes, indices


def _steps_before(guard: Any) -> tuple[Callable[[Any], Any], ...]:
    """Return the same for an earlier commit, whose ranks request each number separately."""
    import torch

    from megatron_laer.layer.dispatch.slots import slot_ranges

    def rank(decision: Any) -> Any:
        quotas = decision.quotas
        return decision.layout, quotas.rank_row(RANK), quotas.rank_columns(RANK)

    def sizes(known: Any) -> Any:
        layout, row_S, columns_NC = known
        row_S.reshape(layout.num_ranks, -1).sum(axis=1).tolist()
        columns_NC.sum(axis=1).tolist()
        columns_NC.sum(axis=0).tolist()
        int(row_S.sum())
        torch.from_numpy(columns_NC).sum(dim=0)
        return known

    def indices(known: Any) -> Any:
        layout, row_S, _ = known
        return torch.from_numpy(slot_ranges(row_S, layout.slot_expert_S))

    return lambda case: guard.decide(*case), rank, sizes, indices


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _work()
    else:
        from benchmarks.command_line import program

        program("python -m benchmarks.host_path", main)
