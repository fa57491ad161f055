"""Shape of a run from Megatron's flags, and the flags of a shape."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_laer.choices import Recompute, Unproven
from megatron_laer.config import setting
from megatron_laer.files.checks import quoted
from megatron_laer.fsep_flags import config_from_args, given_flags
from megatron_laer.support import arguments
from megatron_laer.tools.cli.megatron_flags import parsed
from megatron_laer.tools.model_flags import model_flags, precision_of
from megatron_laer.tools.recipes.verdict import judge
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.run_shape import RunShape

# Megatron's arguments, by our option of the same size.
_SAME = {
    "pipeline": "pipeline_model_parallel_size",
    "tensor_parallel": "tensor_model_parallel_size",
}
# Sizes of the model that flags may repeat.
_OF_MODEL = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "num_experts moe_ffn_hidden_size moe_router_topk moe_layer_freq mtp_num_layers vocab_size "
    "moe_shared_expert_intermediate_size multi_latent_attention swiglu hybrid_layer_pattern"
).split()
# Sizes of the run, which are at least 1.
_OF_RUN = (
    *_SAME.values(),
    *("context_parallel_size", "expert_model_parallel_size"),
    *("micro_batch_size", "seq_length", "global_batch_size"),
    *("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"),
)
# Settings of FSEP that change no predicted time; `advise` chooses all others.
_NOT_CHOSEN = frozenset(
    "allow_unproven late_plan cluster record_layouts record_trace pairs_interval sampled_sets "
    "record_metrics".split()
)
_SIZES_OF_FLAGS = (*_SAME, "virtual_pipeline", "data_parallel_sharding_strategy")
_WITH_FSDP = ("--ckpt-format", "fsdp_dtensor", "--no-gradient-accumulation-fusion")
_ALL_BUT_ATTENTION = "--recompute-granularity selective --recompute-modules moe".split()
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()


def fill_in(args: argparse.Namespace, settings: argparse.Namespace, model: ModelShape) -> None:
    """Set the run's sizes in `args` from Megatron's settings; refuse those that are given twice.

    Refuse options of our own too that Megatron has as flags: the flags to paste would lack them.
    """
    _check(settings)
    given = [name for name in _SIZES_OF_FLAGS if getattr(args, name) is not None]
    for name, value, source in _sizes(args, settings, model):
        if getattr(args, name) is not None:
            ours = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ValueError(f"{ours} and {source} say the same; remove one of them")
        setattr(args, name, value)
    for name in given:
        option = f"--{name.replace('_', '-')} {getattr(args, name)}"
        raise ValueError(
            f"{option}: the flags to paste would lack it; give Megatron's among the run's flags"
        )
    args.recompute = _recompute(settings) or args.recompute
    shards = settings.use_distributed_optimizer or settings.use_megatron_fsdp
    args.no_distributed_optimizer |= not shards
    args.no_data_parallel_overlap |= not settings.overlap_grad_reduce
    args.account_for_embedding |= settings.account_for_embedding_in_pipeline_split
    args.account_for_loss |= settings.account_for_loss_in_pipeline_split
    if settings.moe_token_dispatcher_type == "alltoall":
        args.stock_dispatcher = "alltoall"
    args.flex_backend = settings.moe_flex_dispatcher_backend
    args.overlap |= settings.overlap_moe_expert_parallel_comm
    if settings.use_megatron_fsdp:
        args.data_parallel_sharding_strategy = settings.data_parallel_sharding_strategy


def model_with(
    args: argparse.Namespace, settings: argparse.Namespace, model: ModelShape
) -> ModelShape:
    """Return the model with the sequences and the precision of the flags."""
    if settings.bf16 or settings.fp16:
        model = replace(model, bytes_per_element=2)
    if settings.seq_length is not None:
        model = replace(model, sequence=settings.seq_length)
    if settings.first_last_layers_bf16:
        ends = settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16
        model = replace(model, bf16_ends=ends)
    if not settings.fp8:
        return model
    if args.fp8_format is not None:
        raise ValueError(
            f"--fp8-format {args.fp8_format}: the run's flags have it too; remove one of them"
        )
    return replace(model, precision=precision_of(settings.fp8, settings.fp8_recipe))


def flags_of(shape: RunShape) -> list[str]:
    """Return Megatron's flags for a shape that was given by our options."""
    words: list[str] = []
    if shape.tensor > 1:
        words += ["--tensor-model-parallel-size", str(shape.tensor), "--sequence-parallel"]
        words += ["--expert-tensor-parallel-size", "1"]
    if shape.stages > 1:
        words += ["--pipeline-model-parallel-size", str(shape.stages)]
    if shape.chunks > 1:
        words += ["--num-virtual-stages-per-pipeline-rank", str(shape.chunks)]
    if shape.embedding_counts:
        words.append("--account-for-embedding-in-pipeline-split")
    if shape.loss_counts:
        words.append("--account-for-loss-in-pipeline-split")
    if shape.recompute == Recompute.FULL:
        words += _FULL if shape.attention_again else _ALL_BUT_ATTENTION
    if shape.dense_sharding is not None:
        strategy = ["--data-parallel-sharding-strategy", shape.dense_sharding]
        return [*words, "--use-megatron-fsdp", *strategy, *_WITH_FSDP]
    if shape.shards_optimizer:
        words.append("--use-distributed-optimizer")
    if shape.overlaps_data_parallel:
        words.append("--overlap-grad-reduce")
        if shape.shards_optimizer:
            words.append("--overlap-param-gather")
    return words


