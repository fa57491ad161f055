"""Timed training steps in Megatron's own loop on this rank.

`pretrain_gpt.main()` runs with a command line. Observers record the starts of steps, the experts of
tokens, and the exposed waits. Megatron's own means impose the routing: its flags for balanced and
biased routing, and its router replay.

Legend: P steps, L layers, N ranks, E experts.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.routing import RoutingShape, fixed_biases
from megatron_laer.cpu.training import fresh_megatron
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean, stock_tokens_N
from megatron_laer.session import current_coordinator


@dataclass(frozen=True)
class Routing:
    """Choice of the tokens' experts.

    `trace` is the file of a trace to replay, step by step. `bias` is the standard deviation and the
    seed of a fixed bias per expert.
    """

    flags: str = ""
    trace: Path | None = None
    bias: tuple[float, int] | None = None


@dataclass
class Measured:
    """Measurements of a run, with one entry per step.

    Attributes:
        step_ms: from the start of a step to the start of the next.
        cpu_ms: processor time of this rank in a step, all threads. Unlike wall time it excludes
            waits, and hardly grows when other work shares the cores.
        stock_skew: mean over layers of max/mean tokens per rank with stock placement.
        restore_exposed_ms, reduce_exposed_ms: exposed waits of this rank's compute, FSEP only.
        fsep_skew: max/mean tokens per rank as FSEP computed them, per layer and microbatch; only
            the newest ones, on rank 0.
        free_bytes: of this rank's device at the end of a step.
        weight_bytes: of weights and their gradients that this rank received, FSEP only.
    """

    step_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    stock_skew: list[float] = field(default_factory=list)
    restore_exposed_ms: list[float] = field(default_factory=list)
    reduce_exposed_ms: list[float] = field(default_factory=list)
    fsep_skew: list[float] = field(default_factory=list)
    free_bytes: list[int] = field(default_factory=list)
    weight_bytes: int = 0


def measure(flags: list[str], routing: Routing, shape: RoutingShape | None, steps: int) -> Measured:
    """Train for `steps` steps, and one more whose start ends the last. Collective.

    Without `shape`, the routing's sizes, stock's skew is omitted, as where layers are on other
    ranks.
    """
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
    from megatron.training import training

    import pretrain_gpt

    trace = None if routing.trace is None else np.load(routing.trace, mmap_mode="r")
    model: list[torch.nn.Module] = []
    begins_s: list[float] = []
    begins_cpu_s: list[float] = []
    exposed_ms: list[tuple[float, float]] = []
    free_bytes: list[int] = []
    counts_E: list[torch.Tensor] = []
    setup, train_step = training.setup_model_and_optimizer, training.train_step

    def observed_setup(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        model[:] = result[0]
        routers = [
            part for chunk in model for part in chunk.modules() if isinstance(part, TopKRouter)
        ]
        for router in routers:
            router.register_forward_hook(lambda _, __, out: counts_E.append(out[1].sum(dim=0)))
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        if routing.bias is not None:
            assert shape is not None
            _set_fixed_biases(shape, *routing.bias)
        torch.manual_seed(dist.get_rank())  # forced routing draws its noise from this generator
        return result

    def observed_step(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        begins_s.append(time.perf_counter())
        begins_cpu_s.append(time.process_time())
        free_bytes.append(torch.cuda.mem_get_info()[0])
        coordinator = current_coordinator()
        if coordinator is not None:
            exposed_ms.append(coordinator.take_exchanged()[:2])
        if trace is not None:
            RouterReplay.clear_global_indices()
            chosen_LTK = torch.from_numpy(
                trace[len(begins_s) - 1, :, dist.get_rank()].astype(np.int64)
            )
            RouterReplay.set_replay_data(list(chosen_LTK.to(torch.cuda.current_device())))
        return train_step(*args, **kwargs)

    argv = ["pretrain_gpt.py", *flags, *routing.flags.split(), "--train-iters", str(steps + 1)]
    with (
        mock.patch.object(training, "setup_model_and_optimizer", observed_setup),
        mock.patch.object(training, "train_step", observed_step),
        mock.patch.object(sys, "argv", argv),
        fresh_megatron(model),
    ):
        pretrain_gpt.main()
        restore_ms, reduce_ms = zip(*exposed_ms[1:], strict=True) if exposed_ms else ((), ())
        return Measured(
            step_ms=(1e3 * np.diff(begins_s)).tolist(),
            cpu_ms=(1e3 * np.diff(begins_cpu_s)).tolist(),
            stock_skew=[] if shape is None else _stock_skew(torch.stack(counts_E), steps),
            restore_exposed_ms=list(restore_ms),
            reduce_exposed_ms=list(reduce_ms),
            fsep_skew=_fsep_skew(),
            free_bytes=free_bytes[1:],
            weight_bytes=_weight_bytes(),
        )


def _set_fixed_biases(shape: RoutingShape, std: float, seed: int) -> None:
    """Fill Megatron's cache of fixed biases, which it would otherwise draw.

    Its draws use the generator that also draws stock's experts, whereas FSEP's come from others:
    stock and FSEP would get different biases.
    """
    from megatron.core.transformer.moe.moe_utils import RandomSTEShared

    RandomSTEShared._cache.clear()
    for layer, bias_E in enumerate(fixed_biases(shape, std, seed), start=1):
        RandomSTEShared._cache[layer] = bias_E


def _stock_skew(counts_ME: torch.Tensor, steps: int) -> list[float]:
    """Return the skew of each step; M = P·L, or more where layers are run again."""
    counts_NME = counts_ME.new_empty((dist.get_world_size(), *counts_ME.shape))
    dist.all_gather_into_tensor(counts_NME.view(-1, counts_ME.shape[1]), counts_ME.contiguous())
    counts_MNE = counts_NME.transpose(0, 1).cpu().numpy()
    skew_M = np.array([max_over_mean(stock_tokens_N(counts_NE)) for counts_NE in counts_MNE])
    per_step: list[float] = skew_M.reshape(steps + 1, -1).mean(axis=1).tolist()
    return per_step[:-1]


def _weight_bytes() -> int:
    coordinator = current_coordinator()
    return 0 if coordinator is None else coordinator.streams.exchange.received_bytes


def _fsep_skew() -> list[float]:
    coordinator = current_coordinator()
    layers = [] if coordinator is None else coordinator.layers
    return [
        max_over_mean(fsep_tokens_N(sample.decision.quotas))
        for layer in layers
        for sample in layer.statistics.take_outcomes()
    ]
