"""Settings of Megatron that FSEP refuses, with one row for the flag and the field of each.

By these rows, `arguments` checks parsed arguments and `model` a TransformerConfig. So a refused
setting that a Megatron release adds, renames or drops is edited in one place.
"""

from __future__ import annotations

from typing import Any

from megatron_laer.choices import Sharding, Unproven
from megatron_laer.support.fields import PROVED_RECOMPUTE
from megatron_laer.support.refusal import BY_RECIPE, LeftOut, Refusal, names_of


def _no_experts(args: Any) -> bool:
    return args.num_experts is None or args.num_experts < 1


def _one_rank(args: Any) -> bool:
    return bool(args.expert_model_parallel_size < 2)


def _drops_tokens(settings: Any) -> bool:
    factor = settings.moe_expert_capacity_factor
    # For Megatron, a negative factor means none.
    return factor is not None and factor >= 0


def graphed(settings: Any) -> set[str] | None:
    """Return the modules that Transformer Engine captures; empty for whole layers, None without."""
    if getattr(settings, "cuda_graph_impl", None) != "transformer_engine":
        return None
    # The second is the flag's old name.
    old = getattr(settings, "cuda_graph_scope_deprecated", None)
    modules = settings.cuda_graph_modules or old or ()
    return {modules} if isinstance(modules, str) else set(names_of(modules))


def _captures_plan(settings: Any) -> bool:
    modules = graphed(settings)
    return modules is not None and not set() < modules <= GRAPHED


def _overlaps_graphs_of_attention(settings: Any) -> bool:
    overlaps = getattr(settings, "overlap_moe_expert_parallel_comm", False)
    return bool(overlaps) and "attn" in (graphed(settings) or ())


def _reduces_before_wgrad(settings: Any) -> bool:
    """Return True if Megatron reduces gradients of home experts before they are computed."""
    delays = getattr(settings, "overlap_dispatch_backward_with_experts_wgrad", False)
    overlaps = getattr(settings, "overlap_grad_reduce", False)
    is_in_rows = getattr(settings, "fsep_sharding", None) == Sharding.ROWS
    return bool(delays and overlaps) and not is_in_rows


def _pads_for_fp8(settings: Any) -> bool:
    """Return True if the router pads, which Megatron does for fp8 and fp4 alone."""
    names = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")
    pads = any(getattr(settings, name, None) for name in names)
    return pads and bool(settings.fp8 or getattr(settings, "fp4", None))


def _recomputes_unproved(settings: Any) -> bool:
    is_selective = settings.recompute_granularity == "selective"
    return is_selective and not set(settings.recompute_modules or ()) <= PROVED_RECOMPUTE


# Modules that Transformer Engine may capture: they end at a rank's own counts, or have no experts.
GRAPHED = frozenset({"attn", "mamba", "mlp", "moe_preprocess", "moe_router"})
_GRAPHED = ", ".join(sorted(GRAPHED))

# Features that each word of `--fsep-allow-unproven` allows.
UNPROVEN = {
    Unproven.TE_GRAPHS: "Transformer Engine's CUDA graphs of parts of layers, up to the counts",
    Unproven.DENSE_FP8: "fp8 in all layers but the experts, which compute in the parameters' dtype",
    Unproven.FP8_EXPERTS: "fp8 in all layers, the experts at home and their replicas included",
}

_SPEED, _PRECISION = LeftOut.SPEED, LeftOut.PRECISION

_NO_FP8 = "restored experts are computed in bf16 or fp32"
_PRECISION_BY_MODULE = "replicas of experts follow one recipe, and it gives modules their own"
_TRAIN_IN_BF16 = "leave it out, and train with --bf16"
_DTYPE_OF_EXPERTS = "experts are kept and moved in the parameters' dtype"
_OR_IN_FP8 = (
    f"leave it out, or give --fsep-allow-unproven {Unproven.FP8_EXPERTS}"
    f"{BY_RECIPE[Unproven.FP8_EXPERTS]}"
)
_DTYPE_OF_NCCL_EP = "NCCL EP alone sends tokens in it, to experts of Transformer Engine"
_NO_GRAPH = "layouts and split sizes are decided on the host, which a graph cannot record"
_GRAPHS_OFF = "give --cuda-graph-impl none"
_GRAPHS_OVERLAPPED = "--cuda-graph-modules attn with --overlap-moe-expert-parallel-comm"
_FORM_OF_TE_EXPERTS = "it is a form of Transformer Engine's grouped experts, which FSEP replaces"
_NEEDS_GPU = "it needs Transformer Engine and a GPU, and no test there proves the combination"
_RECOMPUTE_INSTEAD = "leave it out, and use --recompute-granularity"
_RECOMPUTED = ", ".join(sorted(PROVED_RECOMPUTE))

