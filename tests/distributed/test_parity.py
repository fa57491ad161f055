"""FSEP equals stock Megatron: losses, gradient norms, gradients and weights, whatever the layout.

Each line of `ROWS` is one combination. Stock and FSEP start from the same weights and train in
Megatron's own loop; FSEP gets a new random layout at every microbatch. The distance between two
stock runs with different expert placement is the noise floor: what rounding alone does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.parity.compare import Distance, distance
from tests.parity.flags import command_line
from tests.parity.training import Record, train
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

STEPS = 50
FSEP = " --expert-parallel-mode fsep"
RANDOM = " --fsep-planner random"
STEP = " --fsep-restore step"

FP32_BOUND = Distance(grads=1e-6, losses=1e-5, norms=1e-4, weights=1e-4)
# bf16 keeps 8 bits: a rounding is 4e-3 relative. Two layouts sum the same gradients in another
# order, which after some steps of Adam decides the rounding of many weights.
BF16_BOUND = Distance(grads=2e-2, losses=1e-2, norms=1e-1, weights=5e-2)
FLOOR_FACTOR = 10


@dataclass(frozen=True)
class Row:
    """One combination under test.

    Attributes:
        name: how the row is called in the output and in docs/support.md.
        flags: given to both sides.
        expert_parallel: FSEP's group size N.
        stock_parallel: expert-parallel sizes of the two stock runs, the reference first.
        reference_ranks: run the reference on this many ranks instead of `ranks`.
        capacity: `--fsep-capacity`, where not the default.
        fsep: flags for the FSEP side alone.
    """

    name: str
    ranks: int = 2
    experts: int = 8
    expert_parallel: int | None = None
    stock_parallel: tuple[int, int] = (2, 1)
    reference_ranks: int | None = None
    accumulation: int = 1
    flags: str = ""
    capacity: int | None = None
    fsep: str = RANDOM
    bound: Distance = FP32_BOUND
    steps: int = STEPS

    def command(
        self, data: str, expert_parallel: int, extra: str = "", ranks: int = 0
    ) -> list[str]:
        """Megatron's command line; every run of the row sees the same global batches."""
        model_parallel = 2 if PIPELINE in self.flags or TENSOR in self.flags else 1
        return command_line(
            data,
            experts=self.experts,
            expert_parallel=expert_parallel,
            global_batch=2 * self.accumulation * self.ranks // model_parallel,
            steps=self.steps,
            extra=self.flags + extra,
        )


DIST_OPT = " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FULL_RECOMPUTE = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PIPELINE = " --pipeline-model-parallel-size 2"
TENSOR = " --tensor-model-parallel-size 2 --sequence-parallel"

