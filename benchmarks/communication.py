"""Counts the bytes that restores and gradients put on the links, and holds them to the formulas.

Usage: `python -m benchmarks.communication --help`.

Eight gloo ranks stand for 1, 2, 4 and 8 nodes. Every exchange is run and compared with plain
indexing. Its bytes are counted from the sizes given to the collectives, and compared with the
formulas of `docs/communication.md` on every rank. The JSON has the rank that receives most.

Legend: N ranks, E experts, C slots per rank, S = N·C slots, R rows, r rows of a slice, K columns.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.command_line import add_json, parser_of, program, write_json
from megatron_laer.arrays import Int64
from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.sharding import row_bounds
from megatron_laer.planner.traffic import Traffic, reduce_traffic, restore_traffic
from megatron_laer.runtime.comm import process_groups
from megatron_laer.runtime.comm.exchange import (
    HierarchicalExchange,
    ReusableWeights,
    flat_exchange,
    node_exchange,
)
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.comm.stages import ExchangeCount

try:
    from benchmarks.report import print_table
except ModuleNotFoundError:  # run as a file, not as a module
    from report import print_table  # type: ignore[import-not-found,no-redef,unused-ignore]

RANKS = 8
NODE_SIZES = (8, 4, 2, 1)
DTYPE = torch.bfloat16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """A layer with its successive layouts, and (R, K) of its matrices."""

    name: str
    layouts: tuple[ExpertLayout, ...]
    matrices: tuple[tuple[int, int], ...]


def workloads(quick: bool) -> list[Workload]:
    """Return the workloads; the first goes into the JSON, and has each expert twice per half."""
    hidden, ffn = (64, 96) if quick else (512, 1024)
    twice = ExpertLayout.from_slots(RANKS, 2, 4, np.arange(RANKS * 2) % 4)
    found = [Workload("E=4 C=2", (twice,), ((2 * ffn, hidden), (hidden, ffn)))]
    # Rows and experts that N does not divide, and E > N.
    for capacity, experts in ((2, 8), (2, 5), (3, 12), (1, 8)):
        layouts = tuple(
            ExpertLayout.random(RANKS, capacity, experts, seed=(experts, step))
            for step in range(2 if quick else 8)
        )
        found.append(
            Workload(f"random E={experts} C={capacity}", layouts, ((2 * ffn + 3, 40), (5, ffn)))
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all exchanges; return 1 if any count differs from its formula."""
    parser = parser_of("benchmarks.communication", __doc__)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="small matrices, fewer layouts")
    options = parser.parse_args(arguments)

    cases = workloads(options.quick)
    by_rank = run_ranks(options.quick)
    first, wrong = [], 0
    for case in cases:
        rows = list(summary(case, [counts[case.name] for counts in by_rank]))
        print(f"{case.name}, largest rank:")
        print_table(rows)
        wrong += sum(
            row["intra_node_bytes"] != row["formula_intra"]
            or row["inter_node_bytes"] != row["formula_inter"]
            or not row["all_ranks_equal_formula"]
            for row in rows
        )
        if case is cases[0]:
            first = [
                {key: value for key, value in row.items() if key != "all_ranks_equal_formula"}
                for row in rows
                if row["what"] in ("restore", "gradients")
            ]
    print(f"{wrong} rows differ from their formula" if wrong else "every count equals its formula")
    write_json(options.json, first)
    return int(wrong > 0)


# Intra-node and inter-node bytes received, by (exchange, node size, algorithm, step).
Counts = dict[tuple[str, int, str, int], Int64]


def summary(case: Workload, counts_of_ranks: Sequence[Counts]) -> Iterator[dict[str, Any]]:
    """Yield a row per kind of exchange, summed over layouts, of the rank that receives most."""
    keys = sorted(
        {key[:3] for key in counts_of_ranks[0]}, key=lambda key: (key[0], -key[1], key[2])
    )
    for what, node_size, algorithm in keys:
        steps = sorted(
            key[3] for key in counts_of_ranks[0] if key[:3] == (what, node_size, algorithm)
        )
        counted_2N = np.zeros((2, RANKS), dtype=np.int64)
        formula_2N = np.zeros((2, RANKS), dtype=np.int64)
        for step in steps:
            key = (what, node_size, algorithm, step)
            counted_2N += np.array([counts[key] for counts in counts_of_ranks]).T
            traffic = formula(case, what, node_size, algorithm, step)
            formula_2N += np.stack([traffic.intra_N, traffic.inter_N]) * DTYPE.itemsize
        yield {
            "what": what,
            "ranks": RANKS,
            "node_size": node_size,
            "algorithm": algorithm,
            "intra_node_bytes": int(counted_2N[0].max()),
            "inter_node_bytes": int(counted_2N[1].max()),
            "formula_intra": int(formula_2N[0].max()),
            "formula_inter": int(formula_2N[1].max()),
            "all_ranks_equal_formula": bool((counted_2N == formula_2N).all()),
        }


