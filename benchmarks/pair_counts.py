"""Counts pairs of experts in training: `python -m benchmarks.pair_counts`.

Two ranks train in Megatron's own loop, and count the pairs of every step. Both times are processor
time of a rank's whole process in one run, so that other work on the machine matters little. The
share is of steps that are counted; `--fsep-set pairs_interval` divides it.

Legend: L MoE layers, T tokens of a rank and microbatch, E experts, K top-k.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import report
from benchmarks.command_line import add_json, parser_of, program, write_json
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.device import CPU_FLAGS
from megatron_laer.runtime.pair_counts import PairCounts
from megatron_laer.runtime.planning.planner_rank import PlannerRank
from megatron_laer.tools.cli.argument_types import between

RANKS, LAYERS, TOKENS = 2, 2, 1024
# Experts, top-k, hidden size and width: an eighth to a half of Mixtral's and Qwen3's sizes.
SHAPES = ((8, 2, 1024, 1792), (64, 8, 512, 256), (128, 8, 1024, 384))
# Not counted: first calls choose kernels and allocate.
WARM_UP = 2

_COUNTED = (
    (PairCounts, "begin_step"),
    (PairCounts, "add"),
    (PairCounts, "end_step"),
    (PairCounts, "take"),
    (PlannerRank, "put_pairs"),  # the planner rank's recording
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.pair_counts", __doc__)
    parser.add_argument("--steps", type=between(1, 1000), default=6, help="default %(default)s")
    add_json(parser)
    args = parser.parse_args(argv)
    rows = []
    with RankPools(RANKS) as pools, tempfile.TemporaryDirectory() as folder:
        for number, shape in enumerate(SHAPES):
            flags = _flags(shape, args.steps + WARM_UP, Path(folder) / str(number))
            for rank, found in enumerate(pools(RANKS).run(_measure, flags)):
                rows.append({"E, K, H, F": ", ".join(map(str, shape)), "rank": rank, **found})
    report.print_table(rows)
    write_json(args.json, {"machine": report.machine(), "rows": rows})
    return 0


def _flags(shape: tuple[int, int, int, int], steps: int, folder: Path) -> list[str]:
    experts, topk, hidden, ffn = shape
    return [
        *CPU_FLAGS,
        *f"""
        --num-layers {LAYERS} --hidden-size {hidden} --num-attention-heads 8
        --ffn-hidden-size {ffn} --moe-ffn-hidden-size {ffn} --num-experts {experts}
        --moe-router-topk {topk} --moe-router-load-balancing-type none
        --moe-token-dispatcher-type alltoall --expert-model-parallel-size {RANKS}
        --seq-length {TOKENS} --max-position-embeddings {TOKENS} --micro-batch-size 1
        --global-batch-size {RANKS} --train-iters {steps} --swiglu --disable-bias-linear
        --lr 1e-4 --eval-iters 0 --eval-interval 1000 --log-interval 1000 --num-workers 0
        --mock-data --tokenizer-type NullTokenizer --vocab-size 1000
        --expert-parallel-mode fsep --fsep-sharding experts --fsep-set pairs_interval=1
        --fsep-record {folder} trace
        """.split(),
    ]


def _measure(flags: list[str]) -> dict[str, Any]:
    """Train on this rank; return the parts of its steps. Collective."""
    from megatron_laer.cpu.training import train
    from megatron_laer.session import current_coordinator

    spent: list[float] = [0.0]
    sent: list[int] = []

    def after_step(_: object) -> tuple[float, float]:
        coordinator = current_coordinator()
        assert coordinator is not None
        sent.append(coordinator.pairs.sent_bytes)
        return time.process_time(), spent[0]

    with _timed(spent):
        probes = train(flags, after_step).probes[WARM_UP - 1 :]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(probes)]
    share = statistics.median(counting_s / step_s for step_s, counting_s in steps)
    return {
        "step ms": round(1e3 * statistics.median(step_s for step_s, _ in steps), 1),
        "counting ms": round(1e3 * statistics.median(counting_s for _, counting_s in steps), 2),
        "share %": round(100 * share, 3),
        "bytes sent": sent[-1] - sent[-2],
    }


@contextmanager
def _timed(spent: list[float]) -> Iterator[None]:
    """Add up the processor time of all that is done for pairs."""

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin_s = time.process_time()
            result = method(*args, **kwargs)
            spent[0] += time.process_time() - begin_s
            return result

        return run

    with ExitStack() as stack:
        for owner, name in _COUNTED:
            replaced = timed(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replaced))
        yield


if __name__ == "__main__":
    program("benchmarks.pair_counts", main)
