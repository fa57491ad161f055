"""What FSEP refuses to run with, and why: checked on Megatron's arguments before anything runs.

Touches nothing of Megatron; `args` is its parsed namespace. A model's configuration is checked in
`model_support`; what the parity table proves equal to stock is in docs/support.md.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_laer.config import FSEPConfig, OverlapScheduler
from megatron_laer.layout import MAX_EXPERTS, default_capacity


class RefusedError(ValueError):
    """A run was asked for what cannot work; the message, which launchers print alone, says so."""


@dataclass(frozen=True)
class Refusal:
    """One unsupported setting.

    Attributes:
        setting: its flag, with what is refused of it; the key under which docs list it.
        given: the setting as the user passed it, or None when it is not set.
        reason: why FSEP cannot run with it.
        way_out: what would work.
    """

    setting: str
    given: Callable[[Namespace], str | None]
    reason: str
    way_out: str


def _flag(
    name: str, reason: str, way_out: str, *, default: object = None, attribute: str = ""
) -> Refusal:
    """Refused when its value is neither `default` nor false."""
    attribute = attribute or name.removeprefix("--").replace("-", "_")

    def given(args: Namespace) -> str | None:
        value = getattr(args, attribute, default)
        if value is None or value is False or value == default:
            return None
        return name if value is True else f"{name} {value}"

    return Refusal(name, given, reason, way_out)


def _other_than(name: str, allowed: tuple[str, ...], reason: str, way_out: str) -> Refusal:
    """Refused when its value is none of `allowed`."""
    attribute = name.removeprefix("--").replace("-", "_")

    def given(args: Namespace) -> str | None:
        value = getattr(args, attribute, None)
        return None if value is None or value in allowed else f"{name} {value}"

    return Refusal(f"{name} other than {', '.join(allowed)}", given, reason, way_out)


def _no_experts(args: Namespace) -> str | None:
    experts = args.num_experts
    return f"--num-experts {experts}" if experts is None or experts < 1 else None


def _expert_tensor_parallel(args: Namespace) -> str | None:
    size = args.expert_tensor_parallel_size
    return None if size == 1 else f"--expert-tensor-parallel-size {size}"


def _capacity_factor(args: Namespace) -> str | None:
    factor = args.moe_expert_capacity_factor
    # A negative one means none to Megatron.
    return None if factor is None or factor < 0 else f"--moe-expert-capacity-factor {factor}"


def _recomputes_activation(args: Namespace) -> str | None:
    # Without selective recompute Megatron ignores the modules.
    is_used = args.recompute_granularity == "selective" and args.recompute_modules is not None
    is_given = is_used and "moe_act" in args.recompute_modules
    return "--recompute-modules moe_act" if is_given else None


def _linear_bias(args: Namespace) -> str | None:
    return "expert biases (no --disable-bias-linear)" if args.add_bias_linear else None


def _too_few_ranks(args: Namespace) -> str | None:
    size = args.expert_model_parallel_size
    return f"--expert-model-parallel-size {size}" if size < 2 else None


_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--num-experts absent",
        _no_experts,
        "there are no experts to shard",
        "give --num-experts, or leave out --expert-parallel-mode fsep",
    ),
    Refusal(
        "--expert-model-parallel-size 1",
        _too_few_ranks,
        "the FSEP group is the expert-parallel group, and one rank has nobody to share with",
        "give --expert-model-parallel-size 2 or more",
    ),
    Refusal(
        "--expert-tensor-parallel-size above 1",
        _expert_tensor_parallel,
        "a slice already cuts an expert's rows over the group",
        "leave it out, or give --expert-tensor-parallel-size 1",
    ),
    _flag(
        "--expert-tensor-parallel-num-weight-shards",
        "Megatron's expert GTP would shard a shard",
        "leave it out: FSEP shards expert weights already",
        default=1,
    ),
    _other_than(
        "--moe-token-dispatcher-type",
        ("alltoall",),
        "tokens travel by Megatron's All-to-All dispatcher over slots",
        "leave it out, or give --moe-token-dispatcher-type alltoall, which goes before a "
        "checkpoint's arguments",
    ),
    Refusal(
        "--moe-expert-capacity-factor",
        _capacity_factor,
        "FSEP computes every token; dropping them would make replicas differ",
        "leave it out: balance comes from layouts, not from dropping",
    ),
    _flag(
        "--moe-pad-expert-input-to-capacity",
        "it pads to a capacity, and FSEP drops no token",
        "leave it out",
    ),
    _flag(
        "--moe-expert-rank-capacity-factor",
        "it drops tokens over a rank's budget",
        "leave it out: balanced layouts bound what a rank receives",
    ),
    _flag(
        "--fp8-format",
        "restored experts are computed in bf16 or fp32",
        "leave it out, and train with --bf16",
        attribute="fp8",
    ),
    _flag(
        "--fp4-format",
        "restored experts are computed in bf16 or fp32",
        "leave it out, and train with --bf16",
        attribute="fp4",
    ),
    _flag("--fp8-param-gather", "slices are kept in the parameters' dtype", "leave it out"),
    _flag("--fp4-param-gather", "slices are kept in the parameters' dtype", "leave it out"),
    _flag(
        "--use-megatron-fsdp",
        "Megatron-FSDP would shard slices again",
        "leave it out; --use-distributed-optimizer shards the dense part",
    ),
    _flag(
        "--use-torch-fsdp2",
        "torch FSDP2 excludes expert parallelism",
        "leave it out; --use-distributed-optimizer shards the dense part",
    ),
    _flag(
        "--mtp-use-repeated-layer",
        "one layer runs several times per microbatch, backward in another order than forward",
        "leave it out",
    ),
    Refusal(
        "--recompute-modules moe_act",
        _recomputes_activation,
        "it belongs to Transformer Engine's grouped experts, which FSEP replaces",
        "use --recompute-modules moe",
    ),
    _flag(
        "--enable-cuda-graph",
        "layouts and split sizes are decided on the host, which a graph cannot record",
        "give --cuda-graph-impl none",
    ),
    _flag(
        "--external-cuda-graph",
        "layouts and split sizes are decided on the host, which a graph cannot record",
        "give --cuda-graph-impl none",
    ),
    _other_than(
        "--cuda-graph-impl",
        ("none",),
        "layouts and split sizes are decided on the host, which a graph cannot record",
        "give --cuda-graph-impl none",
    ),
    _flag(
        "--delay-wgrad-compute",
        "gradients of restored experts leave the rank as soon as they are computed",
        "leave it out",
    ),
    _flag(
        "--overlap-dispatch-backward-with-experts-wgrad",
        "gradients of restored experts leave the rank as soon as they are computed",
        "leave it out",
    ),
    _flag(
        "--overlap-moe-expert-parallel-comm",
        "its schedule frees what a restore still needs; no test proves the combination",
        "leave it out",
    ),
    _other_than(
        "--optimizer",
        ("adam", "sgd", "lion"),
        "the optimizer needs whole matrices, and a rank holds rows of them",
        "give --optimizer adam or sgd",
    ),
    Refusal(
        "--disable-bias-linear absent",
        _linear_bias,
        "slices hold weights only",
        "give --disable-bias-linear, as current MoE models do",
    ),
    _flag(
        "--moe-mlp-glu-interleave-size",
        "interleaved gates belong to Transformer Engine's grouped experts, which FSEP replaces; "
        "restored experts hold gate and up as halves",
        "leave it out",
    ),
    _flag(
        "--moe-single-grouped-weight",
        "it is a form of Transformer Engine's grouped experts, which FSEP replaces",
        "leave it out",
    ),
    _flag(
        "--moe-router-padding-for-quantization",
        "it routes tokens for the sake of fp8's alignment, which FSEP does not compute in",
        "leave it out",
    ),
    _flag(
        "--moe-router-padding-for-fp8",
        "it routes tokens for the sake of fp8's alignment, which FSEP does not compute in",
        "leave it out",
    ),
    _flag(
        "--moe-paged-stash",
        "it stashes activations of Transformer Engine's grouped experts, which FSEP replaces, and "
        "needs token dropping",
        "leave it out; --recompute-modules moe saves the same memory",
    ),
    _flag(
        "--fine-grained-activation-offloading",
        "it needs Transformer Engine and a GPU, and no test there proves the combination",
        "leave it out, and use --recompute-granularity",
    ),
    _flag(
        "--cpu-offloading-num-layers",
        "it needs Transformer Engine and a GPU, and no test there proves the combination",
        "leave it out, and use --recompute-granularity",
        default=0,
    ),
    _flag(
        "--moe-use-upcycling",
        "upcycling copies dense weights into whole experts",
        "upcycle with stock expert parallelism, then load the checkpoint with FSEP",
    ),
    _other_than(
        "--transformer-impl",
        ("local", "transformer_engine"),
        "it builds layers for inference",
        "give --transformer-impl local or transformer_engine",
    ),
)


# Settings that FSEP needs and that leave the model as it is, so that they need not be given.
NEEDED: dict[str, object] = {
    "moe_token_dispatcher_type": "alltoall",
    "expert_tensor_parallel_size": 1,
}


def fill_in(args: Namespace, script_defaults: Mapping[str, object]) -> list[str]:
    """Set what FSEP needs where nobody set it: where the argument is None.

    Args:
        script_defaults: what a Megatron script gives for arguments that are left out; not touched.

    Returns:
        The flags that are now as if they had been given.
    """
    filled = []
    for name, needed in NEEDED.items():
        if getattr(args, name) is None:
            setattr(args, name, script_defaults.get(name, needed))
            if name not in script_defaults:
                filled.append(f"--{name.replace('_', '-')} {needed}")
    return filled


def check(args: Namespace, config: FSEPConfig) -> None:
    """Refuse what FSEP cannot run with, all of it in one message.

    Raises:
        RefusedError: what was given, why it cannot work, and what would.
    """
    problems = [
        f"{given}: {refusal.reason}; {refusal.way_out}"
        for refusal in REFUSALS
        if (given := refusal.given(args)) is not None
    ]
    if not problems:
        problems = _shape_problems(args, config)
    if problems:
        numbered = " ".join(f"({number}) {text}." for number, text in enumerate(problems, start=1))
        listed = problems[0] if len(problems) == 1 else f"these settings: {numbered}"
        raise RefusedError(f"--expert-parallel-mode fsep cannot run with {listed}")


def warnings(
    args: Namespace, config: FSEPConfig, environment: Mapping[str, str], *, on_cuda: bool
) -> list[str]:
    """What FSEP runs with, but not well, or without a test that shows it."""
    found = []
    if on_cuda and config.scheduler == OverlapScheduler.ON and environment.get(_CONNECTIONS) == "1":
        found.append(
            f"{_CONNECTIONS}=1: kernels of all streams wait for each other in the order of their "
            "launch, so exchanges of weights and gradients hardly overlap with compute; unset it, "
            "or set it to 32, unless --tensor-model-parallel-size or --context-parallel-size above "
            "1 needs it (before Blackwell)"
        )
    if args.optimizer == "lion":
        found.append("--optimizer lion: no test proves that it works with FSEP")
    return found


def _shape_problems(args: Namespace, config: FSEPConfig) -> list[str]:
    problems = []
    ranks, experts = args.expert_model_parallel_size, args.num_experts
    if experts > MAX_EXPERTS:
        return [f"--num-experts {experts}: must be at most {MAX_EXPERTS}"]
    if ranks > args.world_size:
        return [
            f"--expert-model-parallel-size {ranks}: must be at most the number of ranks, "
            f"{args.world_size} (WORLD_SIZE)"
        ]
    fewest, default = -(-experts // ranks), default_capacity(ranks, experts)
    if config.capacity is not None and not fewest <= config.capacity <= experts:
        problems.append(
            f"--fsep-capacity {config.capacity} with --num-experts {experts} on "
            f"--expert-model-parallel-size {ranks}: the slots must hold every expert and a rank "
            f"none twice; use {fewest} to {experts} (default {default})"
        )
    tolerance = config.imbalance_tolerance
    if tolerance is not None and tolerance >= ranks - 1:
        problems.append(
            f"--fsep-imbalance-tolerance {tolerance}: no fresh layout would ever be taken, since "
            f"no rank has more than {ranks} times the mean; give less than {ranks - 1}, or "
            "--fsep-plan-mode forecast"
        )
    if config.node_size is not None and ranks % config.node_size:
        divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
        problems.append(
            f"--fsep-node-size {config.node_size} does not divide "
            f"--expert-model-parallel-size {ranks}; use one of {divisors}"
        )
    return problems
