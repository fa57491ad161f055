"""Read access to parameters under stock Megatron's names and in its shapes.

Tools that convert or send weights by name expect stock's parameters: one matrix per expert, split
over the ranks of the expert-parallel group. FSEP's own are slices of all experts, on every rank.
`stock_loading.py` writes weights under these names.

Legend: N ranks of the FSEP group, E experts, X the requested expert-parallel size, e = E/X experts
of a rank. R rows and K columns of a matrix, r rows of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_laer import session
from megatron_laer.choices import Sharding
from megatron_laer.files.checks import quoted
from megatron_laer.integrations.stock_tensors import LentExpert, Loan
from megatron_laer.layer.experts.module import FSEPExperts
from megatron_laer.layer.experts.slices import SliceSpec
from megatron_laer.runtime.comm.blocks import gather_block, scatter_block

Named = tuple[str, torch.Tensor]


class StockParameter(NamedTuple):
    """One parameter of an expert in stock, with indices of its slice and of its expert here."""

    name: str
    matrix: int
    expert: int


@dataclass(frozen=True)
class StockLayer:
    """Experts of one FSEP layer on this rank, as in stock Megatron.

    Attributes:
        prefix: the name of the experts' module in the model chunk.
        num_blocks: X.
    """

    prefix: str
    experts: FSEPExperts
    num_blocks: int
    is_grouped: bool

    @property
    def block_size(self) -> int:
        """Return e, the number of experts of this rank."""
        return self.experts.specs[0].num_experts // self.num_blocks

    def parameters(self) -> list[StockParameter]:
        found = [
            (spec, StockParameter(self._name(spec, expert), matrix, expert))
            for expert in range(self.block_size)
            for matrix, spec in enumerate(self.experts.specs)
        ]
        if self.is_grouped:  # first all experts' parameters of the first linear layer
            found.sort(key=lambda pair: pair[0].name)
        return [parameter for _, parameter in found]

    def blocks(self) -> list[torch.Tensor]:
        """Restore this rank's experts, [e, R, K] for each slice. Collective over the group."""
        slices = self.experts.share
        return [
            gather_block(slice_ErK, rows, self.num_blocks, session.get_fsep_group())
            for slice_ErK, rows in zip(slices.sources(self._num_experts), slices.rows, strict=True)
        ]

    def empty_blocks(self, device: torch.device | None = None) -> list[torch.Tensor]:
        """Allocate blocks, [e, R, K] each, on `device` or else the slices' device."""
        slices = self.experts.share
        return [
            slice_ErK.new_empty((self.block_size, rows, slice_ErK.shape[2]), device=device)
            for slice_ErK, rows in zip(slices.sources(self._num_experts), slices.rows, strict=True)
        ]

    def named(self, blocks: list[torch.Tensor]) -> Iterator[Named]:
        """Yield stock's names with views of the blocks, marked like stock's parameters."""
        for name, matrix, expert in self.parameters():
            spec = self.experts.specs[matrix]
            tensor = blocks[matrix][expert].view(stock_shape(spec))
            self._mark(tensor, spec)
            yield name, tensor

    @contextmanager
    def lent(self, *, writable: bool) -> Iterator[Iterator[Named]]:
        """Restore this rank's experts; if `writable`, write them back. Both are collective."""
        blocks, version = self.blocks(), session.weights_version()
        loan = Loan(writable, is_old=lambda: session.weights_version() != version)
        try:
            yield ((name, LentExpert(tensor, loan)) for name, tensor in self.named(blocks))
        except BaseException as error:
            if loan.is_written:
                raise RuntimeError(
                    f"experts of {self.prefix} were written to, and the iterator of "
                    "stock_named_parameters was left before its next layer: what was written is "
                    "lost; iterate to the end, on every rank"
                ) from error
            raise
        finally:
            loan.is_over = True
        if writable:
            self.write(blocks)

    def write(self, blocks: list[torch.Tensor]) -> None:
        """Cut the blocks of all ranks into slices. Collective over the group."""
        slices = self.experts.share.sources(self._num_experts)
        for block_eRK, slice_ErK in zip(blocks, slices, strict=True):
            scatter_block(block_eRK, slice_ErK, session.get_fsep_group())
        if (coordinator := session.current_coordinator()) is not None:
            coordinator.experts.end_step(weights_changed=True)  # step-held experts are stale

    @property
    def _num_experts(self) -> int:
        return self.experts.specs[0].num_experts

    def _name(self, spec: SliceSpec, expert: int) -> str:
        kind = "bias" if spec.is_bias else "weight"
        if self.is_grouped:
            return f"{self.prefix}.{spec.name}.{kind}{expert}"
        return f"{self.prefix}.local_experts.{expert}.{spec.name}.{kind}"

    def _mark(self, tensor: Any, spec: SliceSpec) -> None:
        """Set the attributes that Megatron sets on parameters of experts."""
        is_first = spec.name == "linear_fc1"
        # Every rank of a tensor-parallel group would hold all of the second layer's bias.
        is_cut = is_first or not spec.is_bias
        # Rows of a gate and its gated values alternate between tensor-parallel ranks.
        alternates = is_first and self.experts.config.gated_linear_unit and not self.is_grouped
        # Tensor ranks hold whole experts but parts of other layers, so experts have their own
        # groups.
        has_own_groups = self.num_blocks > 1 or self.experts.config.tensor_model_parallel_size > 1
        tensor.allreduce = not has_own_groups
        tensor.tensor_model_parallel = is_cut
        tensor.partition_dim = -1 if not is_cut else 0 if is_first else 1
        tensor.partition_stride = 2 if alternates else 1


