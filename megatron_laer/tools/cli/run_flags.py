"""Shape and model of a run by Megatron's flags."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from megatron_laer.choices import Recompute, Unproven
from megatron_laer.config import setting
from megatron_laer.files.checks import quoted
from megatron_laer.fsep_flags import config_from_args, given_flags
from megatron_laer.rules import value_text
from megatron_laer.support import arguments
from megatron_laer.tools.cli.megatron_flags import parsed, ranks_problem
from megatron_laer.tools.model_flags import model_flags, precision_of
from megatron_laer.tools.recipes.verdict import judge
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.run_shape import RunShape

# Sizes of the model that flags may repeat.
_OF_MODEL = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "num_experts moe_ffn_hidden_size moe_router_topk moe_layer_freq mtp_num_layers vocab_size "
    "moe_shared_expert_intermediate_size multi_latent_attention swiglu hybrid_layer_pattern"
).split()
# Sizes of the run, with Megatron's defaults.
_OF_RUN = {
    "pipeline_model_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "micro_batch_size": None,
    "seq_length": None,
    "global_batch_size": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "num_layers_per_virtual_pipeline_stage": None,
}
# Settings of FSEP that change no predicted time; `advise` chooses all others.
_NOT_CHOSEN = frozenset(
    "allow_unproven late_plan cluster record_layouts record_trace pairs_interval sampled_sets "
    "record_metrics".split()
)
# Flags that are not simulated, with their values without effect and a way out.
_NOT_SIMULATED = (
    ("context_parallel_size", 1, "leave it out, and give --seq-length of a rank"),
    ("pipeline_model_parallel_layout", None, "give --num-virtual-stages-per-pipeline-rank"),
    ("use_megatron_fsdp", False, "leave it out, and what it needs"),
    ("decoder_first_pipeline_num_layers", None, "leave it out; stages are taken to be alike"),
    ("decoder_last_pipeline_num_layers", None, "leave it out; stages are taken to be alike"),
    ("rampup_batch_size", None, "leave it out, and give --global-batch-size"),
)
# Settings of a run without flags: `ASSUMED`, and Megatron's defaults.
ASSUMED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
RECOMPUTE = tuple(
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
)
DEFAULTS = {
    **_OF_RUN,
    **{name: without for name, without, _ in _NOT_SIMULATED},
    **dict.fromkeys(
        "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split bf16 fp16 "
        "moe_shared_expert_overlap overlap_moe_expert_parallel_comm moe_permute_fusion".split(),
        False,
    ),
    **dict.fromkeys(("use_distributed_optimizer", "overlap_grad_reduce"), True),
    **dict.fromkeys(("recompute_granularity", "fp8")),
    "optimizer": "adam",
    "moe_token_dispatcher_type": "alltoall",
    "gives_dispatcher": False,
    "moe_flex_dispatcher_backend": "deepep",
}


def run_shape(
    settings: Namespace, gpus: int, model: ModelShape, tokens: int, microbatches: int
) -> RunShape:
    """Return the shape of a run on `gpus`, with a stage's ranks as one group.

    `tokens` of a rank and `microbatches` are taken where no flag gives them.
    """
    _check(settings)
    stages, tensor = settings.pipeline_model_parallel_size, settings.tensor_model_parallel_size
    ranks, left = divmod(gpus, stages)
    if left or ranks % tensor:
        raise ValueError(
            f"--gpus {gpus}: is no multiple of {stages} pipeline stages times {tensor} "
            "tensor-parallel ranks; give one"
        )
    if problem := ranks_problem(settings, gpus):
        raise ValueError(problem)
    model.check_tensor(tensor, "--tensor-model-parallel-size")
    micro = settings.micro_batch_size or 1
    if settings.micro_batch_size is not None or settings.seq_length is not None:
        sequence = settings.seq_length or model.sequence
        tokens, left = divmod(sequence * micro, tensor)
        if left:
            raise ValueError(
                f"--seq-length {sequence}: is no multiple of --tensor-model-parallel-size "
                f"{tensor}; give one"
            )
    if settings.global_batch_size is not None:
        groups = micro * max(ranks // tensor, 1)
        microbatches, left = divmod(settings.global_batch_size, groups)
        if left:
            raise ValueError(
                f"--global-batch-size {settings.global_batch_size}: {gpus} GPUs take {groups} "
                "sequences at a time; give a multiple"
            )
    in_full = settings.recompute_granularity == "full"
    is_selective = settings.recompute_granularity == "selective"
    again = in_full or (is_selective and "moe" in (settings.recompute_modules or []))
    shape = RunShape(
        ranks=ranks,
        node_size=1,
        tokens=tokens,
        microbatches=microbatches,
        stages=stages,
        chunks=_chunks(settings, model),
        tensor=tensor,
        recompute=Recompute.FULL if again else Recompute.NONE,
        attention_again=in_full,
        embedding_counts=settings.account_for_embedding_in_pipeline_split,
        loss_counts=settings.account_for_loss_in_pipeline_split,
        shards_optimizer=settings.use_distributed_optimizer,
        overlaps_data_parallel=settings.overlap_grad_reduce,
    )
    shape.layers_by_chunk(len(model.layer_has_experts))  # refuses stages without a layer
    return shape


def overlaps(settings: Namespace, shape: RunShape) -> tuple[bool, ...]:
    """Return the possible values of combined 1F1B; refuse its flag where Megatron does."""
    possible = shape.can_overlap and not settings.moe_shared_expert_overlap
    if not settings.overlap_moe_expert_parallel_comm:
        return (False, True) if possible else (False,)
    if not possible:
        raise ValueError(
            "--overlap-moe-expert-parallel-comm: not with recompute of layers, pipelines without "
            "virtual stages, nor --moe-shared-expert-overlap; leave one out"
        )
    return (True,)


def model_with(settings: Namespace, model: ModelShape) -> ModelShape:
    """Return the model with the sequences and the precision of the flags."""
    if settings.bf16 or settings.fp16:
        model = replace(model, bytes_per_element=2)
    if settings.seq_length is not None:
        model = replace(model, sequence=settings.seq_length)
    if not settings.fp8:
        return model
    return replace(model, precision=precision_of(settings.fp8, settings.fp8_recipe))


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


def _check(settings: Namespace) -> None:
    for name, value in given_flags(settings).items():
        if name not in _NOT_CHOSEN:
            raise ValueError(
                f"{setting(name, value)}: advise chooses FSEP's settings, or takes their defaults; "
                "leave it out"
            )
    for name, without, way_out in _NOT_SIMULATED:
        if (value := getattr(settings, name)) != without:
            shown = quoted(value) if isinstance(value, str) else value_text(value)
            given = _flag(name) if value is True else f"{_flag(name)} {shown}"
            raise ValueError(f"{given}: is not simulated; {way_out}")

    if settings.optimizer == "sgd":
        raise ValueError(
            "--optimizer sgd: is not simulated, since memory and time of adam's state are counted; "
            "leave it out"
        )


def _chunks(settings: Namespace, model: ModelShape) -> int:
    """Return the model chunks of a stage."""
    of_chunk = settings.num_layers_per_virtual_pipeline_stage
    if settings.num_virtual_stages_per_pipeline_rank is not None or of_chunk is None:
        return int(settings.num_virtual_stages_per_pipeline_rank or 1)
    counted = len(model.layer_has_experts) - (model.prediction_heads - 1)
    counted += settings.account_for_embedding_in_pipeline_split
    counted += settings.account_for_loss_in_pipeline_split
    stages = settings.pipeline_model_parallel_size
    chunks, left = divmod(counted, stages * of_chunk)
    if left:
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage {of_chunk}: {counted} layers on {stages} "
            "stages are no multiple of it; give a divisor of a stage's layers"
        )
    return int(chunks)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
