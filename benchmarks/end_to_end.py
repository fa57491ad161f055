"""Compares step times of stock EP and FSEP, end to end: `python -m benchmarks.end_to_end --help`.

Gloo ranks on this machine, one thread each, run Megatron's own training loop. All configurations
run in turn, again and again, in one start:

* the ideal: stock, with routing forced to balance;
* stock and FSEP under three skews and under Megatron's workloads W0 to W7;
* FSEP with layouts that never change, and on balanced routing in every mode.

The first output is each one's share of forced balance. `--tokens` compares the two exchanges of
tokens instead. `docs/performance.md` has the expected results.

Over 400 lines: one run, of whose measurements each table is a view.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a file

from benchmarks import routing
from benchmarks.command_line import (
    MOST_REPEATS,
    MOST_STEPS,
    RANKS,
    add_json,
    parser_of,
    program,
    write_json,
)
from benchmarks.end_to_end_cases import (
    BY_PARTS,
    FSEP,
    FULL,
    HALF,
    MODES,
    QUICK,
    QUICK_TOKENS,
    RIVALS,
    SKEWS,
    STOCK_RECOMPUTE,
    TOKENS,
    TOKENS_OF,
    Configuration,
    Size,
    by_parts,
    chosen,
    configurations,
    token_configurations,
)
from benchmarks.report import machine, print_table
from benchmarks.training_run import Measured, measure
from megatron_laer.cpu.ranks import RankPool
from megatron_laer.tools.cli.argument_types import between
from megatron_laer.tools.data import default_text_sources, prepare_data
from megatron_laer.tools.traces.workloads import WORKLOADS

# Goals: at least this share of the ideal's throughput; at most this slowdown on balanced routing.
LEAST_THROUGHPUT, MOST_SLOWDOWN = 0.90, 0.05

# The C library returns large arrays to the system and zeroes new ones. Ranks that keep their
# memory, as CUDA's allocator does, take 7 % less time per step and vary less.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything; return 1 if a skew is out of its range."""
    parser = parser_of("benchmarks.end_to_end", __doc__)
    parser.add_argument(
        "--ranks", type=int, choices=RANKS, default=2, help="gloo ranks; they share the cores"
    )
    add_json(parser)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--half", action="store_true", help="a model of an eighth of the work")
    models.add_argument("--quick", action="store_true", help="a small model: says nothing of speed")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--tokens", action="store_true", help="compare exchanges of tokens alone")
    parts.add_argument("--combined", action="store_true", help="combined 1F1B alone, in bf16")
    parser.add_argument("--repeats", type=between(1, MOST_REPEATS), help="of every configuration")
    parser.add_argument(
        "--steps", type=between(1, MOST_STEPS), help="that are counted, but for bursts"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="configurations whose names contain one of these, and stock's",
    )
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else HALF if options.half else FULL
    if options.tokens:
        size = QUICK_TOKENS if options.quick else TOKENS
    if options.repeats is not None:
        size = replace(size, repeats=options.repeats)
    if options.steps is not None:
        size = replace(size, steps=options.steps)
    if options.combined:
        size = by_parts(size)
    with tempfile.TemporaryDirectory() as scratch:
        if options.tokens:
            cases = token_configurations(size)
        else:
            cases = configurations(size, options.ranks, Path(scratch))
        if options.combined:
            cases = [case for case in cases if case.name in BY_PARTS]
        if options.only is not None:
            cases = chosen(cases, options.only)
        runs = run_all(size, options.ranks, cases, Path(scratch))
    result = summary(cases, runs, size) | {"machine": machine(), "ranks": options.ranks}
    report(cases, runs, size)
    write_json(options.json, result)
    wrong = [
        f"{skew}: stock's max/mean is {value:.2f}, which should be {routing.LEAST_SKEW} to "
        f"{routing.MOST_SKEW}"
        for skew, value in result["stock_max_over_mean"].items()
        if not routing.LEAST_SKEW <= value <= routing.MOST_SKEW
    ]
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


@dataclass(eq=False)
class Run:
    """One run of a configuration.

    `ideals` are runs of the ideal just before and just after. The ideal itself has only the one
    before, so that its shares show the machine's drift.
    """

    ranks: list[Measured]
    ideals: list[Run] = field(default_factory=list, repr=False)


# Runs of each configuration, in execution order.
Runs = dict[str, list[Run]]