def stock_shape(spec: SliceSpec) -> tuple[int, ...]:
    """Return the shape of one expert's parameter: [R, K], or [R] for a bias."""
    return (spec.rows,) if spec.is_bias else (spec.rows, spec.columns)


def stock_named_parameters(
    model: torch.nn.Module,
    *,
    expert_parallel_size: int | None = None,
    grouped: bool | None = None,
    writable: bool = False,
) -> Iterator[Named]:
    """Iterate over the parameters of a model chunk under stock Megatron's names and shapes.

    Names, order, shapes and values are those of `named_parameters()` of the same chunk without
    FSEP. Experts are separate tensors: the e = E/X of this rank, `[R, K]` each and `[R]` for a
    bias. All other parameters are the chunk's own. Layers and experts are numbered from 0 in each
    chunk and on each rank, as in stock. Call it for each chunk in turn:

        for chunk in model:  # Megatron's list
            for name, tensor in megatron_laer.stock_named_parameters(chunk):
                ...

    Collective over the FSEP group: every rank iterates to the end. Each layer's experts are
    restored when the first of them is reached. That needs their memory and, for the exchange, twice
    that of one matrix. It is free once the caller has dropped the layer's tensors. A chunk without
    FSEP layers, or of stock Megatron, needs no collective.

    Args:
        model: one chunk, in Megatron's wrappers or without. `--overlap-param-gather` needs the
            wrapper: iteration waits for pending weights, collectively over data-parallel ranks.
        expert_parallel_size: X, which divides N and E; N by default. Rank i of the group gets the
            experts of stock's expert-parallel rank i modulo X.
        grouped: True for names of Megatron's grouped experts, `linear_fc1.weight0`; False for those
            of a sequence of experts, `local_experts.0.linear_fc1.weight`. By default as in the
            model's own module spec.
        writable: allow writes to a layer's experts until the next layer's are reached. They are
            then exchanged again and cut into slices. Where several ranks hold an expert, the
            group's first one counts. Optimizers keep weights of their own: call Megatron's
            `reload_model_params()` after.

    Returns:
        Pairs of a name and a tensor of the model's dtype, on its device.

    Raises:
        ValueError: a list of chunks; a size that does not divide N and E, or that differs between
            ranks. On every rank of the group.
        RuntimeError: FSEP was turned off after the model was built. An expert also raises it if a
            write would be lost: without `writable`, or too late. So does a read after a training
            step has changed the weights.
    """
    chunk, layers = stock_layers(model, expert_parallel_size, grouped, writable=writable)
    if getattr(getattr(model, "ddp_config", None), "overlap_param_gather", False):
        model.start_param_sync(force_sync=True)  # type: ignore[operator]
    return _iterate(chunk, layers, writable)


