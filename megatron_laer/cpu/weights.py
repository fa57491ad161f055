"""Names of weights and gradients that stock and FSEP models share.

A parameter's key does not depend on parallel sizes: its name with the global layer number, and the
expert of an expert matrix. A rank's share of a key is a block of its rows.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

_EXPERTS = ".mlp.experts"
_STOCK_EXPERT = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12]"
    r"(?:\.adapter\..*)?)(?:\.weight|(?P<bias>\.bias))$"
)
_PACKED_ADAPTER = re.compile(r"(?P<linear>.*\.mlp\.experts\.linear_fc[12]\.adapter\..*)\.weight$")
_GROUPED_EXPERT = re.compile(
    r"(?P<experts>.*\.mlp\.experts)\.(?P<linear>linear_fc[12])(?:\.weight|(?P<bias>\.bias))"
    r"(?P<expert>\d+)$"
)
_FSEP_SLICE = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12](?:_bias)?_slice)$")
_TIED = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"^(.*?layers)\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class Piece:
    """Share of one key on this rank: rows [start, start + len) of a tensor of `shape`."""

    key: str
    shape: tuple[int, ...]
    start: int
    parameter: torch.nn.Parameter
    # Selects the piece in the parameter (one expert of a slice, a shard), or in its gradient.
    select: Callable[[torch.Tensor], torch.Tensor]


def pieces(model: list[torch.nn.Module]) -> Iterator[Piece]:
    """Yield every piece of every chunk on this rank, in the same order for the same model."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_laer.plugin.sharded_models import is_sharded, unwrapped

    wrapped: Any
    for wrapped in model:
        if is_sharded(wrapped):
            wrapped.synchronize_param_gather()  # for the next step, into whole parameters
    for chunk in map(unwrapped, model):
        numbers = {
            name: module.layer_number
            for name, module in chunk.named_modules()
            if isinstance(module, TransformerLayer)
        }
        modules = dict(chunk.named_modules())
        for name, parameter in chunk.named_parameters():
            for piece in _pieces_of(_globalise(name, numbers), name, parameter, modules):
                yield _shard_of(piece)


def _globalise(name: str, numbers: dict[str, int]) -> str:
    match = _LAYER.match(name)
    if match and f"{match[1]}.{match[2]}" in numbers:
        return f"{match[1]}.{numbers[f'{match[1]}.{match[2]}']}.{match[3]}"
    return name


def _pieces_of(
    key: str, name: str, parameter: torch.nn.Parameter, modules: dict[str, Any]
) -> Iterator[Piece]:
    from megatron_laer.layer.moe_layer import FSEPMoELayer

    # A shard of Megatron-FSDP has the shape over all tensor ranks.
    shape = tuple(getattr(parameter, "orig_param", parameter).shape)
    key = key.replace(".to_wrap.", ".")  # a linear layer with an adapter

    def expert_of(index: int) -> int:
        """Return the expert of a rank's home slot."""
        layer = modules[name.partition(_EXPERTS)[0] + ".mlp"]
        experts = layer.experts
        position: int = experts.ep_group.rank() * experts.num_local_experts + index
        is_fsep = isinstance(layer, FSEPMoELayer)
        return int(layer.state.home.expert_E[position]) if is_fsep else position

    if stock := _STOCK_EXPERT.match(key) or _GROUPED_EXPERT.match(key):
        expert = expert_of(int(stock["expert"]))
        linear = f"{stock['experts']}.{stock['linear']}{stock['bias'] or ''}"
        yield Piece(f"{linear}.{expert}", shape, 0, parameter, _whole)
    elif (packed := _PACKED_ADAPTER.match(key)) and parameter.dim() == 3:
        for index in range(shape[0]):
            key = f"{packed['linear']}.{expert_of(index)}"
            yield Piece(key, shape[1:], 0, parameter, partial(_expert, index, shape))
    elif fsep := _FSEP_SLICE.match(key):
        experts = modules[name.rsplit(".", 1)[0]]
        (spec,) = [spec for spec in experts.specs if spec.parameter_name == fsep[2]]
        for expert in range(spec.num_experts):
            yield Piece(
                f"{fsep[1]}.{spec.saved_as.removesuffix('.weight')}.{expert}",
                (spec.rows, *spec.saved_shape[2:]),
                spec.start,
                parameter,
                partial(_expert, expert, spec.saved_shape),
            )
    else:
        # The first and the last pipeline stage each hold a copy of this weight.
        if getattr(parameter, "shared_embedding", False):
            key = _TIED
        # Stock and FSEP cut dense tensors over tensor ranks alike, so each cut counts as a tensor.
        if getattr(parameter, "tensor_model_parallel", False):
            from megatron.core import parallel_state

            key += f"@{parallel_state.get_tensor_model_parallel_rank()}"
        yield Piece(key, shape, 0, parameter, _whole)


