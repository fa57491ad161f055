"""Runs with `--moe-enable-routing-replay`, whose routing is given, as in training from RL.

Megatron's flag alone changes nothing: `RouterReplay` must be given the choices. Here they are
skewed at random, anew for each rank, microbatch and layer, and unlike the routers' own.

Legend: L layers of a rank, T tokens of a rank's microbatch, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.cpu.training import Adapt, Probe, Record, train
from tests.delayed_weights import FLAGS, delayed_weights

REPLAY = "--moe-enable-routing-replay"


def train_row(
    flags: list[str], probe: Probe | None = None, adapt: Adapt | None = None, gradients: bool = True
) -> Record:
    """Train with the flags of a row, with given routing where these ask for it."""
    if not FLAGS.keys().isdisjoint(flags):
        with delayed_weights():
            return train(flags, probe, adapt=adapt, gradients=gradients)
    if REPLAY not in flags:
        return train(flags, probe, adapt=adapt, gradients=gradients)
    from megatron.training import training

    with mock.patch.object(training, "train_step", _told(training.train_step)):
        return train(flags, probe, adapt=adapt, gradients=gradients)


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