def _iterate(chunk: torch.nn.Module, layers: list[StockLayer], writable: bool) -> Iterator[Named]:
    first_slices = {id(layer.experts.slices()[0]): layer for layer in layers}
    slices = {id(slice_ErK) for layer in layers for slice_ErK in layer.experts.slices()}
    for name, parameter in chunk.named_parameters():
        if id(parameter) in first_slices:
            with first_slices[id(parameter)].lent(writable=writable) as experts:
                yield from experts
        elif id(parameter) not in slices:
            yield name, parameter


def stock_layers(
    model: torch.nn.Module,
    expert_parallel_size: int | None,
    grouped: bool | None,
    *,
    writable: bool = False,
) -> tuple[torch.nn.Module, list[StockLayer]]:
    """Find the FSEP layers of a chunk. Collective over the group, if there are any.

    Returns:
        The chunk without its wrappers, and its layers in the order of its parameters.
    """
    from megatron.core.utils import unwrap_model

    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: names repeat in Megatron's list of chunks; call "
            "this for each one in turn, for chunk in model"
        )
    chunk: torch.nn.Module = unwrap_model(model)
    found = {
        name: module for name, module in chunk.named_modules() if isinstance(module, FSEPExperts)
    }
    if not found:
        _check_size_of_homes(expert_parallel_size)
        return chunk, []
    group = session.get_fsep_group()
    num_ranks = dist.get_world_size(group)
    num_blocks = num_ranks if expert_parallel_size is None else expert_parallel_size
    (num_experts,) = {experts.specs[0].num_experts for experts in found.values()}
    _check_alike("expert_parallel_size", num_blocks, group)
    _check_alike("writable", writable, group)
    _check_size(num_blocks, num_experts, num_ranks)
    return chunk, [
        StockLayer(
            name, experts, num_blocks, experts.stock_is_grouped if grouped is None else grouped
        )
        for name, experts in found.items()
    ]


def _check_size_of_homes(asked: int | None) -> None:
    current = session.current()
    if current is not None and current.config.homes is not None:
        raise ValueError(
            f"--fsep-homes {quoted(current.config.homes)}: stock's names number experts by "
            "rank, and these live elsewhere; save a checkpoint, and load it without --fsep-homes"
        )
    if asked is None or current is None or current.sharding != Sharding.EXPERTS:
        return
    if asked != current.groups.size:
        raise ValueError(
            f"expert_parallel_size={asked}: with --fsep-sharding experts the parameters are "
            f"stock's on {current.groups.size} ranks; leave it out, or save and load a checkpoint"
        )


def _check_alike(name: str, value: int, group: dist.ProcessGroup) -> None:
    asked = [value] * dist.get_world_size(group)
    dist.all_gather_object(asked, value, group=group)
    if len(set(asked)) > 1:
        raise ValueError(
            f"ranks {dist.get_process_group_ranks(group)} of an FSEP group ask for the "
            f"{name} {asked}: it must be the same on all of them"
        )


def _check_size(num_blocks: int, num_experts: int, num_ranks: int) -> None:
    works = [x for x in range(1, num_ranks + 1) if num_ranks % x == 0 and num_experts % x == 0]
    if num_blocks not in works:
        raise ValueError(
            f"expert_parallel_size={num_blocks} does not divide both the {num_ranks} ranks of the "
            f"FSEP group and the {num_experts} experts; what works: {works}"
        )
