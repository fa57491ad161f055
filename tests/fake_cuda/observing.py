"""Observer that reports every operation on the labelled device: reads, writes, allocations.

Schemas tell the effects of aten operations, and names of arguments those of collectives, whose c10d
schemas name nothing as written. As on NCCL, a collective runs on the current stream, or
asynchronously on a stream of its group, which waits for the current one. `Work.wait` makes the
current stream wait for it. Until then the work holds its tensors.

On CUDA, autograd accumulates a leaf and runs its hooks on the stream that was current when the
leaf's node was made. For Megatron's DDP that is a side stream; hooks do the same here. The engine
orders that stream behind the producers of *defined* gradients alone (`InputBuffer::add` of torch).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.fake_cuda import findings, labels
from tests.fake_cuda.clocks import HOST, Checker
from tests.fake_cuda.streams import Event, Simulation, Stream, behind, current_stream

_POINT_TO_POINT = {"send": "dst", "recv_": "src", "recv_any_source_": ""}

HOST_GROUPS: set[str] = set()
"""Names of groups that stay gloo's on a card's machine, for control messages of host memory."""

# Operations that give another view of their input and whose schema does not say so.
_VIEWS = {"aten::_unsafe_view", "aten::lift_fresh", "aten::_reshape_alias"}
# Operations that read no element of their inputs, and those that write none of their output.
_SHAPES = ("aten::empty", "aten::new_", "aten::zeros", "aten::ones", "aten::full", "aten::rand")
_UNINITIALISED = ("aten::empty", "aten::new_empty")


class Observer:
    """Reporter of every operation on the labelled device to the checker."""

    def __init__(self, checker: Checker, works: Works) -> None:
        self._checker = checker
        self._works = works

    def saw(self, schema: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        names = [argument.name for argument in schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        findings.current.ran(schema.name)
        if schema.name.startswith("c10d::"):
            self._works.enqueued(schema.name.removeprefix("c10d::"), given)
        elif not _is_view(schema):
            self._note(schema, given, result)

    def _note(self, schema: Any, given: dict[str, Any], result: Any) -> None:
        made = _tensors(result)
        touched = [*made, *(tensor for value in given.values() for tensor in _tensors(value))]
        on_host = not any(map(labels.may_be_on_card, touched))
        checker, stream = self._checker, HOST if on_host else current_stream().number
        name = schema.name.removeprefix("aten::")
        number = checker.enqueue(stream)
        for argument in () if schema.name.startswith(_SHAPES) else schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(given.get(argument.name)):
                checker.access(stream, number, tensor, writes=written, name=name)
        for tensor in made:
            is_new = checker.allocated(stream, tensor)
            if is_new and not schema.name.startswith(_UNINITIALISED):
                checker.access(stream, number, tensor, writes=True, name=name)


def _is_view(schema: Any) -> bool:
    aliases = [returned.alias_info for returned in schema.returns]
    return schema.name in _VIEWS or any(
        alias is not None and not alias.is_write for alias in aliases
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, list | tuple):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Works:
    """Collectives run on the streams that NCCL would use, with the end of each."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._group: Any = None
        self._streams: dict[tuple[str, object], Stream] = {}
        self._enqueued: list[tuple[Event, list[torch.Tensor]]] = []
        self._held: list[list[tuple[Event, list[torch.Tensor]]]] = []

    def enqueued(self, name: str, given: dict[str, Any]) -> None:
        assert self._group is not None, f"c10d::{name} was called past ProcessGroup's methods"
        checker = self._checker
        stream = current_stream()
        is_async = name in _POINT_TO_POINT or given.get("async_op", True)
        if is_async:
            stream = self._stream_of(name, given)
            behind(stream, current_stream())
        number = checker.enqueue(stream.number)
        touched = {False: list[torch.Tensor](), True: list[torch.Tensor]()}
        for argument, value in given.items():
            for writes in effects(name, argument):
                touched[writes] += _tensors(value)
        for writes, tensors in touched.items():
            for tensor in tensors:
                checker.access(stream.number, number, tensor, writes=writes, name=name)
        checker.exchanged(stream.number, number)
        if is_async:
            self._enqueued.append((stream.record_event(), touched[False] + touched[True]))

    def method(self, true_method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method of `ProcessGroup` that starts a collective."""

        def run(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.group_name in HOST_GROUPS:
                with _disable_current_modes():
                    return true_method(group, *args, **kwargs)
            outer, self._group = self._group, group
            try:
                work = true_method(group, *args, **kwargs)
            finally:
                self._group = outer
            enqueued, self._enqueued = self._enqueued, []
            if not enqueued:
                return work
            # Work that is never waited for holds its tensors until it is done; here, forever.
            self._held.append(enqueued)
            return AsyncWork(work, enqueued)

        return run

    def _stream_of(self, name: str, given: dict[str, Any]) -> Stream:
        """Return NCCL's stream: one per communicator, or per pair of ranks for point-to-point."""
        peer = _POINT_TO_POINT.get(name)
        key = self._group.group_name, None if peer is None else given.get(peer)
        if key not in self._streams:
            stream = self._streams[key] = Stream()
            described = self._group.group_desc
            self._checker.names[stream.number] = f"NCCL's stream of group {described}"
        return self._streams[key]


def effects(name: str, argument: str) -> tuple[bool, ...]:
    """Return whether a collective writes this argument, each time that it touches it."""
    if argument.startswith("output"):
        return (True,)
    if argument.startswith("input"):
        return (False,)
    if argument != "tensors":  # of a barrier, or sizes
        return ()
    return {"send": (False,), "recv_": (True,), "recv_any_source_": (True,)}.get(
        name, (False, True)
    )


class AsyncWork:
    """Work as NCCL's: the current stream waits for it, and it then releases the tensors."""

    def __init__(self, work: Any, enqueued: list[tuple[Event, list[torch.Tensor]]]) -> None:
        self._work = work
        self._enqueued = enqueued

    def wait(self, *args: Any) -> bool:
        self.finish(*args)
        self.order()
        return True

    def finish(self, *args: Any) -> None:
        """Wait until gloo is done, whose own copies do not belong to this program."""
        with _disable_current_modes():
            self._work.wait(*args)

    def order(self) -> None:
        """Let the current stream wait, and release the tensors."""
        for event, _ in self._enqueued:
            Simulation.checker.wait(current_stream().number, event.clock)
        self._enqueued.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


_COLLECTIVE_METHODS = [
    name
    for name, method in vars(dist.ProcessGroup).items()
    if callable(method)
    and name.lstrip("_").startswith(
        ("all", "reduce", "broadcast", "gather", "scatter", "send", "recv", "barrier", "monitored")
    )
]


@contextlib.contextmanager
def replaced(works: Works) -> Iterator[None]:
    """Replace the methods that start collectives, and autograd's engine, inside the block."""
    with contextlib.ExitStack() as stack:
        for name in _COLLECTIVE_METHODS:
            wrapped = works.method(getattr(dist.ProcessGroup, name))
            stack.enter_context(mock.patch.object(dist.ProcessGroup, name, wrapped))
        engine = _Engine(torch.autograd.Variable._execution_engine)
        stack.enter_context(mock.patch.object(torch.autograd.Variable, "_execution_engine", engine))
        yield


class _Engine:
    """Autograd's engine, at whose end the caller's stream waits for the streams of leaves."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        _record_arrivals(args[0] if args else kwargs["tensors"])
        result = self._engine.run_backward(*args, **kwargs)
        for stream in Simulation.leaf_streams:
            behind(current_stream(), stream)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _record_arrivals(roots: Sequence[torch.Tensor]) -> None:
    """Let each producer of a leaf's gradient record an event, if the gradient is defined."""
    seen: set[Any] = set()
    left, arrived = [root.grad_fn for root in roots], Simulation.arrivals
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [after for after, _ in node.next_functions]
        leaves = [(at, after) for at, after in enumerate(following) if after in arrived]
        left += [after for after in following if after not in arrived]
        if leaves:
            node.register_hook(functools.partial(_arrive, leaves))


def _arrive(
    leaves: list[tuple[int, Any]], produced: tuple[torch.Tensor | None, ...], _: Any
) -> None:
    event = current_stream().record_event()
    for at, leaf in leaves:
        if produced[at] is not None:
            Simulation.arrivals[leaf].append(event)


@contextlib.contextmanager
def side_stream_of_leaves() -> Iterator[None]:
    """Accumulate gradients on the stream that Megatron builds DDP on, as autograd does on CUDA."""
    from megatron.core.distributed import DistributedDataParallel

    true_init = DistributedDataParallel.__init__

    def init(ddp: Any, *args: Any, **kwargs: Any) -> None:
        true_init(ddp, *args, **kwargs)
        for node in ddp.grad_accs:
            accumulate_on(current_stream(), node)

    with mock.patch.object(DistributedDataParallel, "__init__", init):
        yield


def accumulate_on(stream: Stream, node: Any) -> None:
    """Run the accumulation of a leaf, and its existing hooks, on this stream."""
    Simulation.arrivals[node] = []

    def enter(grads: tuple[torch.Tensor | None, ...]) -> None:
        for grad in grads:
            if grad is not None:
                Simulation.checker.recorded(stream.number, grad)
        for event in Simulation.arrivals[node]:
            Simulation.checker.wait(stream.number, event.clock)
        Simulation.arrivals[node].clear()
        Simulation.current.append(stream)
        Simulation.leaf_streams.add(stream)

    def leave(*_: Any) -> None:
        assert Simulation.current.pop() is stream

    node.register_prehook(enter)
    node.register_hook(leave)
