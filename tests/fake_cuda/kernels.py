"""Launches of Triton's kernels, which the interpreter runs on the memory of the CPU."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from megatron_laer.layer.dispatch import row_map
from megatron_laer.runtime.comm import segments
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.verify import sums
from tests.fake_cuda import findings, labels, streams

_ALIGNMENT = 16

WRITES: dict[str, Callable[[dict[str, Any]], tuple[str, ...]]] = {
    "_copy_segments": lambda given: ("wire" if given["PACKS"] else "held",),
    "_sum_segments": lambda _: ("held",),
    "_rows_of_expert": lambda _: ("pair_P", "token_P", "row_TE"),
    "_rows_of_token": lambda _: ("by_token_P",),
    "_sum_rows": lambda _: ("sums_TH",),
    "_bit_sums": lambda _: ("sums",),
    "_signed_sums": lambda _: ("sums",),
}
"""Arguments that a kernel writes, by its name and its arguments; it reads all others."""

# Tensors of a holding, which kernels of the exchange find by their distances to the first.
_held: list[torch.Tensor] = []


class Launches:
    """Launches by kernel, and the variants that Triton would compile.

    Attributes:
        number: of launches, from the first step on.
        compiled_in_steps: variants by kernel that were first launched after the first step began.
    """

    def __init__(self) -> None:
        self.number = Counter[str]()
        self.variants: defaultdict[str, set[Hashable]] = defaultdict(set)
        self.compiled_in_steps = Counter[str]()
        self._in_steps = False

    def begin_step(self) -> None:
        if not self._in_steps:
            self.number.clear()
        self._in_steps = True

    def add(self, kernel: Any, given: dict[str, Any]) -> None:
        name, variant = kernel.fn.__name__, _variant(kernel, given)
        self.number[name] += 1
        self.compiled_in_steps[name] += self._in_steps and variant not in self.variants[name]
        self.variants[name].add(variant)


Kernels = Callable[[Launches], AbstractContextManager[None]]


@contextlib.contextmanager
def replaced_by_torch(_: Launches) -> Iterator[None]:
    """Compute by torch, as a machine without Triton does."""
    with (
        mock.patch.object(segments, "kernels_of", lambda *_: None),
        mock.patch.object(row_map, "kernels_of", lambda *_: None),
        mock.patch.object(sums, "kernels_of", lambda *_: None),
    ):
        yield


@contextlib.contextmanager
def _replaced(launches: Launches, *, runs: bool) -> Iterator[None]:
    """Count launches, and tell the checker of races about their reads and writes."""
    from triton.runtime.interpreter import InterpretedFunction

    from megatron_laer.runtime.comm import kernels

    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.add(kernel, given)
        name = kernel.fn.__name__
        tensors = [(key, value) for key, value in given.items() if isinstance(value, torch.Tensor)]
        tensors += [("held", one) for one in _held[1:]]
        for key, tensor in tensors:
            if not labels.on_card(tensor):
                what = f"{name} is launched with host memory as {key}"
                findings.current.note(findings.Kind.MISMATCH, what)
        if warmup:
            return
        if runs:
            with labels.suspended(), _disable_current_modes():
                run(kernel, *args, grid=grid, warmup=False, **kwargs)
        written = WRITES[name](given)
        streams.launched(
            name,
            [tensor for key, tensor in tensors if key not in written],
            [tensor for key, tensor in tensors if key in written],
        )

    begin_step = Coordinator.begin_step

    def begin(coordinator: Coordinator, *args: Any, **more: Any) -> None:
        launches.begin_step()
        begin_step(coordinator, *args, **more)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(InterpretedFunction, "run", launch))
        stack.enter_context(mock.patch.object(Coordinator, "begin_step", begin))
        for function in (kernels.copy_segments, kernels.sum_segments):
            patch = mock.patch.object(kernels, function.__name__, _noting_held(function))
            stack.enter_context(patch)
        yield


def _noting_held(function: Callable[..., None]) -> Callable[..., None]:
    def launch(held: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        _held[:] = held
        try:
            function(held, *args, **kwargs)
        finally:
            _held.clear()

    return launch


interpreted: Kernels = partial(_replaced, runs=True)
"""Run kernels, which is slow, and count them."""

only_counted: Kernels = partial(_replaced, runs=False)
"""Count kernels without running them; results are what memory holds."""


def _variant(kernel: Any, given: dict[str, Any]) -> Hashable:
    """Return what Triton specialises this launch on, as its `JITFunction` does."""
    unspecialised = kernel.kwargs["do_not_specialize"] or ()
    unaligned = kernel.kwargs["do_not_specialize_on_alignment"] or ()
    constants = kernel.fn.__annotations__
    return tuple(
        (name, value)
        if name in constants
        else (name, *_of_argument(value, name in unspecialised, name in unaligned))
        for name, value in given.items()
    )


def _of_argument(value: Any, is_unspecialised: bool, is_unaligned: bool) -> tuple[Hashable, ...]:
    if isinstance(value, torch.Tensor):
        ignored = is_unspecialised or is_unaligned
        return str(value.dtype), ignored or value.data_ptr() % _ALIGNMENT == 0
    if isinstance(value, int) and not isinstance(value, bool):
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        if is_unspecialised:
            return (width,)
        return width, value == 1, is_unaligned or value % _ALIGNMENT == 0
    return (value,)
