"""Conversion of FSEP models' weights to and from Hugging Face's format by Megatron-Bridge.

    with stock_weights():
        bridge.load_hf_weights(model)

Its conversion makes a task for each parameter, and runs them in the order of layers. Here these are
stock's parameters; a layer's experts are restored at its first task.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from megatron_laer.integrations.stock_names import StockLayer, stock_layers


@contextlib.contextmanager
def stock_weights() -> Iterator[None]:
    """Show Megatron-Bridge the weights of FSEP models as stock's in this context.

    `AutoBridge` then converts weights as without FSEP, in both directions: `load_hf_weights`,
    `export_hf_weights`, `save_hf_weights`, `save_hf_pretrained`. All ranks take part, and iterate
    over exported weights to the end. One layer's experts at a time are restored, for the model's
    expert-parallel size. After a load call Megatron's `reload_model_params()` of the optimizer.

    Raises:
        ValueError: from Megatron-Bridge's functions, on every rank: the group's ranks do not divide
            the experts, so that stock could not hold them either.
    """
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    build = MegatronModelBridge.build_conversion_tasks
    load = MegatronModelBridge.load_weights_hf_to_megatron
    loads = 0

    @functools.wraps(build)
    def build_tasks(self: Any, hf_pretrained: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        chunks = [stock_layers(chunk, None, grouped=True) for chunk in model]
        with contextlib.ExitStack() as stack:
            for chunk, layers in chunks:
                for layer in layers:
                    stack.enter_context(_shown_as_stock(chunk, layer))
            tasks = build(self, hf_pretrained, model, *args, **kwargs)
        return _Tasks(tasks, [layers for _, layers in chunks], writes=loads > 0)

    @functools.wraps(load)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        nonlocal loads
        loads += 1
        try:
            return load(*args, **kwargs)
        finally:
            loads -= 1

    MegatronModelBridge.build_conversion_tasks = build_tasks
    MegatronModelBridge.load_weights_hf_to_megatron = load_weights
    try:
        yield
    finally:
        MegatronModelBridge.build_conversion_tasks = build
        MegatronModelBridge.load_weights_hf_to_megatron = load


class _Tasks:
    """Megatron-Bridge's tasks, with stock's weights in those of experts."""

    def __init__(
        self, tasks: Sequence[Any], layers: Sequence[list[StockLayer]], *, writes: bool
    ) -> None:
        self._layers = {
            (stage, parameter.name): layer
            for stage, of_chunk in enumerate(layers)
            for layer in of_chunk
            for parameter in layer.parameters()
        }
        # Layers of MTP count from 0 too, and their experts' tasks would alternate with others. The
        # order must be the same on all ranks, so it depends on names alone.
        places: dict[str, int] = {}
        for task in tasks:
            places.setdefault(_owner(task), len(places))
        self._tasks = sorted(tasks, key=lambda task: places[_owner(task)])
        self._writes = writes

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Any]:
        for layer, tasks in groupby(self._tasks, self._layer_of):
            if layer is None:
                yield from tasks
                continue
            with layer.lent(writable=self._writes) as named:
                tensors = dict(named)
                for task in tasks:
                    yield replace(task, param_weight=tensors[task.param_name])
            del tensors  # before the next layer's are made

    def _layer_of(self, task: Any) -> StockLayer | None:
        return self._layers.get((task.vp_stage, task.param_name))


def _owner(task: Any) -> str:
    """Return the name of the experts with a task's parameter, or else the parameter's."""
    name: str = task.global_param_name
    return name.partition(".experts.")[0] if ".experts." in name else name


@contextlib.contextmanager
def _shown_as_stock(chunk: torch.nn.Module, layer: StockLayer) -> Iterator[None]:
    """Replace the experts by modules with stock's parameters, on the meta device."""
    parent = chunk.get_submodule(layer.prefix.rpartition(".")[0])
    shown = torch.nn.Module()
    for name, weight in layer.named(layer.empty_blocks(torch.device("meta"))):
        linear, parameter = name.removeprefix(f"{layer.prefix}.").split(".")
        if not hasattr(shown, linear):
            shown.add_module(linear, _Linear(partition_dim=0 if linear == "linear_fc1" else 1))
        shown.get_submodule(linear).register_parameter(parameter, torch.nn.Parameter(weight))
    parent.experts = shown
    try:
        yield
    finally:
        parent.experts = layer.experts


class _Linear(torch.nn.Module):
    """Parameters of a linear layer, with attributes for tensor-parallel cuts."""

    def __init__(self, partition_dim: int) -> None:
        super().__init__()
        self.tensor_model_parallel = True
        self.partition_dim = partition_dim