def allowed(model: str, words: Sequence[str], ranks: int) -> tuple[Unproven, ...]:
    """Return the words of `--fsep-allow-unproven` that a run of a model's file needs.

    Raises ValueError for flags of another model, and for those that training refuses.
    """
    of_model = model_flags(model)
    own, settings = parsed(of_model), parsed([*of_model, *words], ranks)
    for name in _OF_MODEL:
        value, known = getattr(settings, name), getattr(own, name)
        if name == "moe_ffn_hidden_size":  # Megatron's default is the width of dense layers
            known = known or own.ffn_hidden_size
        if value not in (None, known):
            raise ValueError(
                f"{_flag(name)} {quoted(value)}: --model has {known}; give the model's own "
                "flags, or leave them out"
            )
    config = config_from_args(settings)
    assert config is not None, "the mode is set"
    needed = {*config.allow_unproven, *judge(settings, config.allow_unproven).allow}
    config = replace(config, allow_unproven=tuple(needed))
    arguments.check(settings, config)
    return config.allow_unproven


def _check(settings: argparse.Namespace) -> None:
    for name in _OF_RUN:
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ValueError(f"{_flag(name)} {value}: must be at least 1")
    for name, value in given_flags(settings).items():
        if name not in _NOT_CHOSEN:
            raise ValueError(
                f"{setting(name, value)}: advise chooses FSEP's settings, or takes their defaults; "
                "leave it out"
            )
    if settings.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {settings.context_parallel_size}: is not simulated; leave it "
            "out, and give --tokens of a rank"
        )
    if settings.pipeline_model_parallel_layout is not None:
        raise ValueError(
            f"--pipeline-model-parallel-layout {quoted(settings.pipeline_model_parallel_layout)}: "
            "is not read; give --num-virtual-stages-per-pipeline-rank"
        )


def _sizes(
    args: argparse.Namespace, settings: argparse.Namespace, model: ModelShape
) -> Iterator[tuple[str, int, str]]:
    """Yield our options with their values and the flags that these come from."""
    for ours, theirs in _SAME.items():
        value = getattr(settings, theirs)
        if value > 1:
            yield ours, value, f"{_flag(theirs)} {value}"
    stages, tensor = settings.pipeline_model_parallel_size, settings.tensor_model_parallel_size
    if settings.num_virtual_stages_per_pipeline_rank is not None:
        chunks = settings.num_virtual_stages_per_pipeline_rank
        yield "virtual_pipeline", chunks, f"--num-virtual-stages-per-pipeline-rank {chunks}"
    elif settings.num_layers_per_virtual_pipeline_stage is not None:
        of_chunk = settings.num_layers_per_virtual_pipeline_stage
        source = f"--num-layers-per-virtual-pipeline-stage {of_chunk}"
        layers = len(model.layer_has_experts) - (model.prediction_heads - 1)
        counted = layers + args.account_for_embedding + args.account_for_loss
        counted += settings.account_for_embedding_in_pipeline_split
        counted += settings.account_for_loss_in_pipeline_split
        if counted % (stages * of_chunk):
            raise ValueError(
                f"{source}: {counted} layers on {stages} stages are no multiple of it; give a "
                "divisor of a stage's layers"
            )
        yield "virtual_pipeline", counted // (stages * of_chunk), source
    micro = settings.micro_batch_size or 1
    if settings.micro_batch_size is not None or settings.seq_length is not None:
        sequence = settings.seq_length or model.sequence
        if sequence * micro % tensor:
            raise ValueError(
                f"--seq-length {sequence}: is no multiple of --tensor-model-parallel-size "
                f"{tensor}; give one"
            )
        source = f"--micro-batch-size {micro} --seq-length {sequence}"
        yield "tokens", sequence * micro // tensor, source
    if settings.global_batch_size is not None:
        whole = settings.global_batch_size
        source = f"--global-batch-size {whole}"
        groups = micro * max(args.gpus // (stages * tensor), 1)
        if whole % groups:
            raise ValueError(
                f"{source}: {args.gpus} GPUs take {groups} sequences at a time; give a multiple"
            )
        yield "microbatches", whole // groups, source


def _recompute(settings: argparse.Namespace) -> str | None:
    """Return our word for the recomputation of layers with experts; None for none."""
    if settings.recompute_granularity == "full":
        return Recompute.FULL.value
    is_selective = settings.recompute_granularity == "selective"
    return "moe" if is_selective and "moe" in (settings.recompute_modules or []) else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
