"""Loading of weights under stock Megatron's names; `stock_names.py` defines these.

Legend: e experts of a rank in stock; R rows and K columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_laer import session
from megatron_laer.integrations.stock_names import Named, StockLayer, stock_layers
from megatron_laer.runtime.comm.collectives import raise_everywhere
from megatron_laer.runtime.comm.process_groups import Group

_NAMED_IN_ERRORS = 5


@torch.no_grad()
def load_stock_named_parameters(
    model: torch.nn.Module,
    named_tensors: Iterable[Named],
    *,
    expert_parallel_size: int | None = None,
    grouped: bool | None = None,
) -> None:
    """Copy tensors under stock Megatron's names into a model chunk.

    Accepts the output of `stock_named_parameters` with the same arguments, in any order, dtype and
    device. Each rank gives once each name that stock would hold there. A layer's experts are kept
    until they and all earlier layers are complete, and then exchanged. In the chunk's order of
    layers this needs the memory of one layer's experts and twice that of one matrix. Where several
    ranks hold an expert, the group's first one counts.

    Collective over the world: every rank calls it for its chunks in turn, also those without an
    FSEP layer. Optimizers keep weights of their own: call Megatron's `reload_model_params()` after.

    Args:
        model: one chunk, in Megatron's wrappers or without.
        named_tensors: pairs of a name and a tensor in stock's shape.
        expert_parallel_size: X, as for `stock_named_parameters`.
        grouped: as for `stock_named_parameters`.

    Raises:
        ValueError: missing, unknown or repeated names, other shapes, a value that is no tensor, or
            an error of `named_tensors`. Raised on every rank of the world once all have read their
            input; weights may have been overwritten. Also as `stock_named_parameters`.
        RuntimeError: FSEP was turned off after the model was built.
    """
    chunk, layers = stock_layers(model, expert_parallel_size, grouped)
    reader = _Reader(chunk, layers, named_tensors)
    is_sound = True
    for layer in layers:
        # Ranks go on reading after an error, since the tensors may come by collectives.
        reader.read_until(layer)
        is_sound = is_sound and not _is_any(reader.has_problems, session.get_fsep_group())
        blocks = reader.take(layer)
        if is_sound:
            layer.write(blocks)
        del blocks  # before the next layer's are made
    reader.read_until(None)
    try:
        raise_everywhere(reader.problem())
    except ValueError as error:
        raise error from reader.error


class _Reader:
    """Reader of named tensors: dense ones into parameters, experts into their layer's blocks."""

    def __init__(
        self, chunk: torch.nn.Module, layers: list[StockLayer], named_tensors: Iterable[Named]
    ) -> None:
        slices = {id(slice_ErK) for layer in layers for slice_ErK in layer.experts.slices()}
        self._dense = {
            name: parameter
            for name, parameter in chunk.named_parameters()
            if id(parameter) not in slices
        }
        self._experts = {
            parameter.name: layer for layer in layers for parameter in layer.parameters()
        }
        self._missing = dict.fromkeys([*self._dense, *self._experts])  # in order
        self._left = {layer.prefix: len(layer.parameters()) for layer in layers}
        # By layer: its blocks, and their parts by name.
        self._held: dict[str, tuple[list[torch.Tensor], dict[str, torch.Tensor]]] = {}
        self._iterator = iter(named_tensors)
        self._problems: list[str] = []
        self._is_at_end = False
        self.error: Exception | None = None

    @property
    def has_problems(self) -> bool:
        """Return whether there are problems so far; missing names are known only at the end."""
        return bool(self._problems) or (self._is_at_end and bool(self._missing))

    def problem(self) -> str | None:
        problems = list(self._problems)
        if self._missing:
            problems.append(f"missing: {_some(list(self._missing))}")
        return "; ".join(problems) or None

    def read_until(self, layer: StockLayer | None) -> None:
        """Read until the layer's experts are complete; read all without a layer."""
        while not self._is_at_end and (layer is None or self._left[layer.prefix]):
            try:
                self._copy(*next(self._iterator))
            except StopIteration:
                self._is_at_end = True
            except Exception as error:  # the other ranks must learn of any error
                self._is_at_end, self.error = True, error
                self._problems.append(f"named_tensors: {type(error).__name__}: {error}")

    def take(self, layer: StockLayer) -> list[torch.Tensor]:
        """Return the layer's blocks and drop them here."""
        return self._held.pop(layer.prefix, ([], {}))[0]

    def _copy(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._missing:
            is_known = name in self._dense or name in self._experts
            self._problems.append(f"{name!r} {'comes twice' if is_known else 'is unknown'}")
            return
        del self._missing[name]
        target = self._target(name)
        if not isinstance(tensor, torch.Tensor):
            self._problems.append(f"{name!r} is a {type(tensor).__name__}, and no tensor")
        elif tensor.shape == target.shape:
            target.copy_(tensor)
        else:
            self._problems.append(
                f"{name!r} has the shape {list(tensor.shape)}, not {list(target.shape)}"
            )

    def _target(self, name: str) -> torch.Tensor:
        """Return the destination of a tensor, and count an expert as read."""
        if name in self._dense:
            return self._dense[name]
        layer = self._experts[name]
        self._left[layer.prefix] -= 1
        if layer.prefix not in self._held:
            blocks = layer.empty_blocks()
            self._held[layer.prefix] = blocks, dict(layer.named(blocks))
        return self._held[layer.prefix][1][name]


def _is_any(problem: bool, group: Group) -> bool:
    found: list[bool] = [False] * dist.get_world_size(group)
    dist.all_gather_object(found, problem, group=group)
    return any(found)


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED_IN_ERRORS
    listed = ", ".join(map(repr, names[:_NAMED_IN_ERRORS]))
    return f"{listed} and {more} more" if more > 0 else listed
