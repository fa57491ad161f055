"""What FSEP refuses to run with, and why: checked on Megatron's arguments before anything runs.

Touches nothing of Megatron; `args` is its parsed namespace. What the parity table proves equal to
stock is in docs/support.md.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_laer.config import FIXED_PLANNERS, FSEPConfig
from megatron_laer.layout import default_capacity
from megatron_laer.planner.strategies import strategy_names


@dataclass(frozen=True)
class Refusal:
    """One unsupported setting.

    Attributes:
        given: the setting as the user passed it, or None when it is not set.
        reason: why FSEP cannot run with it.
        way_out: what would work.
    """

    given: Callable[[Namespace], str | None]
    reason: str
    way_out: str


def _flag(
    name: str, default: object = None, attribute: str = ""
) -> Callable[[Namespace], str | None]:
    """The flag is given when its value is neither `default` nor false."""
    attribute = attribute or name.removeprefix("--").replace("-", "_")

    def given(args: Namespace) -> str | None:
        value = getattr(args, attribute, default)
        if value is None or value is False or value == default:
            return None
        return name if value is True else f"{name} {value}"

    return given


def _value(name: str, allowed: tuple[object, ...]) -> Callable[[Namespace], str | None]:
    """The flag's value is none of `allowed`."""
    attribute = name.removeprefix("--").replace("-", "_")

    def given(args: Namespace) -> str | None:
        value = getattr(args, attribute, None)
        return None if value is None or value in allowed else f"{name} {value}"

    return given


def _expert_tensor_parallel(args: Namespace) -> str | None:
    # Megatron defaults the expert tensor parallel size to the dense one.
    given = args.expert_tensor_parallel_size
    if (given if given is not None else args.tensor_model_parallel_size) == 1:
        return None
    if given is None:
        return (
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} without "
            "--expert-tensor-parallel-size"
        )
    return f"--expert-tensor-parallel-size {given}"


def _recomputes(module: str) -> Callable[[Namespace], str | None]:
    def given(args: Namespace) -> str | None:
        return f"--recompute-modules {module}" if module in (args.recompute_modules or ()) else None

    return given


def _linear_bias(args: Namespace) -> str | None:
    return "expert biases (no --disable-bias-linear)" if args.add_bias_linear else None


def _too_few_ranks(args: Namespace) -> str | None:
    size = args.expert_model_parallel_size
    return f"--expert-model-parallel-size {size}" if size < 2 else None


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        lambda args: None if args.num_experts else f"--num-experts {args.num_experts}",
        "there are no experts to shard",
        "give --num-experts, or leave out --expert-parallel-mode fsep",
    ),
    Refusal(
        _too_few_ranks,
        "the FSEP group is the expert-parallel group, and one rank has nobody to share with",
        "give --expert-model-parallel-size 2 or more",
    ),
    Refusal(
        _expert_tensor_parallel,
        "a slice already cuts an expert's rows over the group",
        "give --expert-tensor-parallel-size 1",
    ),
    Refusal(
        _flag("--expert-tensor-parallel-num-weight-shards", default=1),
        "Megatron's expert GTP would shard a shard",
        "leave it out: FSEP shards expert weights already",
    ),
    Refusal(
        _value("--moe-token-dispatcher-type", ("alltoall",)),
        "tokens travel by Megatron's All-to-All dispatcher over slots",
        "give --moe-token-dispatcher-type alltoall",
    ),
    Refusal(
        _flag("--moe-expert-capacity-factor"),
        "FSEP computes every token; dropping them would make replicas differ",
        "leave it out: balance comes from layouts, not from dropping",
    ),
    Refusal(
        _flag("--moe-pad-expert-input-to-capacity"),
        "it pads to a capacity, and FSEP drops no token",
        "leave it out",
    ),
    Refusal(
        _flag("--moe-expert-rank-capacity-factor"),
        "it drops tokens over a rank's budget",
        "leave it out: balanced layouts bound what a rank receives",
    ),
    Refusal(
        _flag("--fp8-format", attribute="fp8"),
        "restored experts are computed in bf16 or fp32",
        "leave it out, and train with --bf16",
    ),
    Refusal(
        _flag("--fp4-format", attribute="fp4"),
        "restored experts are computed in bf16 or fp32",
        "leave it out, and train with --bf16",
    ),
    Refusal(
        _flag("--fp8-param-gather"), "slices are kept in the parameters' dtype", "leave it out"
    ),
    Refusal(
        _flag("--fp4-param-gather"), "slices are kept in the parameters' dtype", "leave it out"
    ),
    Refusal(
        _flag("--use-megatron-fsdp"),
        "Megatron-FSDP would shard slices again",
        "leave it out; --use-distributed-optimizer shards the dense part",
    ),
    Refusal(
        _flag("--use-torch-fsdp2"),
        "torch FSDP2 excludes expert parallelism",
        "leave it out; --use-distributed-optimizer shards the dense part",
    ),
    Refusal(
        _flag("--mtp-use-repeated-layer"),
        "one layer runs several times per microbatch, backward in another order than forward",
        "leave it out",
    ),
    Refusal(
        _recomputes("moe_act"),
        "it belongs to Transformer Engine's grouped experts, which FSEP replaces",
        "use --recompute-modules moe",
    ),
    Refusal(
        _flag("--enable-cuda-graph"),
        "layouts and split sizes are decided on the host, which a graph cannot record",
        "give --cuda-graph-impl none",
    ),
    Refusal(
        _flag("--external-cuda-graph"),
        "layouts and split sizes are decided on the host, which a graph cannot record",
        "give --cuda-graph-impl none",
    ),
    Refusal(
        _value("--cuda-graph-impl", ("none",)),
        "layouts and split sizes are decided on the host, which a graph cannot record",
        "give --cuda-graph-impl none",
    ),
    Refusal(
        _flag("--delay-wgrad-compute"),
        "gradients of restored experts leave the rank as soon as they are computed",
        "leave it out",
    ),
    Refusal(
        _flag("--overlap-dispatch-backward-with-experts-wgrad"),
        "gradients of restored experts leave the rank as soon as they are computed",
        "leave it out",
    ),
    Refusal(
        _flag("--overlap-moe-expert-parallel-comm"),
        "its schedule frees what a restore still needs; no test proves the combination",
        "leave it out",
    ),
    Refusal(
        _value("--optimizer", ("adam", "sgd", "lion")),
        "the optimizer needs whole matrices, and a rank holds rows of them",
        "give --optimizer adam or sgd",
    ),
    Refusal(
        _linear_bias,
        "slices hold weights only",
        "give --disable-bias-linear, as current MoE models do",
    ),
    Refusal(_flag("--moe-latent-size"), "no test proves it yet", "leave it out"),
    Refusal(_flag("--moe-mlp-glu-interleave-size"), "no test proves it yet", "leave it out"),
    Refusal(
        _flag("--moe-use-upcycling"),
        "upcycling copies dense weights into whole experts",
        "upcycle with stock expert parallelism, then load the checkpoint with FSEP",
    ),
    Refusal(
        _value("--transformer-impl", ("local", "transformer_engine")),
        "it builds layers for inference",
        "give --transformer-impl local or transformer_engine",
    ),
)


