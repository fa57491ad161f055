"""Runs of rows, some with given routing or with calls in place of CUDA graphs.

`--moe-enable-routing-replay` alone changes nothing: `RouterReplay` must be given the choices, as in
training from RL. Here they are skewed at random, anew for each rank, microbatch and layer, and
unlike the routers' own.

Legend: L layers of a rank, T tokens of a rank's microbatch, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.cpu.training import Adapt, Probe, Record, train
from tests.delayed_weights import FLAGS, delayed_weights
from tests.doubles.fusions import fused_accumulation
from tests.parity.flags import UNFUSED
from tests.te_graphs import graphs_replaced

REPLAY = "--moe-enable-routing-replay"
GRAPHED = "--cuda-graph-impl"
FP8 = "--fp8-format"


def train_row(
    flags: list[str], probe: Probe | None = None, adapt: Adapt | None = None, gradients: bool = True
) -> Record:
    """Train with the flags of a row, with given routing or replaced parts if these ask for it."""
    with contextlib.ExitStack() as replaced:
        graphs = replaced.enter_context(graphs_replaced()) if GRAPHED in flags else []
        if FP8 in flags:
            from tests import te_fp8

            replaced.enter_context(te_fp8.replaced_on_cpu())
        if not FLAGS.keys().isdisjoint(flags):
            replaced.enter_context(delayed_weights())
        if UNFUSED not in flags:
            replaced.enter_context(fused_accumulation())
        if REPLAY in flags:
            from megatron.training import training

            told = _told(training.train_step)
            replaced.enter_context(mock.patch.object(training, "train_step", told))
        record = train(flags, probe, adapt=adapt, gradients=gradients)
    assert any(graph.replays for graph in graphs) or not graphs
    return record


def _told(train_step: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
    from megatron.training import get_args

    microbatch = 0

    def told_step(forward_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def told_forward(iterator: Any, model: Any) -> Any:
            nonlocal microbatch
            RouterReplay.set_replay_data(_experts_LTK(get_args(), microbatch))
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            output = forward_step(iterator, model)
            # A checkpoint's re-run gets the oldest indices that were not used yet.
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            microbatch += 1
            return output

        RouterReplay.clear_global_indices()
        return train_step(told_forward, *args, **kwargs)

    return told_step


def _experts_LTK(args: Any, microbatch: int) -> list[torch.Tensor]:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    random = torch.Generator().manual_seed(1000 * microbatch + dist.get_rank())
    cut = args.context_parallel_size
    cut *= args.tensor_model_parallel_size if args.sequence_parallel else 1
    tokens = args.seq_length * args.micro_batch_size // cut
    chosen = []
    for _ in RouterReplay.global_router_replay_instances:
        popularity_E = torch.randn(args.num_experts, generator=random)
        noise_TE = torch.randn(tokens, args.num_experts, generator=random)
        chosen.append((popularity_E + noise_TE).topk(args.moe_router_topk).indices)
    return chosen
