"""Megatron's own loop, which trains a small model on replaced streams, watched by the checker."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from megatron_laer.cpu import training
from megatron_laer.planner.homes_file import write_homes
from megatron_laer.runtime import build
from megatron_laer.runtime.comm.streams import make_comm_stream
from tests.fake_cuda import device, findings
from tests.fake_cuda.allowed import (
    CAPTURE,
    DEEP_EP,
    FSDP_REDUCE,
    GATHER,
    HYBRID_EP,
    Place,
)
from tests.fake_cuda.device import B200, H100, Watched
from tests.fake_cuda.fault import Fault
from tests.fake_cuda.kernels import Kernels, interpreted, replaced_by_torch
from tests.fake_cuda.observing import side_stream_of_leaves
from tests.launch_order import Launch, recorded
from tests.parity.bridge_lora import lora_on_experts
from tests.parity.flags import UNFUSED, command_line
from tests.parity.replay import REPLAY, train_row
from tests.parity.row import HOMES
from tests.parity.rows import (
    BEHIND_DISPATCH,
    DEEPEP,
    DELAYED,
    DIST_OPT,
    EXACT,
    FP32_ROUTER,
    FSDP,
    FULL_RECOMPUTE,
    GRAPHS,
    HYBRIDEP,
    IN_FP8,
    MOE_RECOMPUTE,
    MXFP8,
    NODES,
    OVERLAPPED,
    RANDOM,
    REPEATED,
    SHARED,
    STEP,
    VIRTUAL,
)

_HOME = RANDOM + " --fsep-sharding experts"
_RELAY = NODES.format(1)
_MXFP8 = f" --bf16{MXFP8}{IN_FP8}"
# Saves at the end alone.
_NEVER = "--save-interval", "1000"
_COMBINED = " --bf16 --overlap-moe-expert-parallel-comm"
_BY_NODE = " --fsep-token-exchange node"
_IN_NODES_OF_2 = " --expert-model-parallel-size 4 --fsep-node-size 2"
# Steps wait for nothing but downloads.
_UNVERIFIED = " --fsep-set verify=off"
_COUNT = ("aten::sum", "megatron_laer/layer/dispatch/slot_dispatch.py:SlotDispatching.count")
_COPY = ("aten::clone", "megatron_laer/layer/moe_layer.py:FSEPMoELayer._count")
_GRAPHS = GRAPHS.replace("modules", "warmup-steps 2 --cuda-graph-modules")


class Training(NamedTuple):
    """Scenario: flags of a training run, and its number of ranks, in groups of two.

    Attributes:
        more: findings in addition to those of every run.
        kernels: treatment of Triton's kernels.
        one_queue: whether the card has one hardware queue.
        resumes: whether it goes on from `save_on_cpu`'s checkpoint, evaluates and saves again.
        adapt: changes the model before Megatron wraps it.
        fuses: whether weight gradients are added to main gradients by their product.
        accumulates: whether autograd adds a parameter's gradients of several uses. Its engine
            orders that sum before the parameter's hook, and the checker does not see how.
        captured: operations of this package that graphs record, with their places.
    """

    flags: str
    ranks: int = 2
    more: frozenset[Place] = frozenset()
    kernels: Kernels = replaced_by_torch
    steps: int = 3
    one_queue: bool = False
    resumes: bool = False
    adapt: training.Adapt | None = None
    fuses: bool = False
    accumulates: bool = False
    captured: frozenset[tuple[str, str]] = frozenset()

    @property
    def capability(self) -> tuple[int, int]:
        return B200 if MXFP8 in self.flags else H100


DAILY = {
    "fresh layouts after the gate": Training(EXACT + _UNVERIFIED),
    "announced layouts": Training(
        f" --fsep-plan-mode announced {REPLAY}", more=frozenset({GATHER})
    ),
    "full recompute": Training(RANDOM + FULL_RECOMPUTE),
    "experts at home in mxfp8, verified, both overlaps": Training(
        f"{_HOME}{_MXFP8}{DIST_OPT} --fsep-set verify=all"
    ),
    "tokens through nodes of 2": Training(RANDOM + _IN_NODES_OF_2 + _BY_NODE, 4),
    "virtual pipeline 2 x 2": Training(RANDOM + VIRTUAL, 4),
    "both overlaps, slices replicated": Training(RANDOM + DIST_OPT + _UNVERIFIED, 4),
    "experts at home, fused accumulation, both overlaps": Training(_HOME + DIST_OPT, fuses=True),
    "experts at home, fused accumulation, both overlaps, tokens by node": Training(
        _HOME + DIST_OPT + _BY_NODE, fuses=True
    ),
    "LoRA on experts, both overlaps": Training(_HOME + DIST_OPT, adapt=lora_on_experts),
    "experts at home held over a step, both overlaps": Training(
        _HOME + DIST_OPT + STEP + _UNVERIFIED
    ),
    "experts at home by a permutation, pairs counted": Training(
        f"{_HOME}{DIST_OPT} --fsep-homes {{folder}}/homes.json --fsep-record {{folder}} trace"
        " --fsep-set pairs_interval=2",
        steps=4,
    ),
    "experts at home in mxfp8 by relay, full recompute": Training(
        _HOME + _MXFP8 + FULL_RECOMPUTE + _RELAY
    ),
    # Most features at once, with Triton's kernels.
    "kernels, by nodes of 1": Training(
        f"{RANDOM}{MOE_RECOMPUTE}{DIST_OPT}{_RELAY}{_BY_NODE} --global-batch-size 4",
        kernels=interpreted,
        steps=2,
    ),
    "one queue, experts at home by relay, full recompute": Training(
        _HOME + FULL_RECOMPUTE + DIST_OPT + _RELAY, one_queue=True
    ),
    "combined 1F1B, delayed and fused weight gradients, experts at home, both overlaps": Training(
        _HOME + _COMBINED + DELAYED + DIST_OPT, fuses=True
    ),
    "virtual pipeline 2 x 2, experts at home, fused accumulation, both overlaps": Training(
        _HOME + VIRTUAL + DIST_OPT, 4, fuses=True
    ),
    "graphs of attention, router and counts, both overlaps": Training(
        f"{RANDOM}{DIST_OPT}{SHARED}{_GRAPHS} attn moe_router moe_preprocess",
        more=CAPTURE,
        steps=4,
        captured=frozenset({_COUNT}),
    ),
    "experts at home, graphs of router and counts, recompute of norms": Training(
        f"{_HOME} --recompute-granularity selective --recompute-modules layernorm{_GRAPHS} "
        "moe_router moe_preprocess",
        more=CAPTURE,
        steps=4,
        captured=frozenset({_COUNT, _COPY}),
    ),
    "Megatron-FSDP, experts at home, full recompute, shared experts": Training(
        f"{_HOME}{FULL_RECOMPUTE}{FSDP}optim_grads_params{SHARED}", more=FSDP_REDUCE
    ),
    "Megatron-FSDP, home experts replicated, both overlaps, fresh layouts": Training(
        f"{HOMES}{EXACT}{DIST_OPT}{FSDP}optim_grads_params", 4, more=FSDP_REDUCE
    ),
}
# Settings that no scenario of a day has, and one hardware queue with the most of them.
AT_NIGHT = {
    "experts at home in mxfp8, both overlaps": Training(_HOME + _MXFP8 + DIST_OPT),
    "one queue, experts at home in mxfp8 held over a step, recompute of the MoE layer": Training(
        _HOME + _MXFP8 + MOE_RECOMPUTE + STEP, one_queue=True
    ),
    "one queue, kernels, rows in nodes of 2": Training(
        f"{RANDOM}{_IN_NODES_OF_2} --fsep-set restore_algorithm=node{_BY_NODE}",
        4,
        kernels=interpreted,
        steps=2,
        one_queue=True,
    ),
    "one queue, virtual pipeline 2 x 2": Training(RANDOM + VIRTUAL, 4, one_queue=True),
    "DeepEP, fresh layouts, shared experts": Training(
        EXACT + DEEPEP + FP32_ROUTER + SHARED, more=DEEP_EP
    ),
    "HybridEP, grouped GEMMs in bf16": Training(
        f"{RANDOM}{HYBRIDEP}{FP32_ROUTER} --fsep-set gemm=torch --bf16 --fsep-capacity 4",
        more=frozenset({HYBRID_EP}),
    ),
    "shared experts that overlap, permute fusion": Training(
        f"{RANDOM}{STEP} --moe-permute-fusion{SHARED}{OVERLAPPED}"
    ),
    "combined 1F1B with delayed weight gradients, virtual pipeline 2 x 2": Training(
        RANDOM + _COMBINED + DELAYED + VIRTUAL, 4
    ),
    "combined 1F1B with delayed weight gradients, experts at home, both overlaps": Training(
        _HOME + _COMBINED + DELAYED + DIST_OPT
    ),
    "combined 1F1B with delayed weight gradients, mxfp8, tokens by node": Training(
        _HOME + _MXFP8 + _COMBINED + DELAYED + _BY_NODE
    ),
    "combined 1F1B, delayed and fused weight gradients, mxfp8, both overlaps": Training(
        _HOME + _MXFP8 + _COMBINED + DELAYED + DIST_OPT, fuses=True
    ),
    "experts at home, passed twice, fused accumulation, both overlaps": Training(
        f"{_HOME}{DIST_OPT}{REPEATED}2", fuses=True, accumulates=True
    ),
    "experts' weight gradients during the dispatch's backward": Training(RANDOM + BEHIND_DISPATCH),
    "Megatron-FSDP of gradients, home experts replicated": Training(
        f"{_HOME}{MOE_RECOMPUTE}{DIST_OPT}{FSDP}optim_grads", 4, more=FSDP_REDUCE
    ),
    "Muon": Training(f"{_HOME} --optimizer muon"),
    "save and load": Training(f"{_HOME}{DIST_OPT} --override-opt-param-scheduler", resumes=True),
}
SCENARIOS = DAILY | AT_NIGHT


def watch(
    data: str,
    scenario: str,
    fault: Fault | None = None,
    capability: tuple[int, int] | None = None,
) -> Watched:
    """Train a scenario on the labelled device, with a fault or none, and losses as results.

    Args:
        capability: of another card than the scenario's.
    """
    settings, command = SCENARIOS[scenario], command_of(data, scenario)
    launches: list[Launch] = []
    with (
        recorded(launches),
        # Unlike on the CPU, streams launch in the order of the program.
        mock.patch.object(build, "make_comm_stream", make_comm_stream),
        _fresh_streams(),
        side_stream_of_leaves(),
        mock.patch.object(training, "fresh_megatron", _synchronised),
        _steady_steps(),
    ):
        watched = device.watch(
            lambda: train_row(command, adapt=settings.adapt).losses,
            fault,
            kernels=settings.kernels,
            one_queue=settings.one_queue,
            capability=capability or settings.capability,
        )
    watched.orders = launches
    return watched


def save_on_cpu(data: str, scenario: str) -> None:
    """Write the checkpoint that a scenario goes on from."""
    train_row([*_command(data, scenario), "--save", _folder(data), *_NEVER])


def _folder(data: str) -> str:
    return f"{data}-checkpoints"


def losses_on_cpu(data: str, scenario: str) -> list[float]:
    return train_row(command_of(data, scenario)).losses


def command_of(data: str, scenario: str) -> list[str]:
    settings, command = SCENARIOS[scenario], _command(data, scenario)
    if not settings.resumes:
        return command
    folder, steps = _folder(data), 2 * settings.steps
    return [
        *(*command, "--load", folder, "--save", folder, *_NEVER),
        *("--train-iters", str(steps), "--eval-iters", "1"),
    ]


def _command(data: str, scenario: str) -> list[str]:
    settings = SCENARIOS[scenario]
    flags = "--expert-parallel-mode fsep --fsep-sharding rows" + settings.flags
    if "{folder}" in flags:  # a new one for each rank and run, since a recording continues no other
        folder = Path(tempfile.mkdtemp(dir=Path(data).parent))
        flags = flags.format(folder=folder)
        order_E = np.array([2, 1, 3, 0])
        write_homes(folder / "homes.json", 2, {"layer 1": order_E, "layer 2": order_E[::-1]})
    without = UNFUSED if settings.fuses else ""
    sizes: dict[str, int] = {"experts": 4, "global_batch": 8, "steps": settings.steps}
    return command_line(data, flags, without=without, **sizes)


@contextlib.contextmanager
def _synchronised(model: list[torch.nn.Module]) -> Iterator[None]:
    """Wait for the device before a run's memory is freed, as the end of a process does."""
    with _fresh_megatron(model):
        try:
            yield
        finally:
            torch.cuda.synchronize()


_fresh_megatron = training.fresh_megatron


@contextlib.contextmanager
def _steady_steps() -> Iterator[None]:
    """Count waits from the end of the first training step to that of the last one."""
    from megatron.training import training

    true_step = training.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        result = true_step(*args, **kwargs)
        arguments = training.get_args()
        findings.current.is_steady = arguments.curr_iteration + 1 < arguments.train_iters
        return result

    with mock.patch.object(training, "train_step", step):
        yield


@contextlib.contextmanager
def _fresh_streams() -> Iterator[None]:
    """Let Megatron make the streams that it keeps anew, inside and after the block."""
    from megatron.core.pipeline_parallel import utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    with (
        mock.patch.object(utils, "_COMM_STREAM", None),
        mock.patch.object(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
    ):
        yield