def formula(
    case: Workload, what: str, node_size: int, algorithm: ExchangeAlgorithm, step: int
) -> Traffic:
    layout = case.layouts[step]
    if what == "gradients":
        return reduce_traffic(layout, node_size, case.matrices, algorithm)
    before = case.layouts[step - 1] if what == "changed slots" else None
    return restore_traffic(layout, node_size, case.matrices, algorithm, before=before)


def run_ranks(quick: bool) -> list[dict[str, Counts]]:
    """Return each rank's counts by workload; every rank is a new process."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    processes, pipes = [], []
    for rank in range(RANKS):
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(there, rank, address, quick)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise SystemExit("a rank failed; its error is above") from None
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()


def serve(pipe: Connection, rank: int, address: str, quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    found: dict[str, Counts] = {case.name: {} for case in workloads(quick)}
    for node_size in NODE_SIZES:
        world = dist.group.WORLD
        assert world is not None
        groups = process_groups.create_groups(world, node_size, dist.new_group)
        for case in workloads(quick):
            for algorithm in ExchangeAlgorithm:
                make = flat_exchange if algorithm == ExchangeAlgorithm.FLAT else node_exchange
                exchange = make(groups)
                for what, step, received_2 in exchange_all(case, exchange, rank):
                    found[case.name][what, node_size, algorithm, step] = received_2
        groups.destroy()
    pipe.send(found)
    dist.barrier()
    dist.destroy_process_group()


def exchange_all(
    case: Workload, exchange: HierarchicalExchange, rank: int
) -> Iterator[tuple[str, int, Int64]]:
    """Restore and reduce under each layout, and update weights from the previous layout."""
    count = exchange.count
    generator = torch.Generator().manual_seed(0)
    experts = case.layouts[0].num_experts
    whole = [
        torch.randn((experts, rows, columns), generator=generator).to(DTYPE)
        for rows, columns in case.matrices
    ]
    slices = []
    for matrix_ERK in whole:
        bounds = row_bounds(matrix_ERK.shape[1], RANKS)
        slices.append(matrix_ERK[:, bounds[rank] : bounds[rank + 1]].contiguous())
    before: list[ReusableWeights] = []
    for step, layout in enumerate(case.layouts):
        index, mine = layout_index(layout, CPU), list(layout.experts_of(rank))
        start = received(count, "restore")
        restored = []
        for matrix_ERK, slice_ErK in zip(whole, slices, strict=True):
            restored.append(exchange.restore(slice_ErK, index, matrix_ERK.shape[1]))
            check(restored[-1], matrix_ERK[mine])
        yield "restore", step, received(count, "restore") - start

        start = received(count, "restore")
        for matrix_ERK, slice_ErK, reuse in zip(whole, slices, before, strict=False):
            exchange.restore(slice_ErK, index, matrix_ERK.shape[1], reuse=reuse)
            check(reuse.matrix_CRK, matrix_ERK[mine])
        if before:
            yield "changed slots", step, received(count, "restore") - start

        start = received(count, "reduce")
        replicas_E11 = torch.from_numpy(layout.replicas_E.copy()).to(DTYPE)[:, None, None]
        for slice_ErK, matrix_CRK in zip(slices, restored, strict=True):
            # The sum of ones is the number of replicas, exact in bfloat16.
            reduced = exchange.reduce(torch.ones_like(matrix_CRK), index)
            check(reduced, replicas_E11.expand_as(slice_ErK))
        yield "gradients", step, received(count, "reduce") - start
        before = [ReusableWeights(index, matrix_CRK) for matrix_CRK in restored]


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise RuntimeError for a wrong result, whose bytes would mean nothing."""
    if not torch.equal(got, expected):
        raise RuntimeError("an exchange gave a wrong result")


def received(count: ExchangeCount, what: str) -> Int64:
    """Return the intra-node and inter-node bytes received so far by exchange `what`."""
    return np.array([getattr(count, f"{what}_intra_bytes"), getattr(count, f"{what}_inter_bytes")])


if __name__ == "__main__":
    program("python -m benchmarks.communication", main)