def run_all(size: Size, ranks: int, cases: Sequence[Configuration], scratch: Path) -> Runs:
    """Run every configuration once, then again in opposite order; the ideal around every two.

    The machine's own speed drifts by more than the differences, so neighbours are compared.
    """
    runs: Runs = {case.name: [] for case in cases}
    ideal, *rivals = cases
    prefix = str(scratch / "text")
    prepare_data(default_text_sources()[:150], prefix, progress=False)
    flags = [*size.flags(prefix, ranks), "--data-cache-path", str(scratch / "cache")]
    with mock.patch.dict(os.environ, KEEP_MEMORY), RankPool(ranks) as pool:

        def run(case: Configuration) -> Run:
            start_s = time.monotonic()
            measured = pool.run(
                measure,
                [*flags, *case.flags.split()],
                case.routing,
                size.routing_shape(ranks),
                case.steps,
                timeout_s=3600,
            )
            found = Run(measured)
            runs[case.name].append(found)
            print(
                f"{case.name:38}{statistics.median(step_times(size, found)):9.1f} ms per step"
                f"{time.monotonic() - start_s:8.1f} s  load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            return found

        for repeat in range(size.repeats):
            print(f"repeat {repeat + 1}")
            before = run(ideal)
            before.ideals = [before]
            for pair in batched(rivals if repeat % 2 == 0 else rivals[::-1], 2):
                between = [run(case) for case in pair]
                after = run(ideal)
                after.ideals = [before]
                for rival in between:
                    rival.ideals = [before, after]
                before = after
    return runs


def step_times(size: Size, run: Run) -> list[float]:
    """Return the counted steps' times; rank 0 suffices, since every rank waits for the others."""
    return run.ranks[0].step_ms[size.warm_up :]


def cpu_times(size: Size, run: Run) -> list[float]:
    """Return each counted step's CPU time on its busiest rank: its time without waits."""
    by_step = zip(*(measured.cpu_ms for measured in run.ranks), strict=True)
    return [max(of_ranks) for of_ranks in by_step][size.warm_up :]


def spread(times: Iterable[float]) -> dict[str, float]:
    found = list(times)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def summary(cases: Sequence[Configuration], runs: Runs, size: Size) -> dict[str, Any]:
    """Return the JSON content, without unmeasured parts."""

    def times(name: str) -> dict[str, float]:
        return spread(time for run in runs[name] for time in step_times(size, run))

    def by_skew(kind: str) -> dict[str, Any]:
        return {skew: times(f"{kind}, {skew}") for skew in SKEWS if f"{kind}, {skew}" in runs}

    modes = [mode for mode in MODES if f"fsep balanced, {mode}" in runs]
    shares = {mode: exposed_shares(runs[f"fsep balanced, {mode}"], size) for mode in modes}

    def share(mode: str) -> float | None:
        return sum(shares[mode].values()) if mode in shares else None

    return {
        "ideal_ms": times("ideal"),
        "stock": by_skew("stock"),
        "fsep": by_skew("fsep"),
        "fsep_static": by_skew("fsep static"),
        "fsep_balanced_ms": times("fsep balanced, adaptive") if "adaptive" in shares else None,
        "stock_max_over_mean": {
            skew: stock_skew(runs[f"stock, {skew}"], size, bursts_only=skew == "burst")
            for skew in SKEWS
            if f"stock, {skew}" in runs
        },
        "exposed_restore_share": {
            "scheduled": share("adaptive"),
            "unscheduled": share("scheduler off"),
        },
        "exposed_restore_share_recompute": {
            "scheduled": share("recompute"),
            "unscheduled": share("recompute, scheduler off"),
        },
        "exposed_share_by_mode": shares,
        "fsep_balanced_by_mode_ms": {mode: times(f"fsep balanced, {mode}") for mode in modes},
        "cpu_ms": {
            case.name: spread(ms for run in runs[case.name] for ms in cpu_times(size, run))
            for case in cases
        },
        "share_of_forced_balance": kept(runs, size),
        "node_over_rank": node_over_rank(runs, size),
        "throughput_of_ideal": {case.name: throughput(runs, case.name, size) for case in cases},
        "burst_steps_ms": {
            kind: spread(burst_times(runs[f"{kind}, burst"]))
            for kind in ("stock", "fsep", "fsep static")
            if f"{kind}, burst" in runs
        },
    }


def exposed_shares(repeats: Sequence[Run], size: Size) -> dict[str, float]:
    """Return the exposed waits for restores and gradients per step time, means of ranks."""
    found = {}
    for name in ("restore", "reduce"):
        parts = [
            exposed / step
            for run in repeats
            for measured in run.ranks
            for exposed, step in zip(
                getattr(measured, f"{name}_exposed_ms")[size.warm_up :],
                measured.step_ms[size.warm_up :],
                strict=True,
            )
        ]
        found[name] = statistics.median(parts)
    return found


def stock_skew(repeats: Sequence[Run], size: Size, *, bursts_only: bool = False) -> float:
    """Return max/mean tokens per rank with stock placement, mean over the counted steps."""
    return statistics.fmean(
        skew
        for run in repeats
        for step, skew in enumerate(run.ranks[0].stock_skew)
        if (routing.is_burst(step) if bursts_only else step >= size.warm_up)
    )


def burst_times(repeats: Sequence[Run]) -> list[float]:
    return [
        step_ms
        for run in repeats
        for step, step_ms in enumerate(run.ranks[0].step_ms)
        if routing.is_burst(step)
    ]


def throughput(runs: Runs, name: str, size: Size) -> dict[str, float]:
    """Return the share of the ideal's throughput: the neighbours' median step over a run's own.

    Runs with recompute are compared with stock's of the same repeat. Workloads use mean steps,
    since bursts count.
    """
    typical = statistics.fmean if name.split(", ")[-1] in WORKLOADS else statistics.median

    def step_ms(run: Run) -> float:
        return typical(step_times(size, run))

    rivals = [run.ideals for run in runs[name]]
    if "recompute" in name and STOCK_RECOMPUTE in runs:
        rivals = [[run] for run in runs[STOCK_RECOMPUTE]]
    return spread(
        statistics.fmean(map(step_ms, against)) / step_ms(run)
        for run, against in zip(runs[name], rivals, strict=True)
    )


def kept(runs: Runs, size: Size) -> dict[str, dict[str, dict[str, float]]]:
    """Return the share of forced balance that each rival keeps under each measured workload."""
    return {
        workload: {
            kind: throughput(runs, f"{kind}, {workload}", size)
            for kind in RIVALS
            if f"{kind}, {workload}" in runs
        }
        for workload in routing.REPLAYED
        if f"fsep, {workload}" in runs
    }


def node_over_rank(runs: Runs, size: Size) -> dict[str, dict[str, dict[str, float]]]:
    """Return each repeat's ratios, tokens by node over tokens by rank, of step and CPU times."""
    found = {}
    for top in TOKENS_OF:
        by_rank, by_node = (runs.get(f"fsep {top}, tokens by {by}", []) for by in ("rank", "node"))
        if by_node:
            found[top] = {
                name: spread(
                    statistics.median(times(size, node)) / statistics.median(times(size, rank))
                    for node, rank in zip(by_node, by_rank, strict=True)
                )
                for name, times in (("step", step_times), ("processor", cpu_times))
            }
    return found


def report(cases: Sequence[Configuration], runs: Runs, size: Size) -> None:
    """Print the shares of forced balance, the table of all runs, and the goals."""
    print_table(
        [
            {
                "share of forced balance": f"{workload} {WORKLOADS[workload].title}",
                **{kind: round(share["median"], 3) for kind, share in shares.items()},
                **{
                    f"{kind} least - most": f"{share['min']:.3f} - {share['max']:.3f}"
                    for kind, share in shares.items()
                },
            }
            for workload, shares in kept(runs, size).items()
        ]
    )
    rows = []
    for case in cases:
        repeats = runs[case.name]
        times = spread(time for run in repeats for time in step_times(size, run))
        fsep = [skew for run in repeats for skew in run.ranks[0].fsep_skew]
        is_fsep = FSEP in case.flags
        exposed = exposed_shares(repeats, size) if is_fsep else {}
        shares = throughput(runs, case.name, size)
        rows.append(
            {
                "configuration": case.name,
                **{f"{key} ms": round(value, 1) for key, value in times.items()},
                "CPU ms": round(
                    statistics.median(ms for run in repeats for ms in cpu_times(size, run)), 1
                ),
                "of ideal": round(shares["median"], 3),
                "least": round(shares["min"], 3),
                "most": round(shares["max"], 3),
                "max/mean stock": round(stock_skew(repeats, size), 2),
                "max/mean fsep": round(statistics.fmean(fsep), 2) if fsep else "",
                "exposed restore %": round(100 * exposed["restore"], 2) if is_fsep else "",
                "exposed reduce %": round(100 * exposed["reduce"], 2) if is_fsep else "",
            }
        )
    print_table(rows)
    for top, ratios in node_over_rank(runs, size).items():
        for name, ratio in ratios.items():
            print(
                f"{top}: {name} time through nodes over that by rank {ratio['median']:.3f} "
                f"({ratio['min']:.3f} to {ratio['max']:.3f} in repeats)"
            )
    goals = {f"fsep, {skew}": LEAST_THROUGHPUT for skew in ("fixed", "drifting")}
    goals |= {f"fsep balanced, {mode}": 1 / (1 + MOST_SLOWDOWN) for mode in MODES}
    for name, least in goals.items():
        if name in runs:
            share = throughput(runs, name, size)["median"]
            verdict = "met" if share >= least else "MISSED"
            against = "stock's that recomputes" if "recompute" in name else "the ideal"
            print(f"{verdict:7} {name}: {share:.3f} of {against}, goal {least:.3f}")


if __name__ == "__main__":
    program("python -m benchmarks.end_to_end", main)