def check(args: Namespace, config: FSEPConfig) -> None:
    """Refuse what FSEP cannot run with, all of it in one message.

    Raises:
        ValueError: what was given, why it cannot work, and what would.
    """
    problems = [
        f"{given}: {refusal.reason}; {refusal.way_out}"
        for refusal in REFUSALS
        if (given := refusal.given(args)) is not None
    ]
    if not problems:
        problems = _shape_problems(args, config)
    if problems:
        raise ValueError(
            "--expert-parallel-mode fsep cannot run with these settings:\n  "
            + "\n  ".join(problems)
        )


def check_model(config: Any) -> None:
    """Refuse a model configuration that no argument check has seen, as in scripts of one's own.

    Args:
        config: Megatron's TransformerConfig.

    Raises:
        ValueError: the fields, and what would work.
    """
    wanted: dict[str, object] = {
        "moe_token_dispatcher_type": "alltoall",
        "expert_tensor_parallel_size": 1,
        "add_bias_linear": False,
        "moe_expert_capacity_factor": None,
        "moe_expert_rank_capacity_factor": None,
        "moe_pad_expert_input_to_capacity": False,
        "moe_latent_size": None,
        "moe_mlp_glu_interleave_size": None,
        "fp8": None,
        "fp4": None,
        "cuda_graph_impl": "none",
        "delay_wgrad_compute": False,
        "overlap_moe_expert_parallel_comm": False,
        "overlap_dispatch_backward_with_experts_wgrad": False,
    }
    problems = [
        f"{name}={getattr(config, name)!r}: must be {value!r}"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    if problems:
        raise ValueError("FSEP cannot run this model:\n  " + "\n  ".join(problems))


def _shape_problems(args: Namespace, config: FSEPConfig) -> list[str]:
    problems = []
    ranks, experts = args.expert_model_parallel_size, args.num_experts
    fewest, default = -(-experts // ranks), default_capacity(ranks, experts)
    if config.capacity is not None and not fewest <= config.capacity <= experts:
        problems.append(
            f"--fsep-capacity {config.capacity} with --num-experts {experts} on "
            f"--expert-model-parallel-size {ranks}: the slots must hold every expert and a rank "
            f"none twice; use {fewest} to {experts} (default {default})"
        )
    if config.node_size is not None and ranks % config.node_size:
        divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
        problems.append(
            f"--fsep-node-size {config.node_size} does not divide "
            f"--expert-model-parallel-size {ranks}; use one of {divisors}"
        )
    known = {*strategy_names(), *FIXED_PLANNERS}
    if config.planner not in known:
        problems.append(
            f"--fsep-planner {config.planner}: unknown planner; use one of "
            f"{', '.join(sorted(known))}"
        )
    return problems