# By two configurations in a loop of one's own; DDP's wrapper is the first to have both.
REDUCES_BEFORE_WGRAD = Refusal(
    "--overlap-dispatch-backward-with-experts-wgrad with --overlap-grad-reduce",
    "Megatron reduces the gradients of experts at home before these are computed, in stock too",
    "leave out one of them, or give --fsep-sharding rows",
    field="",
    refuses=_reduces_before_wgrad,
    left_out=_SPEED,
)

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--num-experts absent",
        "there are no experts to shard",
        "give --num-experts, or leave out --expert-parallel-mode fsep",
        refuses=_no_experts,
        field="",
    ),
    Refusal(
        "--expert-model-parallel-size 1",
        "the FSEP group is the expert-parallel group, and one rank has nobody to share with",
        "give --expert-model-parallel-size 2 or more",
        refuses=_one_rank,
        field="",
    ),
    Refusal(
        "--moe-token-dispatcher-type other than alltoall, flex",
        "the plan sends tokens to slots, and this one gathers those of all ranks on every rank",
        "leave it out, or give --moe-token-dispatcher-type alltoall, which goes before a "
        "checkpoint's arguments",
        accepted=("alltoall", "flex"),
        is_filled_in=True,
    ),
    Refusal(
        "--moe-flex-dispatcher-backend other than deepep, hybridep",
        "NCCL EP needs --moe-expert-rank-capacity-factor, beyond which it ends the run",
        "give --moe-flex-dispatcher-backend deepep or hybridep, or --moe-token-dispatcher-type "
        "alltoall without it",
        # None where a script uses another dispatcher.
        accepted=("deepep", "hybridep", None),
        field_way_out="must be 'deepep' or 'hybridep'",
    ),
    Refusal(
        "--moe-dispatch-fwd-dtype other than bf16",
        _DTYPE_OF_NCCL_EP,
        "leave it out, or give --moe-dispatch-fwd-dtype bf16",
        accepted=("bf16",),
        left_out=_PRECISION,
    ),
    Refusal(
        "--moe-combine-bwd-dtype other than bf16",
        _DTYPE_OF_NCCL_EP,
        "leave it out, or give --moe-combine-bwd-dtype bf16",
        accepted=("bf16",),
        left_out=_PRECISION,
    ),
    Refusal(
        "--expert-tensor-parallel-size above 1",
        "each rank computes whole experts",
        "leave it out, or give --expert-tensor-parallel-size 1",
        accepted=(1,),
        is_filled_in=True,
    ),
    Refusal(
        "--expert-tensor-parallel-num-weight-shards",
        "Megatron's expert GTP would shard a shard",
        "leave it out: FSEP shards expert weights already",
        accepted=(1,),
        field="expert_gtp_weight_remat_size",
    ),
    Refusal(
        "--moe-expert-capacity-factor",
        "FSEP computes every token; dropping them would make replicas differ",
        "leave it out: balance comes from layouts, not from dropping",
        accepted=(None,),
        refuses=_drops_tokens,
    ),
    Refusal(
        "moe_token_dropping",
        "FSEP computes every token; dropping them would make replicas differ",
        field="moe_token_dropping",
    ),
    Refusal("--moe-pad-expert-input-to-capacity", "it pads to a capacity, and FSEP drops no token"),
    Refusal(
        "--moe-expert-rank-capacity-factor",
        "it drops tokens over a rank's budget",
        "leave it out: balanced layouts bound what a rank receives",
        accepted=(None,),
        left_out=_SPEED,
    ),
    # Rows have no module of Transformer Engine, so its autocast does not reach experts. At home
    # it does, and `fp8-experts` needs that: `FSEPConfig` checks each word's sharding.
    Refusal(
        "--fp8-format",
        _NO_FP8,
        _TRAIN_IN_BF16,
        accepted=(None,),
        dest="fp8",
        unproven=Unproven.DENSE_FP8,
        or_unproven=Unproven.FP8_EXPERTS,
        unproven_values=("e4m3", "hybrid"),
        left_out=_PRECISION,
    ),
    Refusal(
        "--fp4-format", _NO_FP8, _TRAIN_IN_BF16, accepted=(None,), dest="fp4", left_out=_PRECISION
    ),
    Refusal(
        "--fp8-param-gather",
        _DTYPE_OF_EXPERTS,
        _OR_IN_FP8,
        field="fp8_param",
        fits=Unproven.FP8_EXPERTS,
        left_out=_PRECISION,
    ),
    Refusal("--fp4-param-gather", _DTYPE_OF_EXPERTS, field="fp4_param", left_out=_PRECISION),
    Refusal(
        "--te-precision-config-file",
        _PRECISION_BY_MODULE,
        accepted=(None,),
        field="quant_recipe",
        left_out=_PRECISION,
    ),
    # The flags are there where Kitchen is.
    Refusal(
        "use_kitchen",
        _PRECISION_BY_MODULE,
        "leave out --kitchen-config-file and --kitchen-recipe-number",
        field="use_kitchen",
    ),
    Refusal(
        "--use-torch-fsdp2",
        "Megatron excludes expert parallelism with it",
        "give --use-megatron-fsdp, which shards dense layers next to experts at home",
        field="",
    ),
    Refusal("--enable-cuda-graph", _NO_GRAPH, _GRAPHS_OFF, left_out=_SPEED),
    Refusal("--external-cuda-graph", _NO_GRAPH, _GRAPHS_OFF, left_out=_SPEED),
    Refusal(
        "--cuda-graph-impl other than none",
        _NO_GRAPH,
        _GRAPHS_OFF,
        accepted=("none",),
        unproven=Unproven.TE_GRAPHS,
        unproven_values=("transformer_engine",),
        left_out=_SPEED,
    ),
    Refusal(
        _GRAPHS_OVERLAPPED,
        "losses blew up after 80 steps with stock (Megatron-LM's open issue 5966)",
        "leave attn out, or --overlap-moe-expert-parallel-comm",
        field_way_out="must not have 'attn', or overlap_moe_expert_parallel_comm must be False",
        refuses=_overlaps_graphs_of_attention,
        left_out=_SPEED,
    ),
    Refusal(
        f"--cuda-graph-modules other than {_GRAPHED}",
        _NO_GRAPH,
        "give --cuda-graph-modules attn moe_router moe_preprocess, and mlp if there are dense "
        "layers",
        field_way_out=f"take some of {_GRAPHED}",
        refuses=_captures_plan,
        left_out=_SPEED,
    ),
    REDUCES_BEFORE_WGRAD,
    Refusal(
        "--optimizer other than adam, sgd, lion, muon",
        "the optimizer needs whole matrices, and a rank may hold rows of them",
        "give --optimizer adam, sgd or lion, or muon with --fsep-sharding experts",
        accepted=("adam", "sgd", "lion", "muon", "dist_muon"),
        field="",
    ),
    Refusal(
        "--moe-mlp-glu-interleave-size",
        "interleaved gates belong to Transformer Engine's grouped experts, which FSEP replaces; "
        "restored experts hold gate and up as halves",
        accepted=(None,),
        left_out=_SPEED,
    ),
    Refusal(
        "--use-transformer-engine-op-fuser",
        "it fuses operations of Transformer Engine's experts, which FSEP replaces, and no test "
        "proves it in dense layers",
        left_out=_SPEED,
    ),
    Refusal(
        "--use-grouped-gemm-for-shared-expert",
        "it makes the shared experts Transformer Engine's grouped ones, and no test proves that "
        "these may be put off until counts are on their way",
        left_out=_SPEED,
    ),
    Refusal(
        "--moe-shared-expert-glu-interleave-size",
        "it configures Transformer Engine's grouped shared experts, which are refused",
        accepted=(None,),
        left_out=_SPEED,
    ),
    Refusal("--moe-use-grouped-tensor", _FORM_OF_TE_EXPERTS, left_out=_SPEED),
    Refusal(
        "--moe-single-grouped-weight",
        _FORM_OF_TE_EXPERTS,
    ),
    Refusal(
        "--moe-single-grouped-bias",
        _FORM_OF_TE_EXPERTS,
    ),
    Refusal(
        "--moe-router-padding-for-quantization with fp8",
        "it routes tokens in multiples for fp8, and splits of experts between slots break these",
        _OR_IN_FP8,
        field_way_out="must be False",
        fits=Unproven.FP8_EXPERTS,
        refuses=_pads_for_fp8,
        left_out=_PRECISION,
    ),
    Refusal(
        "--moe-paged-stash",
        "it stashes activations of Transformer Engine's grouped experts, which FSEP replaces, and "
        "needs token dropping",
        "leave it out; --recompute-modules moe saves the same memory",
        left_out=_SPEED,
    ),
    Refusal(
        f"--recompute-modules other than {_RECOMPUTED}",
        "no test proves that FSEP takes part in the recompute of all of these",
        f"give some of {_RECOMPUTED}",
        field_way_out=f"take some of {_RECOMPUTED}",
        refuses=_recomputes_unproved,
    ),
    Refusal("--fine-grained-activation-offloading", _NEEDS_GPU, _RECOMPUTE_INSTEAD),
    Refusal("--cpu-offloading-num-layers", _NEEDS_GPU, _RECOMPUTE_INSTEAD, field="cpu_offloading"),
    Refusal(
        "--moe-use-upcycling",
        "upcycling copies dense weights into whole experts",
        "upcycle with stock expert parallelism, then load the checkpoint with FSEP",
        field="",
    ),
    Refusal(
        "--transformer-impl other than local, transformer_engine",
        "it builds layers for inference",
        "give --transformer-impl local or transformer_engine",
        accepted=("local", "transformer_engine"),
    ),
)
