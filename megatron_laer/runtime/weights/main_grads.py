"""Megatron's convention for gradients that are added to main gradients outside of autograd.

Its data-parallel wrapper gives each parameter a `main_grad`. A kernel that adds to it sets
`grad_added_to_main_grad` and returns a dummy gradient to autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch

_HOOK_STREAM = "fsep_hook_stream"
# Megatron-FSDP's access to a main gradient, whose attribute comes and goes.
_OF_FSDP = "get_main_grad"


def note_hook_stream(parameters: Iterable[torch.nn.Parameter], stream: torch.cuda.Stream) -> None:
    """Note the stream on which autograd runs these parameters' hooks."""
    for parameter in parameters:
        setattr(parameter, _HOOK_STREAM, stream)


def kept_for(parameters: Sequence[torch.nn.Parameter]) -> bool:
    others = [part for part in parameters if not hasattr(part, "main_grad")]
    return all(hasattr(part, _OF_FSDP) for part in others)


def main_grad_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    of_fsdp = getattr(parameter, _OF_FSDP, None)
    main_grad: torch.Tensor = of_fsdp() if of_fsdp else parameter.main_grad  # type: ignore[attr-defined]
    return main_grad


def mark_added(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Mark the parameter's gradient as added, and return a dummy gradient for autograd.

    Megatron clears the mark at each step. Autograd would copy a placeholder, but accepts a new
    tensor with full storage as it is.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return _zeros(parameter.shape, parameter.dtype, parameter.device).detach()


def hook_stream(parameters: Sequence[torch.nn.Parameter]) -> torch.cuda.Stream | None:
    """Return the stream on which autograd runs the hooks of one module's parameters, if noted."""
    stream: torch.cuda.Stream | None = getattr(parameters[0], _HOOK_STREAM, None)
    return stream


def order_hooks(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make the hooks of these parameters wait for the current stream.

    Autograd orders them behind defined gradients alone.
    """
    if (stream := hook_stream(parameters)) is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))


@functools.cache
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the memory of dummy gradients, which all layers share, as Transformer Engine's do."""
    return torch.zeros(shape, dtype=dtype, device=device)