def _shard_of(piece: Piece) -> Piece:
    """Return the rows of a piece that Megatron-FSDP keeps on this rank: the piece without it."""
    rows = getattr(piece.parameter, "megatron_fsdp_slice", None)
    if rows is None:
        return piece
    columns = math.prod(piece.shape[1:])
    return replace(piece, start=piece.start + rows.start // columns, select=_local)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local()
    return local


def _expert(expert: int, shape: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(shape)[expert]


@torch.no_grad()
def load_common_weights(model: list[torch.nn.Module]) -> None:
    """Set weights that depend only on keys, so that all models start alike."""
    for piece in pieces(model):
        generator = torch.Generator().manual_seed(zlib.crc32(piece.key.encode()))
        whole = torch.randn(piece.shape, generator=generator)
        # Norm weights are vectors around one; all others are small enough for a stable start.
        is_norm = whole.dim() == 1 and "bias" not in piece.key
        whole = 1 + 0.05 * whole if is_norm else 0.04 * whole
        mine = piece.select(piece.parameter)
        mine.copy_(whole[piece.start : piece.start + mine.shape[0]])
    chunk: Any
    for chunk in model:
        if hasattr(chunk, "megatron_fsdp_dist_index"):  # it computes with copies of these weights
            chunk.module.install_optimized_model_weights()


def read(model: list[torch.nn.Module], what: str) -> list[tuple[str, int, torch.Tensor]]:
    """Return (key, start, rows) of every piece's `weight`, or of trainable ones' `main_grad`."""

    def value(piece: Piece) -> torch.Tensor:
        if what == "weight":
            return piece.parameter.data
        # Megatron-FSDP gives sharded gradients to its optimizer's parameters.
        is_sharded = hasattr(piece.parameter, "megatron_fsdp_slice")
        grad: torch.Tensor = getattr(piece.parameter, "grad" if is_sharded else "main_grad")
        return grad

    return [
        (piece.key, piece.start, piece.select(value(piece)).detach().cpu().clone())
        for piece in pieces(model)
        if (what == "weight" or piece.parameter.requires_grad)
        and piece.select(piece.parameter).numel() > 0
    ]


def assemble(parts: list[list[tuple[str, int, torch.Tensor]]]) -> Tensors:
    """Assemble whole tensors from all ranks' pieces."""
    by_key: dict[str, dict[int, torch.Tensor]] = {}
    for part in parts:
        for key, start, rows in part:
            kept = by_key.setdefault(key, {}).setdefault(start, rows)
            assert torch.equal(kept, rows), f"replicas of {key} differ"
    for key, found in by_key.items():
        ends = [start + len(rows) for start, rows in sorted(found.items())]
        assert [0, *ends[:-1]] == sorted(found), f"pieces of {key} leave gaps or overlap"
    return {
        key: torch.cat([found[start] for start in sorted(found)])
        for key, found in sorted(by_key.items())
    }
