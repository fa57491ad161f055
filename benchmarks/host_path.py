"""Times the host in a layer, and the gap behind its gate: `python -m benchmarks.host_path`.

`--before DIR` names a checkout of another commit with its own native core. A worker process of each
commit then runs the same microbatches in turns, so that both meet the same machine:

    git worktree add --detach ../before COMMIT
    (cd ../before && python setup.py -q build_ext --inplace)
    python -m benchmarks.host_path --before ../before

One rank of N runs Megatron's MoE layer with FSEP on the CPU, with torch's fake process groups and
few small tokens, without its router and the compute of its home experts. So Python, torch and our
native code are timed, but neither a driver nor NCCL. The gap is from the counts' arrival to the
plan, in which a card has nothing to do; indices are made for the dispatch behind it. Every
microbatch is different, as in training. Times are CPU time of the single thread. Launches are those
of a card, as `benchmarks.launches` counts them, in a process of their own: torch's operations that
stand in for Triton's kernels are timed, but not counted.

Legend: N ranks, E experts, C slots per rank, K experts of a token, T tokens of a rank.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROUNDS, MICROBATCHES, REPEATS = 20, 8, 5
_TOKENS, _TOP_K, _NODE_SIZE = 64, 8, 8
_TIMES = ("gap", "indices", "forward", "backward")


class Case(NamedTuple):
    """One shape of a layer; with `replicas` every replica slot of its planned layout is in use."""

    ranks: int
    experts: int
    capacity: int
    mode: str
    sharding: str = "experts"
    replicas: bool = False

    def __str__(self) -> str:
        held = "two replicas a rank" if self.replicas else "no replicas"
        kind = f"{self.sharding}, {held}" if self.sharding == "experts" else self.sharding
        return f"N {self.ranks}, E {self.experts}, C {self.capacity}, {kind}, {self.mode}"


CASES = (
    Case(8, 128, 18, "adaptive"),
    Case(8, 128, 18, "forecast", replicas=True),
    Case(64, 256, 6, "adaptive"),
    Case(64, 256, 6, "forecast", replicas=True),
    *(Case(64, 256, 5, mode, "rows") for mode in ("forecast", "exact")),
)


def main(argv: Sequence[str] | None = None) -> int:
    # Not at the top: workers run this file with the modules of other commits.
    from benchmarks.command_line import checkout, parser_of
    from benchmarks.report import machine, print_table
    from megatron_laer.tools.cli.argument_types import between

    parser = parser_of("benchmarks.host_path", __doc__)
    parser.add_argument(
        "--before", type=checkout, metavar="DIR", help="a built checkout to compare to"
    )
    parser.add_argument(
        "--rounds", type=between(2, 10**6), default=ROUNDS, help="default %(default)s"
    )
    args = parser.parse_args(argv)
    trees = {"before": args.before} if args.before else {}
    trees["now"] = Path(__file__).resolve().parents[1]
    print(json.dumps(machine()))
    print_table([row for case in CASES for row in _rows(case, trees, args.rounds)])
    return 0


def _rows(case: Case, trees: dict[str, Path], rounds: int) -> Iterator[dict[str, Any]]:
    """Run a case's workers in turns; yield medians and quartiles of their rounds, and counts."""
    workers = {name: _start(case, tree) for name, tree in trees.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    try:
        for number in range(rounds + 1):
            for name in sorted(workers, reverse=bool(number % 2)):
                answer = _ask(workers[name])
                if number:  # the first one warms up
                    found[name].append(answer)
    finally:
        for worker in workers.values():
            _end(worker)
    for name, answers in found.items():
        row: dict[str, Any] = {"layer": str(case), "commit": name}
        for part in _TIMES:
            low, middle, high = statistics.quantiles([one[part] for one in answers], n=4)
            row[f"{part} µs"] = f"{middle:.0f} ({low:.0f} to {high:.0f})"
        counting = _start(case, trees[name], TRITON_INTERPRET="1")
        row |= _ask(counting)
        _end(counting)
        yield row


def _start(case: Case, tree: Path, **variables: str) -> subprocess.Popen[str]:
    # This file's own worker, with the package of the tree.
    environment = {"PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    environment |= {"OMP_NUM_THREADS": "1", "MEGATRON_LAER_DEVICE": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(case)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tree,
        env=os.environ | environment | variables,
    )


def _end(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.close()
    worker.wait()


def _ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    answer: dict[str, float] = json.loads(worker.stdout.readline())
    return answer


# Code of a worker, whose package may be another commit's.


def _work(case: Case) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # where Megatron prints too
    run = _layer(case)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)


def _layer(case: Case) -> Callable[[], dict[str, float]]:
    """Build the layer; the returned function runs its microbatches and returns times in µs.

    Where Triton interprets, it counts launches instead, of the second run of a microbatch.
    """
    launches = import_module("launches")  # next to this file
    from megatron_laer import launch

    launch.prepare()
    import torch

    from megatron_laer import session
    from megatron_laer.layer.dispatch import dispatcher
    from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner

    balanced = case.sharding == "experts" and case.mode == "adaptive"
    shape = launches.Case(
        *(case.capacity, case.ranks, case.experts, _TOP_K, _TOKENS),
        sharding=case.sharding,
        balanced=balanced,
    )
    layer = launches.build(shape, plan_mode=case.mode, planner="static", cluster="h100-8")
    if case.sharding == "experts":
        layer.experts.forward = lambda rows, _, probs: (rows * probs[:, None].to(rows.dtype), None)
    coordinator: Any = session.current_coordinator()
    coordinator.needs_steps = False
    if case.replicas:
        drawn = (coordinator.geometry.random_layout((seed,)) for seed in itertools.count())
        full = next(one for one in drawn if (one.slot_expert_S >= 0).all())
        coordinator.layouts._layouts[0] = full

    def microbatch(seed: int) -> tuple[Any, ...]:
        counts_NE = launches.counts_of(shape, seed)
        map_TE = launches.routing_of(shape, counts_NE[0])
        hidden = torch.randn(_TOKENS, 1, launches.HIDDEN, dtype=torch.bfloat16)
        return torch.from_numpy(counts_NE), map_TE, hidden, torch.rand(map_TE.shape) * map_TE

    microbatches = [microbatch(seed) for seed in range(MICROBATCHES)]
    taken: Counter[str] = Counter()
    timed = _timed(taken)
    MicrobatchPlanner._plan = timed("gap", MicrobatchPlanner._plan)  # type: ignore[method-assign]
    dispatcher.slot_permutation = timed("indices", dispatcher.slot_permutation)

    def once(counts_NE: Any, map_TE: Any, *values: Any) -> None:
        inputs = [value.detach().requires_grad_() for value in values]
        layer.route = lambda *_, **__: (inputs[1], map_TE)
        with launches.gathering(counts_NE):
            output, _ = timed("forward", layer)(inputs[0])
        timed("backward", output.backward)(output.detach())

    def run() -> dict[str, float]:
        taken.clear()
        for _ in range(REPEATS):
            for one in microbatches:
                once(*one)
        return {part: taken[part] / (REPEATS * MICROBATCHES) * 1e6 for part in _TIMES}

    def count() -> dict[str, float]:
        with launches.counting() as counter:
            launches.take_kernels_of_cuda(lambda: counter.add("triton::kernel"))
            for _ in range(2):
                counter.found.clear()
                once(*microbatches[0])
        kinds = Counter[str]()
        for (_, name), number in counter.found.items():
            kinds[launches.kind_of(name)] += number
        collectives = kinds.pop("collectives")
        return {"launches": kinds.total(), "collectives": collectives}

    return count if "TRITON_INTERPRET" in os.environ else run


def _timed(taken: Counter[str]) -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            result = function(*args, **kwargs)
            taken[part] += time.thread_time() - begin  # type: ignore[assignment]
            return result

        return call

    return timed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(Case(*json.loads(sys.argv[2])))
    else:
        from benchmarks.command_line import program

        program("python -m benchmarks.host_path", main)
