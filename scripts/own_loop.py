"""A training loop of one's own around Megatron Core, with FSEP.

torchrun --nproc-per-node 2 scripts/own_loop.py --steps 10 [--stock] [--save DIR] [--load DIR]
"""

import argparse
import os

from megatron_laer import launch

launch.prepare()  # before any import of megatron: without a GPU, torch.cuda is replaced here

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

import megatron_laer
from megatron_laer.device import cpu_installed
from megatron_laer.plugin.metrics_tracker import FSEPMetricsTracker

LAYERS, EXPERTS, VOCABULARY, LENGTH, BATCH, MICROBATCHES = 2, 8, 64, 32, 2, 2
SEED = 1234


def build_model():
    """Megatron's list of model chunks, here one, in its data-parallel wrapper."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=48,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=64,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        expert_model_parallel_size=dist.get_world_size(),
        # What FSEP needs: on a command line these two are its defaults, here they are not.
        moe_token_dispatcher_type="alltoall",
        expert_tensor_parallel_size=1,
        finalize_model_grads_func=finalize_model_grads,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
    return [DistributedDataParallel(config, ddp, model.cuda(torch.cuda.current_device()))]


def batches(step):
    """A step's microbatches of this rank: few tokens are frequent, so few experts are."""
    random = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    for _ in range(MICROBATCHES):
        drawn = torch.rand(BATCH, LENGTH + 1, generator=random)
        yield (drawn**4 * VOCABULARY).long().to(torch.cuda.current_device())


def forward_step(data, model):
    """One microbatch, as Megatron's schedules call it."""
    tokens = next(data)
    position = torch.arange(LENGTH, device=tokens.device).expand(BATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).triu(1)
    losses = model(tokens[:, :-1], position, mask[None, None], labels=tokens[:, 1:])

    def loss_of(losses):
        loss = losses.mean()
        return loss, loss.detach()

    return losses, loss_of


def train_step(step, model, optimizer):
    """Forward and backward passes of all microbatches, and the optimizer.

    Returns the loss, and whether the optimizer made its step.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(step),
        model=model,
        num_microbatches=MICROBATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    updated, _, _ = optimizer.step()
    loss = torch.stack(losses).mean()
    dist.all_reduce(loss, op=dist.ReduceOp.SUM)
    return loss.item() / dist.get_world_size(), updated


def state_of(model, optimizer, is_loading):
    """Megatron's sharded state of model and optimizer."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    weights = model[0].module.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading, metadata=metadata),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stock", action="store_true", help="without FSEP")
    parser.add_argument("--save", help="folder for a checkpoint after the last step")
    parser.add_argument("--load", help="folder to go on from")
    args = parser.parse_args()

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if cpu_installed() else "nccl")
    if not args.stock:
        # Before the groups and the model are made. `wait` makes runs repeatable.
        megatron_laer.enable(megatron_laer.FSEPConfig(late_plan="wait"), seed=SEED)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    torch.manual_seed(SEED)
    model_parallel_cuda_manual_seed(SEED)

    model = build_model()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True), model
    )
    first_step = 0
    if args.load is not None:
        state = dist_checkpointing.load(
            {**state_of(model, optimizer, is_loading=True), "step": 0}, args.load
        )
        model[0].module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    metrics = FSEPMetricsTracker(interval=1, decoder_layers=LAYERS, mtp_layers=0)

    for step in range(first_step, first_step + args.steps):
        if args.stock:
            loss, _ = train_step(step, model, optimizer)
            line = ""
        else:
            with megatron_laer.training_step(step, MICROBATCHES, model):
                loss, _ = train_step(step, model, optimizer)
            line = metrics.report(loss_scale=1 / MICROBATCHES, iteration=step, num_layers=LAYERS)
        if dist.get_rank() == 0:
            print(f"step {step} | loss {loss:.9f} |{line}", flush=True)

    if args.save is not None:
        state = state_of(model, optimizer, is_loading=False)
        if dist.get_rank() == 0:
            os.makedirs(args.save)
        dist.barrier()
        dist_checkpointing.save({**state, "step": first_step + args.steps}, args.save)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    main()
