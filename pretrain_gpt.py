"""Pretrain a GPT model, with or without `--expert-parallel-mode fsep`, from Megatron's wheel alone.

    torchrun --nproc-per-node 2 pretrain_gpt.py <Megatron's flags> [<the plugin's flags>]

Megatron's wheel has the training loop but no script to run it. This one does plain pretraining, and
computes the same as Megatron's own script, bit for bit. It omits fill-in-the-middle data,
fine-tuning, packed sequences and distillation, and refuses flags that ask for them. With
`--hybrid-layer-pattern` it trains Megatron's HybridModel instead of a GPT.
"""

# ruff: noqa: E402 -- imports of Megatron have to follow prepare()

import sys
import time

from megatron_laer.files.checks import in_one_line
from megatron_laer.launch import prepare

_STARTED_S = time.time()
# Before any import of Megatron: on a machine without a GPU, torch.cuda must be replaced first.
try:
    prepare()
except (ImportError, ValueError) as error:
    print(f"pretrain_gpt.py: {in_one_line(error)}", file=sys.stderr)
    sys.exit(2)

import json
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import (
    get_args,
    get_timers,
    inprocess_restart,
    pretrain,
    print_rank_0,
    set_startup_timestamps,
)
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_laer.plugin.pretraining import no_packed_sequences, pretrain_arguments
from megatron_laer.support import RefusedError

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# A loss this many times the largest seen is reported by --check-for-spiky-loss, as in Megatron.
SPIKE_FACTOR = 10
# Fields of the dataset configuration with the name of their flag.
SAME_IN_DATASET = """
    split multiple_validation_sets full_validation num_dataset_builder_threads mmap_bin_files
    reset_position_ids reset_attention_mask eod_mask_loss object_storage_cache_path
    mid_level_dataset_surplus allow_ambiguous_pad_tokens context_parallel_size data_parallel_size
""".split()
OUT_OF_SCOPE = (
    "fim_data sft dataloader_inter_document_masking hybrid_context_parallel logits_load_dir".split()
)

stragglers = StragglerDetector()


def has_mtp(vp_stage):
    """Return True if a multi-token prediction layer, which reads tokens and labels, is here."""
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def reads_batch(vp_stage):
    """Return True if this pipeline stage needs any part of a batch."""
    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(vp_stage)


def get_batch(data_iterator, vp_stage=None):
    """Return a microbatch's `BATCH_KEYS`: read by tensor rank 0, sent on, cut by context rank."""
    if not reads_batch(vp_stage):
        return [None] * len(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        for key in BATCH_KEYS:
            value = sample.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        **no_packed_sequences(),
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return [batch[key] for key in BATCH_KEYS]


def loss_func(loss_mask, output):
    """Return the microbatch's summed loss, its number of tokens, and Megatron's log of both."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    # A copy: Megatron scales the loss in place before it reads the report.
    report = {"lm loss": torch.cat([loss.detach().clone().view(1), tokens.view(1)])}
    check_loss(loss)
    return loss, tokens, report


def check_loss(loss):
    """Stop at NaN and infinity, and report spikes, before ranks mix their losses."""
    args = get_args()
    machine = get_rerun_state_machine()
    # Forward passes are deterministic, so a rerun has to give exactly the same value.
    validate = partial(machine.validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            message = f"found {name} in local forward loss calculation"
            validate(rejection_func=is_bad, message=message, fatal=True)
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss")
        validate(rejection_func=is_spike, message="Spiky loss", fatal=False)


def forward_step(data_iterator, model, return_schedule_plan=False):
    """Run the model on one microbatch, or return its schedule plan for the overlapped schedule."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    with stragglers(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator, vp_stage)
    timer.stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    with stragglers:
        output = run(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def dataset_config(args):
    """Return Megatron's dataset configuration from its command line."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    return GPTDatasetConfig(
        **{name: getattr(args, name) for name in SAME_IN_DATASET},
        tokenizer=build_tokenizer(args),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences_per_dataset,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def datasets_provider(sample_counts, vp_stage=None):
    """Build training, validation and test data on the ranks that read them."""
    args = get_args()
    dataset = MockGPTDataset if args.mock_data else GPTDataset

    def is_built():
        return mpu.get_tensor_model_parallel_rank() == 0 and reads_batch(vp_stage)

    print_rank_0("> building train, validation, and test datasets for GPT ...")
    builder = BlendedMegatronDatasetBuilder(dataset, sample_counts, is_built, dataset_config(args))
    return builder.build()


# Makes Megatron call the provider on every rank; it decides itself which ranks read.
datasets_provider.is_distributed = True


def embedding_ranks(pp_ranks):
    """Return the pipeline ranks that hold a copy of the word embedding."""
    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def refuse_out_of_scope(args):
    """Raise for a flag that this script would silently ignore."""
    given = ["--" + name.replace("_", "-") for name in OUT_OF_SCOPE if getattr(args, name, None)]
    if given:
        raise RefusedError(
            f"{', '.join(given)} is not supported by this script, which does plain pretraining; "
            "run Megatron's own through `python -m megatron_laer train PATH/pretrain_gpt.py -- ...`"
        )


def main() -> None:
    """Parse Megatron's command line and train."""
    set_startup_timestamps(program_start=_STARTED_S, main_entry=time.time())
    train, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    refuse_out_of_scope(args)
    train(
        **pretrain_arguments(args),
        train_valid_test_dataset_provider=datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        store=store,
        get_embedding_ranks=embedding_ranks,
    )


if __name__ == "__main__":
    try:
        main()
    except RefusedError as error:
        print(f"pretrain_gpt.py: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
