"""The parity table: the combinations in which FSEP is compared with stock Megatron.

One `Row` is one combination; `tests/distributed/test_parity.py` runs it and docs/support.md lists
it. Nothing is run here.

Over 400 lines: one table, in the order of docs/support.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_laer.cpu.training import Adapt
from tests.parity.adapted import frozen_in_part, lora_on_attention, lora_under_recompute
from tests.parity.compare import Distance
from tests.parity.flags import command_line

# Enough for a wrong gradient to show. Rows of what most runs use train longer at night, so that
# rounding adds up as it does in training.
STEPS = 12
LONG = 50

FSEP = " --expert-parallel-mode fsep"
RANDOM = " --fsep-planner random"
STEP = " --fsep-restore step"
NODES = " --fsep-node-size {} --fsep-restore-algorithm node"
TOKENS = " --fsep-node-size {} --fsep-token-exchange node"

FP32_BOUND = Distance(grads=1e-6, losses=1e-5, norms=1e-4, weights=1e-4, logged=1e-5)
# bf16 keeps 8 bits: a rounding is 4e-3 relative. Two layouts sum the same gradients in another
# order, which after some steps of Adam decides the rounding of many weights.
BF16_BOUND = Distance(grads=2e-2, losses=1e-2, norms=1e-1, weights=5e-2, logged=1e-2)
# An update is the sign of a momentum, which rounding decides near zero.
LION_BOUND = replace(FP32_BOUND, weights=1e-2)
FLOOR_FACTOR = 10
# Two stock runs of few steps may agree in every loss, but no run can be held to less than a
# rounding of fp32.
SMALLEST_FLOOR = 2.0**-23


@dataclass(frozen=True)
class Row:
    """One combination under test.

    Attributes:
        name: how the row is called in the output and in docs/support.md.
        flags: given to both sides.
        without: switches of the model that neither side gets.
        expert_parallel: FSEP's group size N.
        stock_parallel: expert-parallel sizes of the two stock runs, the reference first.
        reference_ranks: run the reference on this many ranks instead of `ranks`.
        reference_flags: given to the reference instead of `flags`: it shows what the same model
            computes when it is cut less.
        capacity: `--fsep-capacity`, where not the default.
        fsep: flags for the FSEP side alone.
        steps: training steps; 0 for a run that only evaluates.
        evaluations: how often the run evaluates.
        moe_layers: on rank 0.
        exchanges: restores and reduces of a microbatch over rank 0's MoE layers, where these are
            repeated, or not all of their weights trained.
        adapt: changes the model on both sides.
        gradients: whether Megatron can hand over the first step's; norms are compared without.
        releases: whether the row is run with the oldest supported Megatron as well.
        covered_by: a row with all of these settings and more; this one runs at night alone, where
            it says which setting a fault of the other one comes from.
    """

    name: str
    ranks: int = 2
    experts: int = 8
    expert_parallel: int | None = None
    stock_parallel: tuple[int, int] = (2, 1)
    reference_ranks: int | None = None
    reference_flags: str | None = None
    accumulation: int = 1
    flags: str = ""
    without: str = ""
    capacity: int | None = None
    fsep: str = RANDOM
    bound: Distance = FP32_BOUND
    steps: int = STEPS
    evaluations: int = 0
    moe_layers: int = 2
    exchanges: tuple[int, int] | None = None
    adapt: Adapt | None = None
    gradients: bool = True
    releases: bool = False
    covered_by: str = ""

    def reference(self, data: str) -> tuple[int, list[str]]:
        """Ranks and command line of the stock run that the others are compared with."""
        flags = self.flags if self.reference_flags is None else self.reference_flags
        command = self._command(data, self.stock_parallel[0], flags)
        return self.reference_ranks or self.ranks, command

    def other_stock(self, data: str) -> tuple[int, list[str]]:
        """The stock run whose distance from the reference is the floor."""
        return self.ranks, self._command(data, self.stock_parallel[1], self.flags)

    def fsep_run(self, data: str) -> tuple[int, list[str]]:
        """The run under test."""
        capacity = "" if self.capacity is None else f" --fsep-capacity {self.capacity}"
        flags = self.flags + FSEP + capacity + self.fsep
        return self.ranks, self._command(data, self.expert_parallel or self.ranks, flags)

    def _command(self, data: str, expert_parallel: int, flags: str) -> list[str]:
        """Every run of the row sees the same global batches."""
        model_parallel = 1
        for size in ("tensor-model", "pipeline-model", "context"):
            model_parallel *= 2 if f"--{size}-parallel-size 2" in self.flags else 1
        return command_line(
            data,
            experts=self.experts,
            expert_parallel=expert_parallel,
            global_batch=2 * self.accumulation * self.ranks // model_parallel,
            steps=self.steps or 1,
            extra=flags,
            without=self.without,
        )


DIST_OPT = " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
OFFLOADED = DIST_OPT + " --bf16 --optimizer-cpu-offload --use-precision-aware-optimizer"
FULL_RECOMPUTE = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# The first layer of a stage only.
BLOCK_RECOMPUTE = " --recompute-granularity full --recompute-method block --recompute-num-layers 1"
MOE_RECOMPUTE = " --recompute-granularity selective --recompute-modules moe"
PIPELINE = " --pipeline-model-parallel-size 2"
VIRTUAL = PIPELINE + " --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
TENSOR = " --tensor-model-parallel-size 2 --sequence-parallel"
CONTEXT = " --context-parallel-size 2"
AUX_LOSSES = (
    " --moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss"
    " --moe-aux-loss-coeff 1e-2 2e-2 3e-2 --moe-z-loss-coeff 1e-3"
)
# The reference has stock's All-to-All dispatcher; buffers of the other side are replacements.
DEEPEP = " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep"
HYBRIDEP = " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep"
# Both sides are told what routers choose: see `tests/parity/replay.py`.
REPLAY = " --moe-enable-routing-replay"
ANNOUNCED = " --fsep-plan-mode announced"
# Megatron's default multiplies in bf16, whose rounding would hide other differences.
MUON = " --optimizer muon --muon-fp32-matmul-prec high"
MUON_BF16 = " --optimizer muon --muon-extra-scale-factor 0.5 --bf16"
# As `--optimizer muon --use-distributed-optimizer`, by its name of old.
MUON_SHARED = MUON_BF16.replace("muon", "dist_muon", 1)
UNTIED = "--untie-embeddings-and-output-weights"
CLAMPED_GEGLU = " --quick-geglu --activation-func-clamp-value 0.1 --glu-linear-offset 1.0"
HYBRID = " --spec tests.specs.hybrid hybrid_stack_spec --hybrid-layer-pattern "
HYBRID_MTP = HYBRID + "*E-E/*E/*E --mtp-use-repeated-layer"
REPEATED = " --mtp-use-repeated-layer --mtp-num-layers "
PER_TOKEN = " --calculate-per-token-loss"
LATENT_ATTENTION = (
    " --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 12"
    " --qk-pos-emb-head-dim 4 --v-head-dim 8 --qk-layernorm"
)
LATENT_RECOMPUTE = " --recompute-granularity selective --recompute-modules mla_up_proj"
GROUPED_QUERIES = " --group-query-attention --num-query-groups 2"
AUX_LOSS = " --moe-router-load-balancing-type aux_loss"
FIRST_LAYER_DENSE = " --num-layers 3 --moe-layer-freq ([0]*1+[1]*2) --moe-ffn-hidden-size 40"
# Of DeepSeek-V3, which Kimi-K2 follows but for its groups.
SIGMOID_ROUTER = (
    " --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    " --moe-router-bias-update-rate 1e-3 --moe-router-dtype fp32"
    " --moe-router-load-balancing-type seq_aux_loss"
)
NO_BIAS = "--disable-bias-linear"
NO_BIAS_NOR_SWIGLU = NO_BIAS + " --swiglu"

ROWS = [
    Row("plain DDP", steps=LONG),
    Row("distributed optimizer with both overlaps", flags=DIST_OPT, steps=LONG),
    Row("accumulation 4", accumulation=4, steps=LONG),
    Row("accumulation 4, distributed optimizer", accumulation=4, flags=DIST_OPT, steps=LONG),
    Row("shared experts", flags=" --moe-shared-expert-intermediate-size 32", steps=LONG),
    Row(
        "aux loss",
        flags=" --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2",
        steps=LONG,
    ),
    Row(
        "expert bias",
        flags=" --moe-router-enable-expert-bias --moe-router-score-function sigmoid"
        " --moe-router-bias-update-rate 1e-2",
        steps=LONG,
    ),
    Row("full recompute", flags=FULL_RECOMPUTE, steps=LONG),
    Row("selective recompute of the MoE layer", flags=MOE_RECOMPUTE, steps=LONG),
    Row(
        # Stock's own needs Transformer Engine, so the stock run recomputes nothing.
        "recompute of the experts' activation, with the layer norms",
        fsep=RANDOM
        + " --moe-grouped-gemm --recompute-granularity selective"
        + " --recompute-modules moe_act layernorm",
    ),
    Row("bf16", flags=" --bf16", bound=BF16_BOUND, steps=LONG),
    Row(
        "main gradients in bf16, accumulation 2",
        flags=" --bf16 --grad-reduce-in-bf16",
        accumulation=2,
        bound=BF16_BOUND,
    ),
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
    Row("fresh layouts after the gate, exact", fsep=" --fsep-plan-mode exact", releases=True),
    Row(
        "exact on nodes of 2, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        fsep=" --fsep-plan-mode exact" + NODES.format(2),
    ),
    Row(
        "exchange through nodes of 2, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        fsep=RANDOM + NODES.format(2),
        covered_by="exchange through nodes of 2, full recompute, distributed optimizer,"
        " E = 8 on 4 ranks",
    ),
    Row(
        "exchange through nodes of 2, full recompute, distributed optimizer, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        flags=DIST_OPT + FULL_RECOMPUTE,
        fsep=RANDOM + NODES.format(2),
    ),
    Row(
        "exchange through nodes of 1, virtual pipeline 2 x 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        accumulation=4,
        flags=VIRTUAL,
        fsep=RANDOM + NODES.format(1),
    ),
    Row(
        "restored once per step through nodes of 2, accumulation 2, bf16, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        accumulation=2,
        flags=" --bf16",
        fsep=RANDOM + NODES.format(2) + STEP,
        bound=BF16_BOUND,
    ),
    Row(
        "announced by router replay, full recompute, accumulation 2",
        accumulation=2,
        flags=REPLAY + FULL_RECOMPUTE,
        fsep=ANNOUNCED,
        covered_by="announced by router replay, full recompute, pipeline 2, accumulation 4",
    ),
    Row(
        "announced by router replay, full recompute, pipeline 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=REPLAY + PIPELINE + FULL_RECOMPUTE,
        fsep=ANNOUNCED,
        moe_layers=1,
    ),
    Row("scheduler off", fsep=RANDOM + " --fsep-scheduler off"),
    Row("experts' products by grouped_mm", fsep=RANDOM + " --fsep-gemm torch"),
    Row(
        "experts' products by grouped_mm, bf16, restored once per step",
        flags=" --bf16",
        fsep=RANDOM + STEP + " --fsep-gemm torch",
        bound=BF16_BOUND,
    ),
    # Dispatchers.
    Row("flex dispatcher with DeepEP", fsep=RANDOM + DEEPEP, releases=True),
    Row(
        "flex dispatcher with DeepEP, bf16, fp32 router, overlapped shared experts",
        flags=" --bf16 --moe-router-dtype fp32 --moe-shared-expert-intermediate-size 32"
        " --moe-shared-expert-overlap",
        fsep=RANDOM + DEEPEP,
        bound=BF16_BOUND,
    ),
    Row(
        "flex dispatcher with DeepEP, recompute of the MoE layer, shared experts, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        flags=MOE_RECOMPUTE + " --moe-shared-expert-intermediate-size 32",
        fsep=RANDOM + DEEPEP,
    ),
    Row("flex dispatcher with HybridEP", capacity=6, fsep=RANDOM + HYBRIDEP, releases=True),
    Row(
        "flex dispatcher with HybridEP, padded inputs, fused permutation, recompute of the MoE"
        " layer, overlapped shared experts, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        flags=MOE_RECOMPUTE
        + " --moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap"
        " --moe-hybridep-pad-uneven-dispatch-inputs --moe-permute-fusion-into-hybridep",
        fsep=RANDOM + HYBRIDEP,
    ),
    # Tokens by nodes: two stages with nodes of 2 on 4 ranks, otherwise one.
    Row("tokens through nodes of 1", fsep=RANDOM + TOKENS.format(1), steps=LONG, releases=True),
    Row(
        "tokens through nodes of 2, top-4, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        flags=" --moe-router-topk 4",
        fsep=RANDOM + TOKENS.format(2),
        steps=LONG,
        releases=True,
    ),
    Row(
        "tokens through one node of 4, top-4, E = 6 on 4 ranks",
        ranks=4,
        experts=6,
        stock_parallel=(1, 2),
        reference_ranks=1,
        flags=" --moe-router-topk 4",
        fsep=RANDOM + TOKENS.format(4),
    ),
    Row(
        "tokens and experts through nodes of 2, exact, bf16, top-4, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        flags=" --moe-router-topk 4 --bf16",
        fsep=" --fsep-plan-mode exact --fsep-token-exchange node" + NODES.format(2),
        bound=BF16_BOUND,
    ),
    Row(
        "tokens through nodes of 2, few tokens: experts, ranks and microbatches without any",
        ranks=4,
        stock_parallel=(4, 1),
        flags=" --seq-length 2 --max-position-embeddings 2 --micro-batch-size 2",
        fsep=RANDOM + TOKENS.format(2),
    ),
    Row(
        "tokens through nodes of 2, shared experts, full recompute, distributed optimizer,"
        " accumulation 2, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        accumulation=2,
        flags=DIST_OPT + FULL_RECOMPUTE + " --moe-shared-expert-intermediate-size 32",
        fsep=RANDOM + TOKENS.format(2),
    ),
    Row(
        "tokens through nodes of 2, shared experts with a gate and overlap, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        flags=" --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate"
        " --moe-shared-expert-overlap",
        fsep=RANDOM + TOKENS.format(2),
    ),
    Row(
        "tokens through nodes of 2, recompute of the MoE layer and its overlapped shared experts,"
        " multi-token prediction, aux losses, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        flags=AUX_LOSSES
        + MOE_RECOMPUTE
        + " --mtp-num-layers 1 --moe-shared-expert-intermediate-size 32"
        " --moe-shared-expert-overlap",
        fsep=RANDOM + TOKENS.format(2),
        moe_layers=3,
    ),
    Row(
        "tokens through nodes of 2, tensor parallel 2 with sequence parallel, fp32 router, bf16",
        ranks=4,
        stock_parallel=(4, 2),
        flags=TENSOR + " --bf16 --moe-router-dtype fp32",
        fsep=RANDOM + TOKENS.format(2),
        bound=BF16_BOUND,
    ),
    Row(
        "tokens through nodes of 1, latent MoE without a gate, shared experts",
        without="--swiglu",
        flags=" --squared-relu --moe-latent-size 24 --moe-shared-expert-intermediate-size 32",
        fsep=RANDOM + TOKENS.format(1),
    ),
    Row(
        "tokens through nodes of 2, linear bias without a gate, probabilities applied on input,"
        " top-1, scheduler off",
        ranks=4,
        stock_parallel=(4, 2),
        without=NO_BIAS_NOR_SWIGLU,
        flags=" --squared-relu --moe-apply-probs-on-input --moe-router-topk 1"
        " --moe-router-pre-softmax",
        fsep=RANDOM + TOKENS.format(2) + " --fsep-scheduler off",
    ),
    Row(
        "tokens through nodes of 1, virtual pipeline 2 x 2, accumulation 4, restored once per step",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=VIRTUAL,
        fsep=RANDOM + TOKENS.format(1) + STEP,
    ),
    Row(
        "tokens through nodes of 1, router in fp64 with groups and expert bias, recompute of the"
        " experts' activation",
        flags=" --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
        " --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5"
        " --moe-router-dtype fp64",
        fsep=RANDOM
        + TOKENS.format(1)
        + " --moe-grouped-gemm --recompute-granularity selective --recompute-modules moe_act",
    ),
    Row(
        "restored once per step, accumulation 4",
        accumulation=4,
        fsep=RANDOM + STEP,
        covered_by="restored once per step, accumulation 4, distributed optimizer",
    ),
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
        covered_by="linear bias, restored once per step, bf16, accumulation 4",
    ),
    Row(
        "even split, E = 8 on 4 ranks",
        ranks=4,
        stock_parallel=(4, 1),
        fsep=RANDOM + " --fsep-split even",
    ),
    Row("most slots", capacity=8),
    Row("fewest slots", capacity=4),
    Row("E = 8 on 4 ranks", ranks=4, stock_parallel=(4, 1), steps=LONG),
    Row(
        "E = 8 on 4 ranks, distributed optimizer",
        ranks=4,
        stock_parallel=(4, 2),
        flags=DIST_OPT,
        covered_by="exchange through nodes of 2, full recompute, distributed optimizer,"
        " E = 8 on 4 ranks",
    ),
    Row(
        "E = 6 on 4 ranks",
        ranks=4,
        experts=6,
        stock_parallel=(1, 2),
        reference_ranks=1,
        steps=LONG,
    ),
    Row(
        # With Adam's default of 1e-8 one gradient in 6144 is so near to zero that rounding moves
        # its weight by 4e-6, and neither stock run happens to show that.
        "E = 3 on 4 ranks",
        ranks=4,
        experts=3,
        stock_parallel=(1, 1),
        reference_ranks=1,
        flags=" --adam-eps 1e-6",
        steps=LONG,
    ),
    Row("expert data parallel 2", ranks=4, expert_parallel=2, stock_parallel=(2, 1), steps=LONG),
    Row(
        "expert data parallel 2, distributed optimizer",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        flags=DIST_OPT,
        covered_by="tensor parallel 2, expert data parallel 2, distributed optimizer",
    ),
    Row(
        "tensor parallel 2 with sequence parallel",
        ranks=4,
        stock_parallel=(4, 2),
        flags=TENSOR,
        releases=True,
    ),
    Row(
        "tensor parallel 2, expert data parallel 2, distributed optimizer",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 4),
        flags=TENSOR + DIST_OPT,
    ),
    Row(
        "pipeline 2",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        flags=PIPELINE,
        moe_layers=1,
        steps=LONG,
    ),
    Row(
        "virtual pipeline 2 x 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=VIRTUAL,
        releases=True,
    ),
    Row(
        "restored once per step through nodes of 1, pipeline 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=PIPELINE,
        fsep=RANDOM + NODES.format(1) + STEP,
        moe_layers=1,
    ),
    Row(
        "exchange through nodes of 2, fp32 on the wire, pipeline 2, accumulation 4, bf16,"
        " E = 8 on 8 ranks",
        ranks=8,
        expert_parallel=4,
        stock_parallel=(4, 2),
        accumulation=4,
        flags=PIPELINE + " --bf16",
        fsep=RANDOM + NODES.format(2) + " --fsep-grad-wire-dtype fp32",
        bound=BF16_BOUND,
        moe_layers=1,
    ),
    Row(
        "restored once per step, virtual pipeline 2 x 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=VIRTUAL,
        fsep=RANDOM + STEP,
    ),
    Row(
        "full recompute, pipeline 2, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 1),
        accumulation=4,
        flags=PIPELINE + FULL_RECOMPUTE,
        moe_layers=1,
        steps=LONG,
    ),
    # Losses and routers.
    Row(
        "aux, sequence, global and z losses, accumulation 2",
        accumulation=2,
        flags=AUX_LOSSES,
        releases=True,
    ),
    Row(
        "the same losses, full recompute of one layer in two",
        accumulation=2,
        flags=AUX_LOSSES + BLOCK_RECOMPUTE,
    ),
    Row(
        "the same losses, recompute of the MoE layer, per-token loss",
        accumulation=2,
        flags=AUX_LOSSES + MOE_RECOMPUTE + PER_TOKEN,
    ),
    Row("sinkhorn router", flags=" --moe-router-load-balancing-type sinkhorn"),
    Row(
        "quantile balancing with a moving average, accumulation 2",
        accumulation=2,
        flags=" --moe-router-load-balancing-type quantile_balancing"
        " --moe-router-quantile-balancing-ema 0.5",
    ),
    Row(
        "group-limited sigmoid router in fp64 with expert bias, scaling and sequence aux loss",
        flags=" --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
        " --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5"
        " --moe-router-dtype fp64"
        " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4",
    ),
    Row(
        "forced balance, input jitter",
        flags=" --moe-router-force-load-balancing --moe-input-jitter-eps 1e-1",
    ),
    Row(
        "forced bias that stays, recompute of the MoE layer",
        flags=" --moe-router-force-biased -1" + MOE_RECOMPUTE,
    ),
    Row(
        "fused router and permutation, aux, sequence, global and z losses",
        flags=AUX_LOSSES + " --moe-router-fusion --moe-permute-fusion",
    ),
    Row(
        "router replay, full recompute, accumulation 2",
        accumulation=2,
        flags=REPLAY + FULL_RECOMPUTE,
    ),
    Row("square-root softplus router", flags=" --moe-router-score-function sqrtsoftplus"),
    # Models.
    Row(
        "shared experts with a gate and overlap",
        flags=" --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate"
        " --moe-shared-expert-overlap",
        releases=True,
    ),
    Row(
        "shared experts with a gate, recompute of the MoE layer",
        flags=" --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate" + MOE_RECOMPUTE,
    ),
    Row(
        "first layer dense, recompute of attention, norms, dense and shared experts",
        flags=" --num-layers 3 --moe-layer-freq ([0]*1+[1]*2) --moe-ffn-hidden-size 40"
        " --moe-shared-expert-intermediate-size 32 --recompute-granularity selective"
        " --recompute-modules core_attn layernorm mlp shared_experts",
    ),
    Row(
        "multi-token prediction with aux losses",
        flags=AUX_LOSSES + " --mtp-num-layers 1",
        moe_layers=3,
        releases=True,
    ),
    Row(
        "repeated MTP layer, depth 2, aux losses, distributed optimizer, accumulation 2",
        accumulation=2,
        flags=AUX_LOSSES + DIST_OPT + REPEATED + "2",
        moe_layers=3,
        exchanges=(6, 4),
    ),
    Row(
        "repeated MTP layer, depth 3, exact, recompute of the MoE layer, shared experts",
        flags=MOE_RECOMPUTE + REPEATED + "3 --moe-shared-expert-intermediate-size 32",
        fsep=" --fsep-plan-mode exact",
        moe_layers=3,
        exchanges=(6, 5),
    ),
    Row(
        "repeated MTP layer, depth 2, restored once per step, forecast, bf16, accumulation 2",
        accumulation=2,
        flags=" --bf16" + REPEATED + "2",
        fsep=" --fsep-planner greedy --fsep-plan-mode forecast" + STEP,
        bound=BF16_BOUND,
        moe_layers=3,
    ),
    Row(
        "repeated MTP layer, depth 2, adaptive, full recompute, pipeline 2, accumulation 2",
        ranks=4,
        expert_parallel=2,
        accumulation=2,
        flags=PIPELINE + FULL_RECOMPUTE + REPEATED + "2",
        fsep=" --fsep-planner greedy --fsep-imbalance-tolerance 0.02",
        moe_layers=1,
    ),
    Row(
        "latent attention, recompute of its up-projections",
        flags=LATENT_ATTENTION + " --rope-type rope" + LATENT_RECOMPUTE,
    ),
    Row(
        "gated delta net before attention, recompute of its output norm",
        flags=" --spec tests.specs.gated_delta_net block_spec"
        " --experimental-attention-variant gated_delta_net --linear-attention-freq 2"
        " --linear-key-head-dim 8 --linear-value-head-dim 12 --linear-num-key-heads 2"
        " --linear-num-value-heads 4"
        " --recompute-granularity selective --recompute-modules gdn_norm_out",
    ),
    Row(
        # In smaller sizes what Megatron's own command for 256 GPUs has.
        "as DeepSeek-V3: latent attention, first layer dense, shared experts, group-limited sigmoid"
        " router with expert bias, multi-token prediction, flex dispatcher with DeepEP, recompute",
        flags=DIST_OPT
        + LATENT_ATTENTION
        + FIRST_LAYER_DENSE
        + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-4 --moe-router-num-groups 4 --moe-router-group-topk 2"
        " --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 32"
        " --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0"
        " --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1"
        + LATENT_RECOMPUTE
        + " mlp moe layernorm",
        fsep=RANDOM + DEEPEP,
        moe_layers=3,
    ),
    Row(
        # As with Kimi-K2's 384, the number of experts is no power of two. Stock's own recompute of
        # their activation needs Transformer Engine.
        "as Kimi-K2: latent attention, first layer dense, shared experts, sigmoid router with"
        " expert bias, flex dispatcher with HybridEP, recompute with the experts' activation",
        experts=6,
        flags=DIST_OPT
        + LATENT_ATTENTION
        + FIRST_LAYER_DENSE
        + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-3 --moe-router-num-groups 1 --moe-router-group-topk 1"
        " --moe-router-topk-scaling-factor 2.827 --moe-shared-expert-intermediate-size 32"
        " --rotary-scaling-factor 32 --mscale 1.0 --mscale-all-dim 1.0"
        + LATENT_RECOMPUTE
        + " mlp layernorm",
        fsep=RANDOM
        + HYBRIDEP
        + " --moe-grouped-gemm"
        + LATENT_RECOMPUTE
        + " mlp layernorm moe_act",
    ),
    # Feature sets of published commands, in smaller sizes; so are the two before.
    Row(
        "as Mixtral: grouped queries, aux loss, pipeline 2, distributed optimizer, accumulation 2",
        ranks=4,
        expert_parallel=2,
        accumulation=2,
        # In a pipeline, overlapped reduces would leave parts of the gradients that are compared.
        flags=PIPELINE
        + " --use-distributed-optimizer"
        + GROUPED_QUERIES
        + AUX_LOSS
        + " --moe-aux-loss-coeff 1e-2",
        moe_layers=1,
    ),
    Row(
        # Stock recomputes nothing here, for want of Transformer Engine.
        "as Qwen3: grouped and normalised queries, top-4, aux loss, fp32 router, tensor parallel 2,"
        " flex dispatcher with DeepEP, recompute of norms and of the experts' activation",
        ranks=4,
        stock_parallel=(4, 2),
        flags=TENSOR
        + DIST_OPT
        + GROUPED_QUERIES
        + AUX_LOSS
        + " --qk-layernorm --kv-channels 16 --moe-aux-loss-coeff 1e-3 --moe-router-topk 4"
        " --moe-router-dtype fp32 --moe-ffn-hidden-size 40",
        fsep=RANDOM
        + DEEPEP
        + " --moe-grouped-gemm --recompute-granularity selective"
        + " --recompute-modules moe_act layernorm",
    ),
    Row(
        "as GLM-4.5: first layer dense, overlapped shared experts, sigmoid router with expert bias,"
        " biased and normalised queries, multi-token prediction, recompute of attention",
        flags=DIST_OPT
        + GROUPED_QUERIES
        + FIRST_LAYER_DENSE
        + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-3 --moe-shared-expert-intermediate-size 32"
        " --moe-shared-expert-overlap --add-qkv-bias --qk-layernorm --rotary-percent 0.5"
        " --mtp-num-layers 1 --mtp-loss-scaling-factor 0.3 --recompute-granularity selective",
        moe_layers=3,
    ),
    Row(
        "as gpt-oss: linear bias, clamped and offset quick-GEGLU, learned softmax, windows, top-4,"
        " aux loss, fp32 router",
        ranks=4,
        stock_parallel=(4, 2),
        without=NO_BIAS_NOR_SWIGLU,
        flags=DIST_OPT
        + CLAMPED_GEGLU
        + GROUPED_QUERIES
        + AUX_LOSS
        + " --softmax-type learnable --window-size 15,0 --window-attn-skip-freq 2"
        " --moe-aux-loss-coeff 1e-3 --moe-router-topk 4 --moe-router-dtype fp32",
    ),
    Row(
        # No Mamba layers, for which Megatron has kernels on GPUs alone.
        "as Nemotron-3: HybridModel, latent MoE without a gate, shared experts, sigmoid router with"
        " expert bias, repeated multi-token prediction, flex dispatcher with HybridEP",
        without="--swiglu",
        flags=DIST_OPT
        + HYBRID
        + "*E-*E/*E/*E --mtp-use-repeated-layer --squared-relu --moe-latent-size 24"
        + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-4 --moe-router-topk-scaling-factor 5.0"
        " --moe-shared-expert-intermediate-size 32 --calculate-per-token-loss",
        capacity=6,
        fsep=RANDOM + HYBRIDEP,
        moe_layers=3,
        exchanges=(6, 4),
    ),
    Row(
        "clamped and offset quick-GEGLU",
        without="--swiglu",
        flags=CLAMPED_GEGLU,
        covered_by="linear bias, clamped and offset quick-GEGLU",
    ),
    # With one expert-parallel rank, Megatron's local layers cannot train an expert's bias.
    Row(
        "linear bias, clamped and offset quick-GEGLU",
        ranks=4,
        stock_parallel=(4, 2),
        without=NO_BIAS_NOR_SWIGLU,
        flags=CLAMPED_GEGLU,
        steps=LONG,
    ),
    Row(
        "linear bias, distributed optimizer, expert data parallel 2, accumulation 2",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 4),
        accumulation=2,
        without=NO_BIAS,
        flags=DIST_OPT,
    ),
    Row(
        "linear bias, tensor parallel 2 with sequence parallel, per-token loss",
        ranks=4,
        stock_parallel=(4, 2),
        without=NO_BIAS,
        flags=TENSOR + PER_TOKEN,
    ),
    Row(
        "linear bias, recompute of the MoE layer, pipeline 2, accumulation 2",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(2, 2),
        reference_ranks=2,
        reference_flags=MOE_RECOMPUTE,
        accumulation=2,
        without=NO_BIAS,
        flags=PIPELINE + MOE_RECOMPUTE,
        moe_layers=1,
    ),
    Row(
        "linear bias, recompute of the experts' activation, through nodes of 2, E = 6 on 4 ranks",
        ranks=4,
        experts=6,
        stock_parallel=(2, 2),
        reference_ranks=2,
        without=NO_BIAS_NOR_SWIGLU,
        flags=CLAMPED_GEGLU,
        fsep=RANDOM
        + NODES.format(2)
        + " --moe-grouped-gemm --recompute-granularity selective --recompute-modules moe_act",
    ),
    Row(
        "linear bias, restored once per step, bf16, accumulation 4",
        ranks=4,
        expert_parallel=2,
        stock_parallel=(4, 2),
        accumulation=4,
        without=NO_BIAS_NOR_SWIGLU,
        flags=CLAMPED_GEGLU + " --bf16",
        fsep=RANDOM + STEP,
        bound=BF16_BOUND,
    ),
    Row(
        "linear bias without a gate, probabilities applied on input, top-1, scheduler off",
        ranks=4,
        stock_parallel=(4, 2),
        without=NO_BIAS_NOR_SWIGLU,
        flags=" --squared-relu --moe-apply-probs-on-input --moe-router-topk 1"
        " --moe-router-pre-softmax",
        fsep=RANDOM + " --fsep-scheduler off",
    ),
    Row(
        "probabilities applied on input, top-1",
        flags=" --moe-apply-probs-on-input --moe-router-topk 1 --moe-router-pre-softmax",
        covered_by="linear bias without a gate, probabilities applied on input, top-1,"
        " scheduler off",
    ),
    Row(
        "latent MoE without a gate, shared experts",
        without="--swiglu",
        flags=" --squared-relu --moe-latent-size 24 --moe-shared-expert-intermediate-size 32",
    ),
    Row(
        "tied embeddings, bf16, distributed optimizer, full recompute",
        without=UNTIED,
        flags=" --bf16" + DIST_OPT + FULL_RECOMPUTE,
        bound=BF16_BOUND,
    ),
    Row(
        "HybridModel of attention, dense and MoE layers, aux losses, shared experts, distributed"
        " optimizer",
        flags=AUX_LOSSES + DIST_OPT + HYBRID + "*E-*E --moe-shared-expert-intermediate-size 32",
    ),
    Row(
        "HybridModel, two MoE layers repeated by multi-token prediction, full recompute, exact",
        flags=FULL_RECOMPUTE + HYBRID + "*-E/*E-E/*E-E --mtp-use-repeated-layer",
        fsep=" --fsep-plan-mode exact",
        moe_layers=3,
        exchanges=(10, 5),
    ),
    Row(
        "HybridModel, virtual pipeline 2 x 2, multi-token prediction, accumulation 2",
        ranks=4,
        expert_parallel=2,
        accumulation=2,
        flags=PIPELINE + HYBRID + "*E|E-|*E|-E/*E/*E",
    ),
    # Parallelism.
    Row(
        "context parallel 2 with aux losses",
        ranks=4,
        stock_parallel=(2, 4),
        reference_ranks=2,
        reference_flags=AUX_LOSSES,
        flags=AUX_LOSSES + CONTEXT,
    ),
    Row(
        "distributed optimizer in 2 instances, expert data parallel 2",
        ranks=4,
        expert_parallel=2,
        flags=DIST_OPT + " --num-distributed-optimizer-instances 2",
        gradients=False,
    ),
    Row(
        "tensor parallel 2, MoE in every second layer, aux losses, overlapped shared experts",
        ranks=4,
        stock_parallel=(4, 2),
        flags=TENSOR
        + AUX_LOSSES
        + " --num-layers 4 --moe-layer-freq 2 --moe-shared-expert-intermediate-size 32"
        " --moe-shared-expert-overlap",
    ),
    Row(
        "pipeline 2 whose first stage has no MoE layer, aux losses, accumulation 2",
        ranks=4,
        expert_parallel=2,
        accumulation=2,
        flags=PIPELINE + AUX_LOSSES + " --num-layers 4 --moe-layer-freq ([0]*2+[1]*2)",
        moe_layers=0,
    ),
    Row(
        "pipeline 2 with multi-token prediction and tied embeddings, accumulation 2",
        ranks=4,
        expert_parallel=2,
        accumulation=2,
        without=UNTIED,
        flags=PIPELINE + " --mtp-num-layers 1",
        moe_layers=1,
    ),
    # Frozen weights.
    Row(
        "LoRA on attention, distributed optimizer",
        flags=DIST_OPT + " --lr 1e-2 --min-lr 1e-2",
        adapt=lora_on_attention,
        exchanges=(4, 0),
    ),
    Row(
        "LoRA on attention, full recompute, restored once per step, accumulation 2, bf16",
        accumulation=2,
        flags=FULL_RECOMPUTE + " --bf16 --lr 1e-2 --min-lr 1e-2",
        fsep=RANDOM + STEP,
        adapt=lora_under_recompute,
        exchanges=(2, 0),
        bound=BF16_BOUND,
    ),
    Row(
        "first layer and first matrix of experts frozen, recompute of the MoE layer,"
        " distributed optimizer, accumulation 2",
        accumulation=2,
        flags=MOE_RECOMPUTE + DIST_OPT,
        adapt=frozen_in_part,
        exchanges=(3, 1),
    ),
    # Runs.
    Row(
        # Without fp8 Megatron itself refuses it.
        "router padding, without effect",
        fsep=RANDOM + " --moe-router-padding-for-quantization",
    ),
    Row(
        "optimizer offloaded to the CPU, expert data parallel 2",
        ranks=4,
        expert_parallel=2,
        flags=OFFLOADED,
        bound=BF16_BOUND,
    ),
    Row(
        "half of the optimizer offloaded to the CPU with both copies overlapped",
        flags=OFFLOADED + " --optimizer-offload-fraction 0.5 --overlap-cpu-optimizer-d2h-h2d",
        bound=BF16_BOUND,
    ),
    Row("SGD with momentum", flags=" --optimizer sgd --sgd-momentum 0.9 --lr 5e-2 --min-lr 5e-2"),
    Row("Lion", flags=" --optimizer lion", bound=LION_BOUND),
    Row("Muon", flags=MUON),
    Row(
        "Muon with Nesterov momentum, other scales, coefficients, and tensor-parallel mode",
        flags=MUON + " --muon-nesterov --muon-momentum 0.95 --muon-scale-mode unit_rms_norm"
        " --muon-extra-scale-factor 0.2 --muon-coefficient-type polar_express"
        " --muon-num-ns-steps 8 --muon-tp-mode distributed --muon-no-split-qkv",
    ),
    Row(
        "Muon, bf16, accumulation 2, shared experts",
        flags=MUON_BF16 + " --moe-shared-expert-intermediate-size 32",
        accumulation=2,
        bound=BF16_BOUND,
    ),
    Row(
        "Muon, expert data parallel 2, rows that do not divide, E = 3 on 4 ranks",
        ranks=4,
        experts=3,
        expert_parallel=2,
        stock_parallel=(1, 1),
        reference_ranks=1,
        without="--swiglu",
        flags=MUON + " --squared-relu --moe-ffn-hidden-size 33",
    ),
    Row(
        "Muon, tensor parallel 2, linear bias",
        ranks=4,
        stock_parallel=(4, 2),
        without=NO_BIAS,
        flags=MUON + TENSOR + " --muon-tp-mode duplicated",
    ),
    Row(
        "dist_muon with both overlaps, expert data parallel 2, bf16",
        ranks=4,
        expert_parallel=2,
        flags=MUON_SHARED + " --overlap-grad-reduce --overlap-param-gather",
        bound=BF16_BOUND,
    ),
    Row(
        "dist_muon, expert data parallel 2, pipeline 2, bf16, accumulation 2",
        ranks=4,
        expert_parallel=2,
        accumulation=2,
        moe_layers=1,
        flags=MUON_SHARED + PIPELINE,
        bound=BF16_BOUND,
    ),
    Row(
        "evaluation and hashes of weights between steps, expert data parallel 2",
        ranks=4,
        expert_parallel=2,
        flags=" --eval-interval 4 --eval-iters 2 --check-weight-hash-across-dp-replicas-interval 2",
        evaluations=4,
    ),
    Row(
        "evaluation alone",
        flags=" --skip-train --eval-iters 2",
        steps=0,
        evaluations=1,
        gradients=False,
    ),
]
