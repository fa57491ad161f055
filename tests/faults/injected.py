"""Faults in one run of Megatron's training loop, the same under stock and under FSEP.

Each is a context manager, or a function that a rank runs. The tests check the consequences.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import psutil
import torch

from megatron_laer.cpu.training import Record, rank_of_environment, train
from tests.faults.delays import digest
from tests.probes import running, watching


def current_step() -> int:
    from megatron.training import get_args

    step: int = get_args().curr_iteration
    return step


def train_with_other_layout(flags: list[str], rank: int, after_step: int, ahead: bool) -> None:
    """Train; one rank gets another layout after some step.

    With `ahead`, it changes every layer and the version, as after one more broadcast. Otherwise it
    changes the last layer under the same version. The planner must change no layout, or the next
    broadcast would repair the fault.
    """
    from megatron_laer.planner.layout import ExpertLayout

    def change(_model: object) -> None:
        if current_step() + 1 != after_step or rank_of_environment() != rank:
            return
        in_force = running().layouts
        in_force.version += ahead
        for layer in range(len(in_force.layouts))[None if ahead else -1 :]:
            good = in_force.layouts[layer]
            in_force._layouts[layer] = ExpertLayout.from_slots(
                good.num_ranks, good.capacity, good.num_experts, good.to_list()[::-1]
            )

    train(flags, change)


def train_with_other_counts(flags: list[str], rank: int, step: int) -> None:
    """Train; in a step one rank counts one token of an expert as another's: the sum stays."""
    from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching

    count = SlotDispatching.count

    def miscount(self: SlotDispatching, routing_map_TE: torch.Tensor) -> None:
        count(self, routing_map_TE)
        counts_E = self.counts_E
        if current_step() == step and rank_of_environment() == rank and counts_E is not None:
            busiest = int(counts_E.argmax())
            counts_E[busiest] -= 1
            counts_E[busiest - 1] += 1

    with mock.patch.object(SlotDispatching, "count", miscount):
        train(flags)


