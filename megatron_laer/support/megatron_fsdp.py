"""Settings that do not go with dense layers sharded by Megatron-FSDP (`--use-megatron-fsdp`)."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_laer.choices import Auto, Sharding

STRATEGIES = ("optim", "optim_grads", "optim_grads_params")

_WITH = "with --use-megatron-fsdp"
_FORMAT = "fsdp_dtensor"
_NO_TEST = "no test proves the two together"


class _Partner(NamedTuple):
    """Setting with the values that go with Megatron-FSDP.

    `default`, Megatron's own, stands for settings that a recipe or an older Megatron lacks.
    """

    name: str
    accepted: tuple[object, ...]
    default: object
    reason: str = _NO_TEST
    way_out: str = "leave out one of them"

    @property
    def flag(self) -> str:
        own = {"fp8": "--fp8-format", "nccl_ub": "--use-nccl-ub"}
        return own.get(self.name, f"--{self.name.replace('_', '-')}")


_OFF = (False, None)
PARTNERS = (
    _Partner(
        "data_parallel_sharding_strategy",
        STRATEGIES,
        STRATEGIES[-1],
        "it shards nothing",
        f"give {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}",
    ),
    _Partner(
        "init_model_with_meta_device",
        _OFF,
        False,
        "replicas are sent from the parameters that their home was built with",
        "leave it out",
    ),
    _Partner(
        "ddp_average_in_collective",
        _OFF,
        False,
        "it divides experts' gradients by their own replicas instead of all data-parallel ranks",
        "leave it out",
    ),
    _Partner(
        "megatron_fsdp_grad_comm_dtype",
        ("auto", None),
        "auto",
        "a gradient that is kept whole would be added to its own sum",
        "leave it out",
    ),
    _Partner("megatron_fsdp_main_params_dtype", ("fp32", "torch.float32"), "fp32"),
    _Partner(
        "pipeline_model_parallel_size",
        (1,),
        1,
        "its mesh of ranks has no place for stages, in stock too",
        "give --pipeline-model-parallel-size 1",
    ),
    _Partner("num_distributed_optimizer_instances", (1,), 1),
    _Partner("overlap_moe_expert_parallel_comm", _OFF, False),
    _Partner("delay_wgrad_compute", _OFF, False),
    _Partner("overlap_dispatch_backward_with_experts_wgrad", _OFF, False),
    _Partner(
        "log_params_norm",
        _OFF,
        False,
        "Megatron would reduce experts' gradients once more",
        "leave it out",
    ),
    _Partner("nccl_ub", _OFF, False),
    _Partner("fsdp_double_buffer", _OFF, False),
    _Partner("megatron_fsdp_max_pool_double_buffer", _OFF, False),
    _Partner("megatron_fsdp_enable_fine_grained_param_gather", _OFF, False),
    _Partner("optimizer", ("adam",), "adam"),
    _Partner("optimizer_cpu_offload", _OFF, False),
    _Partner("use_precision_aware_optimizer", _OFF, False),
    _Partner("cuda_graph_impl", ("none", None), "none"),
    _Partner("async_save", _OFF, False),
    _Partner("non_persistent_save_interval", (None,), None),
    _Partner("fp16", _OFF, False),
    _Partner("fp8", _OFF, None),
)


def problems(settings: Any, sharding: Sharding | Auto = Sharding.EXPERTS) -> list[str]:
    """Return the settings with which Megatron-FSDP cannot shard dense layers next to FSEP.

    `settings` are Megatron's arguments; a recipe's lack some, which have Megatron's defaults.
    """
    if not getattr(settings, "use_megatron_fsdp", False):
        return []
    found = []
    if sharding != Sharding.EXPERTS:
        found.append(
            f"--use-megatron-fsdp with --fsep-sharding {sharding}: Megatron-FSDP takes experts as "
            f"stock's parameters; give --fsep-sharding {Sharding.EXPERTS}"
        )
    if getattr(settings, "gradient_accumulation_fusion", True):
        found.append(
            "--use-megatron-fsdp with fused gradient accumulation: the kernels write over the "
            "gradients to which those of replicas are added; give --no-gradient-accumulation-fusion"
        )
    # No field of Megatron's configurations, so that a loop of one's own has none.
    form = getattr(settings, "ckpt_format", _FORMAT)
    if form != _FORMAT:
        found.append(
            f"--ckpt-format {form} {_WITH}: Megatron has another form for its shards; give "
            f"--ckpt-format {_FORMAT}"
        )
    for partner in PARTNERS:
        value = getattr(settings, partner.name, partner.default)
        if value in partner.accepted or str(value) in partner.accepted:
            continue
        given = "" if value is True else f" {value}"
        found.append(f"{partner.flag}{given} {_WITH}: {partner.reason}; {partner.way_out}")
    return found
