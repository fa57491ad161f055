"""Measures how far main gradients of experts are from fp64 in bf16 training.

Usage: `python -m benchmarks.gradient_error --help`.

Four gloo ranks, as two nodes, train one matrix in bf16: a linear layer per expert on random tokens.
The outputs' gradients are a fixed matrix times the token, plus noise. The GEMM back end
computes the slots' gradients, and the real exchange sums those of replicas.

Straight means that the sums are added to main gradients unchanged, as FSEP does. It is compared
with sums that are rounded to bf16 first, and with stock's fused accumulation. The latter adds the
products of all tokens to the main gradient in float32.

Legend: E experts, C slots per rank, T tokens, R rows, r rows of a rank, K columns.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, print_table
from megatron_laer.config import ExchangeAlgorithm
from megatron_laer.cpu.ranks import RankPool
from megatron_laer.layer.experts.gemm import slot_gemm
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.sharding import row_bounds
from megatron_laer.runtime.comm import process_groups
from megatron_laer.runtime.comm.exchange import flat_exchange, node_exchange
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.tools.cli.argument_types import between

RANKS, NODE_SIZE, CAPACITY = 4, 2, 2
ROWS, COLUMNS, TOKENS = 128, 96, 256
NOISE = 1.0
CPU = torch.device("cpu")

# By seed and way: squared errors on a rank; the key "" has the gradient's square.
Squares = list[dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.gradient_error", __doc__)
    parser.add_argument("--seeds", type=between(1, 1000), default=10)
    add_json(parser)
    options = parser.parse_args(arguments)
    rows = []
    with RankPool(RANKS) as pool:
        for algorithm in ExchangeAlgorithm:
            for replicas, microbatches in itertools.product((1, 2, 4), (1, 16)):
                by_rank = pool.run(measure, algorithm, replicas, microbatches, options.seeds)
                case = {"exchange": algorithm, "replicas": replicas, "microbatches": microbatches}
                rows.append(case | summary(by_rank))
    print(json.dumps(machine()))
    print("1e4 times the relative L2 distance from fp64: median of seeds (smallest, largest)")
    print_table(rows)
    write_json(options.json, rows)
    return 0


def summary(by_rank: Sequence[Squares]) -> dict[str, str]:
    errors: dict[str, list[float]] = {}
    for of_seed in zip(*by_rank, strict=True):
        total = {way: sum(squares[way] for squares in of_seed) for way in of_seed[0]}
        norm = total.pop("")
        for way, square in total.items():
            errors.setdefault(way, []).append(1e4 * (square / norm) ** 0.5)
    return {
        way: f"{statistics.median(found):.2f} ({min(found):.2f}, {max(found):.2f})"
        for way, found in errors.items()
    }


def measure(algorithm: str, replicas: int, microbatches: int, seeds: int) -> Squares:
    """Train on this rank; every expert has `replicas` replicas, elsewhere in each microbatch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        assert dist.group.WORLD is not None
        groups = process_groups.create_groups(dist.group.WORLD, NODE_SIZE, dist.new_group)
        make = flat_exchange if algorithm == ExchangeAlgorithm.FLAT else node_exchange
        exchange = make(groups)
        found = [squares(exchange, replicas, microbatches, seed) for seed in range(seeds)]
        groups.destroy()
        return found
    finally:
        dist.destroy_process_group()


def squares(exchange: Any, replicas: int, microbatches: int, seed: int) -> dict[str, float]:
    """Accumulate a step's gradients in each way, for this rank's rows."""
    rank, experts = exchange.groups.rank, RANKS * CAPACITY // replicas
    mine = slice(*row_bounds(ROWS, RANKS)[rank : rank + 2])
    shape = (experts, mine.stop - mine.start, COLUMNS)
    exact_ErK = torch.zeros(shape, dtype=torch.float64)
    ways = {name: torch.zeros(shape) for name in ("rounded first", "straight", "stock fused")}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(microbatches):
        layout = shuffled(experts, replicas, generator)
        grad_CRK = torch.empty(CAPACITY, ROWS, COLUMNS, dtype=torch.bfloat16)
        for slot, (expert, grad_TR, input_TK) in enumerate(tokens(layout, seed, generator)):
            exact_ErK[expert] += (grad_TR.double().T @ input_TK.double())[mine]
            ways["stock fused"][expert] += (grad_TR.float().T @ input_TK.float())[mine]
            if slot // CAPACITY == rank:
                place = slot % CAPACITY
                out_1RK = grad_CRK[place : place + 1]
                slot_gemm("loop").weight_grad(grad_TR, input_TK, [TOKENS], out_1RK)
        index = layout_index(layout, CPU)
        ways["rounded first"] += exchange.reduce(grad_CRK, index)
        exchange.reduce(grad_CRK, index, add_to=ways["straight"])
    result = {name: (found - exact_ErK).square().sum().item() for name, found in ways.items()}
    return {"": exact_ErK.square().sum().item()} | result


def shuffled(experts: int, replicas: int, generator: torch.Generator) -> ExpertLayout:
    """Place the experts in random order, each equally often, and on no rank twice."""
    order = torch.randperm(experts, generator=generator).tolist()
    return ExpertLayout.from_slots(RANKS, CAPACITY, experts, order * replicas)


def tokens(
    layout: ExpertLayout, seed: int, generator: torch.Generator
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each slot's expert, outputs' gradients and tokens: the same on every rank."""
    fixed = torch.Generator().manual_seed(seed)
    matrix_ERK = torch.randn(layout.num_experts, ROWS, COLUMNS, generator=fixed) / COLUMNS**0.5
    for expert in layout.to_list():
        input_TK = torch.randn(TOKENS, COLUMNS, generator=generator).bfloat16()
        noise_TR = NOISE * torch.randn(TOKENS, ROWS, generator=generator)
        grad_TR = input_TK.float() @ matrix_ERK[expert].T + noise_TR
        yield expert, grad_TR.bfloat16(), input_TK


if __name__ == "__main__":
    program("python -m benchmarks.gradient_error", main)
