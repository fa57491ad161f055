"""Whether FSEP is on in this process, and with which settings; and the coordinator made from them.

The plugin turns it on and off. Nothing here touches Megatron's internals.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_laer.config import FSEPConfig
from megatron_laer.planner.clusters import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.runtime import coordinator as coordinators
from megatron_laer.runtime.comm.collectives import raise_everywhere
from megatron_laer.runtime.comm.process_groups import FSEPGroups, get_fsep_groups
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.runtime.planning import planner_checkpoint
from megatron_laer.runtime.weights.scheduler import Chunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """FSEP is on.

    Attributes:
        seed: for the experts' weights; None takes torch's initial seed of the group's rank 0.
    """

    config: FSEPConfig
    seed: int | None = None


_active: Session | None = None
_is_started = False


def set_active(activation: Session | None) -> None:
    """Turn FSEP on, with new settings, or off. Models built before cannot go on training."""
    global _active
    _active = activation
    forget_model()


def forget_model() -> None:
    """Drop the coordinator; the next MoE layer that is built starts a new one."""
    global _is_started
    _is_started = False
    coordinators.set_coordinator(None)


@dataclass
class StepOutcome:
    """How a step ended.

    Attributes:
        weights_changed: false where the optimizer skipped its step, say for an infinite gradient.
    """

    weights_changed: bool = True


@contextlib.contextmanager
def training_step(
    step: int, num_microbatches: int | None, chunks: Callable[[], Sequence[Chunk]]
) -> Iterator[StepOutcome]:
    """A training step, at whose start layouts change. Collective: every rank must enter it.

    Yields what the caller may say of the step before it ends.

    Args:
        step: counted over the whole run, resumed runs included.
        num_microbatches: of this step; without it, planning starts only when the step is over.
        chunks: of the model, asked for at the first step.

    Raises:
        ValueError: at the first step, on every rank of the world: a recording that cannot be
            replayed or written.
        RuntimeError: a plan that no backward pass used.
    """
    global _is_started
    coordinator = coordinators.current_coordinator()  # None on a stage without MoE layers
    if not _is_started:
        raise_everywhere(None if coordinator is None else coordinator.start(step))
        if _active is not None and _active.config.makes_plans:
            planner_checkpoint.report_resumption(coordinator, step)
        if coordinator is not None:
            coordinator.scheduler.attach(chunks())
        _is_started = True
    if coordinator is not None:
        coordinator.begin_step(step, num_microbatches)
    outcome = StepOutcome()
    yield outcome
    if coordinator is not None:
        coordinator.end_step(weights_changed=outcome.weights_changed)


def active() -> Session | None:
    """The settings in force, or None when FSEP is off."""
    return _active


def coordinator_for(transformer_config: Any) -> Coordinator:
    """This process's coordinator, made when the first MoE layer is built.

    Args:
        transformer_config: Megatron's, with the true number of experts.

    Raises:
        ValueError: a model whose MoE layers have different numbers of experts, N·C < E, C > E.
    """
    assert _active is not None, "an FSEP layer was built while FSEP is off"
    experts = transformer_config.num_moe_experts
    coordinator = coordinators.current_coordinator()
    if coordinator is None:
        groups = get_fsep_groups()
        coordinator = Coordinator(
            _active.config,
            groups,
            experts,
            seed=_active.seed if _active.seed is not None else _common_seed(groups),
            costs=_costs(_active.config, transformer_config),
            device=current_device(),
        )
        coordinators.set_coordinator(coordinator)
    elif coordinator.geometry.num_experts != experts:
        raise ValueError(
            f"MoE layers with {coordinator.geometry.num_experts} and with {experts} experts in one "
            "model: FSEP needs the same number in all of them"
        )
    return coordinator


def current_device() -> torch.device:
    """The device that Megatron computes on (the CPU under the CPU stand-in)."""
    device = torch.cuda.current_device()
    return device if isinstance(device, torch.device) else torch.device("cuda", device)


def default_cluster() -> str:
    """The shipped cluster whose devices are most like this process's."""
    if current_device().type == "cpu":
        return "cpu-gloo"
    name = torch.cuda.get_device_name()
    known = {"A100": "a100-4x8-ib800", "H100": "h100-8"}
    for part, cluster in known.items():
        if part in name:
            return cluster
    logger.warning(
        "FSEP: no hardware constants for %s, taking those of %s; give --fsep-cluster a YAML file",
        name,
        known["H100"],
    )
    return known["H100"]


def _common_seed(groups: FSEPGroups) -> int:
    from megatron.training import global_vars

    if global_vars._GLOBAL_ARGS is not None:
        return int(global_vars.get_args().seed)
    seed = torch.tensor([torch.initial_seed()], dtype=torch.int64, device=current_device())
    dist.broadcast(seed, src=groups.planner_rank, group=groups.tokens)
    return int(seed.item())


def _costs(config: FSEPConfig, transformer_config: Any) -> CostModel:
    recompute = transformer_config.recompute_granularity
    return CostModel(
        cluster=load_cluster(config.cluster or default_cluster()),
        hidden=transformer_config.hidden_size,
        ffn=transformer_config.moe_ffn_hidden_size,
        gated=transformer_config.gated_linear_unit,
        bytes_per_element=transformer_config.params_dtype.itemsize,
        recompute=recompute == "full"
        or (recompute == "selective" and "moe" in transformer_config.recompute_modules),
    )
