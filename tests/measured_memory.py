"""Bytes of a rank by setting, measured on gloo ranks and by the formulas of docs/settings.md.

Legend: C slots per rank, h home experts, L layers, P weights of an expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_laer.cpu.training import Adapt, train
from megatron_laer.life import Kind
from megatron_laer.planner.state_bytes import RankWeights, state_bytes
from megatron_laer.rules import STRATEGIES
from megatron_laer.schedule import Schedule
from tests.parity.bridge_lora import lora_on_experts_under_recompute
from tests.parity.flags import command_line
from tests.parity.rows import DIST_OPT, FSDP

LAYERS, EXPERTS, RANKS, TOKENS = 4, 8, 2, 2 * 48  # of a rank's microbatch
CAPACITY = 8  # at which every random layout has replicas
HIDDEN, WEIGHT_BYTES = 48, 2
EXPERT_WEIGHTS = 3 * HIDDEN * 64

AT_HOME = " --fsep-sharding experts"
ROWS = " --fsep-sharding rows"
STEP = " --fsep-restore step"
FULL = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# By default Megatron-FSDP has gradients in the parameters' dtype.
_COMMON = " --bf16 --megatron-fsdp-main-grads-dtype fp32 --expert-parallel-mode fsep"
_COMMON += f" --fsep-planner random --fsep-capacity {CAPACITY}"


class Bytes(NamedTuple):
    """Bytes of a rank by part.

    Attributes:
        restored: buffers of restored experts or replicas.
        restored_gradients: buffers of their gradients, with sums of a held step.
        kept: tensors of the layers that live from a microbatch's forward to its backward, under
            full recompute; else None, as no formula has them.
    """

    weights: float
    gradients: float
    optimizer: float
    restored: float
    restored_gradients: float
    kept: float | None


@dataclass(frozen=True)
class Setting:
    """Settings of a run.

    Attributes:
        flags: Megatron's and FSEP's, without the sharding.
        keeps_gib: `--fsep-restore GIB`.
    """

    flags: str = DIST_OPT
    sharding: str = AT_HOME
    strategy: str | None = None
    adapt: Adapt | None = None
    keeps_gib: float = 0.0

    def command(self, data: str, ranks: int = RANKS, group: int = RANKS) -> list[str]:
        flags = f"{_COMMON}{self.sharding}{self.flags} --num-layers {LAYERS}"
        if self.strategy is not None:
            flags += FSDP + self.strategy
        if self.keeps_gib:
            flags += f" --fsep-restore {self.keeps_gib}"
        batch = 4 * ranks  # two microbatches
        return command_line(data, flags, steps=3, expert_parallel=group, global_batch=batch)

    @property
    def replicas_bytes(self) -> tuple[int, int]:
        """Return bytes of a layer's restored experts, and of their gradients."""
        homes = EXPERTS // RANKS
        slots = CAPACITY - (homes if self.sharding == AT_HOME else 0)
        weights = trained = EXPERT_WEIGHTS
        if self.adapt is not None:
            trained = ADAPTER_WEIGHTS
            weights += trained
        return slots * weights * WEIGHT_BYTES, slots * trained * WEIGHT_BYTES

    def formula(self, of: RankWeights, frozen: float, ranks: int = RANKS) -> Bytes:
        """Return a rank's bytes by formula.

        Args:
            of: its trained weights, without any sharding.
            frozen: its other weights.
            ranks: data-parallel ranks; groups have `RANKS`.
        """
        shards = self.strategy is not None or DIST_OPT in self.flags
        state = state_bytes(
            of,
            self.strategy,
            ranks=ranks if shards else 1,
            expert_ranks=ranks // RANKS if shards else 1,
            bytes_per_weight=WEIGHT_BYTES,
            frozen=frozen,
        )
        holds = STEP in self.flags
        schedule = Schedule.of({Kind.STEP} if holds else ())
        weights, gradients = self.replicas_bytes
        # Under a checkpoint a layer's gradients arrive before its own backward ends.
        again = FULL in self.flags
        kept = (1 if again else schedule.gradient_layers(LAYERS)) * gradients
        if holds:  # float32 sums of all layers
            kept += LAYERS * gradients * 4 // WEIGHT_BYTES
        layers = schedule.restored_layers(LAYERS) + self.keeps_gib * 2**30 // weights
        inputs = LAYERS * TOKENS * HIDDEN * WEIGHT_BYTES if again else None
        return Bytes(*state, layers * weights, kept, inputs)