ROWS = [
    Row("plain DDP"),
    Row("distributed optimizer with both overlaps", flags=DIST_OPT),
    Row("accumulation 4", accumulation=4),
    Row("accumulation 4, distributed optimizer", accumulation=4, flags=DIST_OPT),
    Row("shared experts", flags=" --moe-shared-expert-intermediate-size 32"),
    Row(
        "aux loss",
        flags=" --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2",
    ),
    Row(
        "expert bias",
        flags=" --moe-router-enable-expert-bias --moe-router-score-function sigmoid"
        " --moe-router-bias-update-rate 1e-2",
    ),
    Row("full recompute", flags=FULL_RECOMPUTE),
    Row(
        "selective recompute of the MoE layer",
        flags=" --recompute-granularity selective --recompute-modules moe",
    ),
    Row("bf16", flags=" --bf16", bound=BF16_BOUND),
    Row(
        "few tokens: experts, ranks and microbatches without any",
        ranks=4,
        stock_parallel=(4, 1),
        flags=" --seq-length 2 --max-position-embeddings 2 --micro-batch-size 2",
    ),
    Row("top-1", flags=" --moe-router-topk 1 --moe-router-pre-softmax"),
    Row("even split", fsep=RANDOM + " --fsep-split even"),
    Row("planner greedy, adaptive", fsep=" --fsep-planner greedy"),
    Row("planner search, forecast", fsep=" --fsep-planner search --fsep-plan-mode forecast"),
    Row("planner laer, tolerance 0", fsep=" --fsep-planner laer --fsep-imbalance-tolerance 0"),
    Row("fresh layouts after the gate, exact", fsep=" --fsep-plan-mode exact"),
    Row(
        "exact on nodes of 2, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        fsep=" --fsep-plan-mode exact --fsep-node-size 2 --fsep-restore-algorithm node",
    ),
    Row(
        "exchange through nodes of 2, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        fsep=RANDOM + " --fsep-node-size 2 --fsep-restore-algorithm node",
    ),
    Row("scheduler off", fsep=RANDOM + " --fsep-scheduler off"),
    Row("restored once per step, accumulation 4", accumulation=4, fsep=RANDOM + STEP),
    Row(
        "restored once per step, accumulation 4, distributed optimizer",
        accumulation=4,
        flags=DIST_OPT,
        fsep=RANDOM + STEP,
    ),
    Row(
        "restored once per step, bf16, accumulation 4",
        accumulation=4,
        flags=" --bf16",
        fsep=RANDOM + STEP,
        bound=BF16_BOUND,
    ),
    Row(
        "even split, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        fsep=RANDOM + " --fsep-split even",
    ),
    Row("most slots", capacity=8),
    Row("fewest slots", capacity=4),
    Row("E = 8 on 4 ranks", ranks=4, stock_parallel=(4, 1)),
    Row("E = 8 on 4 ranks, distributed optimizer", ranks=4, stock_parallel=(4, 2), flags=DIST_OPT),
    Row(
        "E = 6 on 4 ranks",
        ranks=4,
        experts=6,
        stock_parallel=(1, 2),
        reference_ranks=1,
    ),
    Row(
        "E = 3 on 4 ranks",
        ranks=4,
        experts=3,
        stock_parallel=(1, 1),
        reference_ranks=1,
    ),
    Row("expert data parallel 2", ranks=4, expert_parallel=2, stock_parallel=(2, 1)),
    Row(
        "expert data parallel 2, distributed optimizer",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        flags=DIST_OPT,
    ),
    Row(
        "tensor parallel 2 with sequence parallel",
        ranks=4,
        stock_parallel=(4, 2),
        flags=TENSOR,
    ),
    Row(
        "tensor parallel 2, expert data parallel 2, distributed optimizer",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 4),
        flags=TENSOR + DIST_OPT,
    ),
    Row("pipeline 2", ranks=4, expert_parallel=2, stock_parallel=(2, 1), flags=PIPELINE),
    Row(
        "virtual pipeline 2 x 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=PIPELINE + " --num-layers 4 --num-layers-per-virtual-pipeline-stage 1",
    ),
    Row(
        "restored once per step, virtual pipeline 2 x 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=PIPELINE + " --num-layers 4 --num-layers-per-virtual-pipeline-stage 1",
        fsep=RANDOM + STEP,
    ),
    Row(
        "full recompute, pipeline 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=PIPELINE + FULL_RECOMPUTE,
    ),
]


def check_nothing_left(model: object) -> tuple[int, int]:
    """After a step: plans left in FIFOs (must be none), and restores so far."""
    from megatron_laer.runtime.coordinator import current_coordinator

    coordinator = current_coordinator()
    if coordinator is None:
        return 0, 0
    return (
        sum(len(layer.pending) for layer in coordinator.layers),
        coordinator.exchange.count.restores,
    )


@pytest.fixture(scope="module")
def stock(ranks: Callable[[int], RankPool]) -> Callable[[int, list[str]], Record]:
    """`stock(ranks, flags)`: a stock run; rows that need the same one share it."""
    records: dict[tuple[int, str], Record] = {}

    def run(size: int, flags: list[str]) -> Record:
        key = size, " ".join(flags)
        if key not in records:
            records[key] = ranks(size).run(train, flags)[0]
        return records[key]

    return run


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_fsep_equals_stock(
    row: Row,
    ranks: Callable[[int], RankPool],
    stock: Callable[[int, list[str]], Record],
    text_data: str,
    record_property: Callable[[str, object], None],
) -> None:
    first, second = row.stock_parallel
    reference = stock(row.reference_ranks or row.ranks, row.command(text_data, first))
    other = stock(row.ranks, row.command(text_data, second))
    capacity = "" if row.capacity is None else f" --fsep-capacity {row.capacity}"
    fsep_flags = FSEP + capacity + row.fsep
    fsep_command = row.command(text_data, row.expert_parallel or row.ranks, fsep_flags)
    fsep: Record = ranks(row.ranks).run(train, fsep_command, check_nothing_left)[0]

    assert len(fsep.losses) == row.steps
    assert fsep.losses[-1] < 0.8 * fsep.losses[0], "the model must learn, or little is compared"
    floor, found = distance(other, reference), distance(fsep, reference)
    record_property("floor", str(floor))
    record_property("fsep", str(found))
    print(f"\n{row.name}\n  floor {floor}\n  fsep  {found}")
    assert found.within(row.bound), f"{found} exceeds {row.bound}"
    assert found.within(floor.times(FLOOR_FACTOR)), f"{found} exceeds ten times {floor}"

    layers_on_rank = 1 if PIPELINE in row.flags and "virtual" not in row.flags else 2
    passes = 1 if STEP in row.fsep else 2 * row.accumulation
    restores_per_step = layers_on_rank * passes
    assert fsep.probes == [(0, restores_per_step * (step + 1)) for step in range(row.steps)]