def train_with_bad_loss(flags: list[str], step: int, value: float, passing: bool) -> Record:
    """Train with a bad loss of a step on rank 0; a `passing` fault is gone in a rerun."""
    import pretrain_gpt

    loss_func, calls = pretrain_gpt.loss_func, 0

    def bad(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
        nonlocal calls
        if current_step() == step and rank_of_environment() == 0:
            calls += 1
            if calls == 1 or not passing:
                output = output * value
        return loss_func(loss_mask, output)

    with mock.patch.object(pretrain_gpt, "loss_func", bad):
        return train(flags)


def train_with_rerun(flags: list[str], step: int) -> tuple[Record, list[str]]:
    """Train; let Megatron's rerun state machine repeat one step. Also return a digest per step."""
    import pretrain_gpt

    check_loss, passes, digests = pretrain_gpt.check_loss, 0, []

    def suspicious(loss: torch.Tensor) -> None:
        nonlocal passes
        if current_step() == step:
            passes += 1
            pretrain_gpt.get_rerun_state_machine().validate_result(
                result=loss, rejection_func=lambda _: True, message="suspicious", fatal=False
            )
        check_loss(loss)

    with mock.patch.object(pretrain_gpt, "check_loss", suspicious):
        record = train(flags, lambda model: digests.append(digest(model)))
    assert step < 0 or passes > 0
    return record, digests


def train_with_skipped_step(flags: list[str], step: int) -> tuple[Record, list[str]]:
    """Overflow the loss of a step, which loss scaling skips; also return a digest per step."""
    from megatron.training import training

    import pretrain_gpt

    loss_func, train_step = pretrain_gpt.loss_func, training.train_step
    digests: list[str] = []

    def infinite(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
        return loss_func(loss_mask, output * float("inf") if current_step() == step else output)

    def step_with_norm(*args: Any, **kwargs: Any) -> Any:
        result = list(train_step(*args, **kwargs))
        result[5] = float("nan") if result[5] is None else result[5]
        return tuple(result)

    def look(model: list[torch.nn.Module]) -> None:
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.main_grad.zero_()  # so that the digest is the weights' alone
        digests.append(digest(model))

    with (
        mock.patch.object(pretrain_gpt, "loss_func", infinite),
        mock.patch.object(training, "train_step", step_with_norm),
    ):
        return train(flags, look), digests


def train_with_signal(flags: list[str], step: int, rank: int) -> Record:
    """Train; tell one rank to end in a step. Remove Megatron's signal handlers afterwards."""
    import pretrain_gpt

    loss_func, before = pretrain_gpt.loss_func, signal.getsignal(signal.SIGTERM)

    def signalled(*args: Any) -> Any:
        if current_step() == step and rank_of_environment() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_func(*args)

    try:
        with mock.patch.object(pretrain_gpt, "loss_func", signalled):
            return train(flags)
    finally:
        signal.signal(signal.SIGTERM, before)


# Map from the router's choice to tokens' experts: bool [T, E] to bool [T, E].
Routing = Callable[[torch.Tensor], torch.Tensor]


def _one_expert(map_TE: torch.Tensor) -> torch.Tensor:
    routed_TE = torch.zeros_like(map_TE)
    routed_TE[:, 3] = True
    return routed_TE


def _first_half(map_TE: torch.Tensor) -> torch.Tensor:
    routed_TE = map_TE.clone()
    routed_TE[:, map_TE.shape[1] // 2 :] = False
    return routed_TE


def _silent_rank(map_TE: torch.Tensor) -> torch.Tensor:
    return map_TE if rank_of_environment() == 0 else torch.zeros_like(map_TE)


def _one_token(map_TE: torch.Tensor) -> torch.Tensor:
    routed_TE = torch.zeros_like(map_TE)
    routed_TE[0, 3] = rank_of_environment() == 0
    return routed_TE


ROUTINGS: dict[str, Routing] = {
    "every token to one expert": _one_expert,
    "half of the experts get none": _first_half,
    "a rank sends none": _silent_rank,
    "one token in all": _one_token,
    "no token at all": torch.zeros_like,
}


@contextlib.contextmanager
def routed(choose: Routing) -> Iterator[None]:
    """Replace the choices of the routers of MoE layers."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    route, preprocess = MoELayer.route, MoEAlltoAllTokenDispatcher.preprocess

    def other_route(self: Any, *args: Any, **kwargs: Any) -> Any:
        probs_TE, map_TE = route(self, *args, **kwargs)
        routed_TE = choose(map_TE)
        # A token keeps the router's probabilities where it has them, so that gradients flow.
        return (probs_TE + 0.5 * (routed_TE & ~map_TE)) * routed_TE, routed_TE

    def sized(self: Any, map_TE: torch.Tensor) -> Any:
        # Stock assumes T·K as long as no capacity drops tokens.
        result = preprocess(self, map_TE)
        self.num_out_tokens = int(map_TE.sum())
        return result

    with (
        mock.patch.object(MoELayer, "route", other_route),
        mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", sized),
    ):
        yield


def train_with_routing(flags: list[str], name: str) -> Record:
    with routed(ROUTINGS[name]):
        return train(flags)


def train_with_burst(flags: list[str]) -> list[tuple[int, int]]:
    """Send all tokens to one expert.

    Return the numbers (received by this rank, routed by all ranks) per microbatch and layer.
    """
    from megatron_laer.layer.dispatch.dispatcher import SlotTokenDispatcher

    received = []

    def count(dispatcher: Any, _map_TE: torch.Tensor) -> None:
        mine = int(dispatcher._current.plan.quotas.columns_NC.sum())
        total = torch.tensor([mine])
        torch.distributed.all_reduce(total, group=dispatcher.ep_group)
        received.append((mine, int(total)))

    one_expert = ROUTINGS["every token to one expert"]
    with routed(one_expert), watching((SlotTokenDispatcher, "preprocess", count)):
        train(flags)
    return received


def train_with_full_disk(flags: list[str], from_step: int, limit_bytes: int) -> Record:
    """Limit the files of this rank and its checkpoint writers from a step on, as on a full disk."""
    steps = 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_model: object) -> None:
        nonlocal steps
        steps += 1
        if steps == from_step:
            limit_files(limit_bytes)

    try:
        return train(flags, fill)
    finally:
        limit_files(before[0])


def limit_files(limit_bytes: int) -> None:
    """Limit the files of this process and its descendants; larger writes fail."""
    # Without the handler the first such write would end the process.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_bytes, most))