# Rank 4 on both of an expert's linear layers.
ADAPTER_WEIGHTS = 4 * (HIDDEN + 128) + 4 * (64 + HIDDEN)
_LAYER_GIB = (CAPACITY - EXPERTS // RANKS) * EXPERT_WEIGHTS * WEIGHT_BYTES / 2**30

SETTINGS = {
    "ddp": Setting(""),
    "distributed optimizer": Setting(),
    "rows": Setting(sharding=ROWS),
    **{name: Setting(" ", strategy=name) for name in STRATEGIES},
    "step": Setting(DIST_OPT + STEP),
    "one layer kept": Setting(keeps_gib=_LAYER_GIB),
    "full recompute, lora": Setting(DIST_OPT + FULL, adapt=lora_on_experts_under_recompute),
}


class Measured(NamedTuple):
    """This rank's bytes after the last step, and its weights before any sharding."""

    trained: RankWeights
    frozen: int
    bytes: Bytes


def measure(command: list[str], adapt: Adapt | None = None) -> Measured:
    """Train on this rank, and return its bytes."""
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.training import training

    from megatron_laer.plugin.sharded_models import is_sharded, unwrapped
    from megatron_laer.session import current_coordinator

    recomputes = "full" in command
    setup, forward, kept = training.setup_model_and_optimizer, TransformerBlock.forward, list[Any]()
    counts, living, found = list[Any](), list[int](), list[Bytes]()

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        kept[:] = [result[1]]
        return result

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not recomputes:
            return forward(self, *args, **kwargs)

        def count_living(*_: Any) -> None:
            living.append(_unchanging(new.num_bytes))

        with _Living() as new:
            hook = self.final_layernorm.register_forward_pre_hook(count_living)
            output = forward(self, *args, **kwargs)
            hook.remove()
        return output

    def count(chunk: torch.nn.Module) -> None:
        if adapt is not None:
            adapt(chunk)
        sizes = {
            name: part.numel() for name, part in chunk.named_parameters() if part.requires_grad
        }
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        layers = sum(size for name, size in sizes.items() if "layers." in name) - experts
        trained = RankWeights(layers, sum(sizes.values()) - layers - experts, experts)
        whole = sum(part.numel() for part in chunk.parameters())
        counts.append((trained, whole - sum(sizes.values())))

    def look(model: list[Any]) -> None:
        (chunk,), optimizer = model, kept[0]
        if is_sharded(chunk):
            chunk.synchronize_param_gather()  # frees layers that are gathered for the next step
            groups = chunk.param_and_grad_buffer.parameter_groups
            parts = [part for group in groups for part in group.params]
            weights = [*parts, *(group.model_weight_buffer.data for group in groups)]
            gradients = [group.main_grad_buffer.data for group in groups]
        else:
            parts = weights = list(unwrapped(chunk).parameters())
            gradients = [part.main_grad for part in parts if part.requires_grad]
        states = list[torch.Tensor]()
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            for main, state in one.optimizer.state.items() if one.optimizer else ():
                tensors = [main, *state.values()]
                states += [getattr(part, "_local_tensor", part) for part in tensors if part.dim()]
        coordinator: Any = current_coordinator()
        streams = coordinator.streams
        buffers = streams.weights.num_bytes, streams.grads.num_bytes
        kept_bytes = living[-1] if recomputes else None
        found.append(Bytes(*map(_bytes, (weights, gradients, states)), *buffers, kept_bytes))

    with (
        mock.patch.object(training, "setup_model_and_optimizer", keep),
        mock.patch.object(TransformerBlock, "forward", watched),
    ):
        train(command, look, adapt=count, gradients=False)
    return Measured(*counts[0], found[-1])


def _unchanging(read: Callable[[], int]) -> int:
    """Return a number that stays: gloo's threads hold an exchange's tensors a little longer."""
    before, now = -1, read()
    while before != now:
        time.sleep(0.05)
        before, now = now, read()
    return now


class _Living(TorchDispatchMode):
    """Storages of numbers that operations make, and their bytes while something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef

        given = {_storage(part) for part in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for part in _tensors(result):
            # No random states, which are bytes.
            if part.is_floating_point() and (place := _storage(part)) not in given:
                storage = part.untyped_storage()
                self._made[place] = StorageWeakRef(storage), storage.nbytes()
        return result

    def num_bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _storage(part: torch.Tensor) -> int:
    return part.untyped_storage()._cdata


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def both(setting: Setting, results: Sequence[Measured], ranks: int = RANKS) -> tuple[Bytes, Bytes]:
    """Return the bytes by formula and the mean of the ranks' measured ones."""
    first = results[0]
    expected = setting.formula(first.trained, first.frozen, ranks)
    parts = zip(*(of.bytes for of in results), strict=True)
    means: list[Any] = [None if None in part else sum(part) / len(results) for part in parts]
    return expected, Bytes(*means)
