"""CPU replacements of torch functions that need CUDA, made once and never undone."""

import atexit
import collections
import contextlib
import functools
import os
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed import distributed_c10d

# Typed Any, since the replacements have other types.
_CUDA: Any = torch.cuda
_TENSOR: Any = torch.Tensor
_MODULE: Any = torch.nn.Module

_CPU = torch.device("cpu")

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn"),
    *("randn_like", "randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


_replaced = False


def replace() -> None:
    """Make all replacements, in the order of this file; a second call does nothing."""
    global _replaced
    if _replaced:
        return
    _replaced = True
    # Set here too: torch may have been imported before TORCHDYNAMO_DISABLE was set.
    import torch._dynamo.config

    torch._dynamo.config.disable = True
    _replace_devices()
    _replace_streams()
    _replace_memory()
    _replace_random()
    _replace_moves()
    _replace_type_names()
    _replace_collectives()


def _replace_devices() -> None:
    cuda = _CUDA
    # Megatron requires CUDA; one device per local rank keeps its local-rank arithmetic valid.
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Callers pass the value as `device=`, so it is the true device, not an index.
    cuda.current_device = lambda: _CPU
    cuda.set_device = _nothing
    cuda.device = lambda *_: contextlib.nullcontext()
    # An A100's: Megatron refuses --moe-grouped-gemm below it. Its layers without Transformer
    # Engine, and FSEP's, ignore the flag.
    cuda.get_device_capability = lambda *_: (8, 0)
    cuda.get_device_name = lambda *_: "cpu"
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1
    )
    # Both initialise the driver; deferred calls must run at once instead of waiting for it.
    cuda._lazy_init = _nothing
    cuda._lazy_call = lambda callback, **_: callback()
    # DataLoader (pinning) and the optimizers (graph capture) probe the driver through these.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda *_, **__: None


def _replace_streams() -> None:
    cuda = _CUDA
    # Everything on the CPU runs in program order: a stream has nothing to order.
    default = Stream()
    cuda.Stream = Stream
    cuda.Event = Event
    cuda.current_stream = lambda *_: default
    cuda.default_stream = lambda *_: default
    cuda.stream = lambda stream: contextlib.nullcontext(stream)
    cuda.set_stream = _nothing
    cuda.synchronize = _nothing
    cuda.is_current_stream_capturing = lambda: False
    _TENSOR.record_stream = _nothing
    # Only a CUDA profiler reads NVTX ranges, and they need its library.
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        setattr(cuda.nvtx, name, _nothing)


def _replace_memory() -> None:
    cuda = _CUDA
    # Megatron logs these in every run; there is no CUDA allocator to ask.
    for name in (
        *("memory_allocated", "max_memory_allocated", "memory_reserved"),
        *("max_memory_reserved", "device_memory_used"),
    ):
        setattr(cuda, name, lambda *_: 0)
    cuda.memory_stats = lambda *_: collections.defaultdict(int)
    cuda.mem_get_info = lambda *_: (0, 0)
    cuda.empty_cache = _nothing
    cuda.reset_peak_memory_stats = _nothing


def _replace_random() -> None:
    # A private generator: on the default one, Megatron's per-rank "GPU" seeds would also seed dense
    # weights, which would then differ between expert-parallel ranks.
    generator = torch.Generator()
    functions = {
        "get_rng_state": lambda *_, **__: generator.get_state(),
        "set_rng_state": lambda state, *_, **__: generator.set_state(state.cpu()) and None,
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: generator.set_state(next(iter(states)).cpu()) and None,
        "manual_seed": lambda seed: generator.manual_seed(int(seed)) and None,
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)) and None,
        "initial_seed": generator.initial_seed,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
        setattr(torch.cuda.random, name, function)
    _CUDA.default_generators = _OneGenerator(generator)


def _replace_moves() -> None:
    # Megatron moves tensors to the GPU without checking for one.
    _TENSOR.cuda = lambda self, *_, **__: self
    _MODULE.cuda = lambda self, *_, **__: self
    _TENSOR.pin_memory = lambda self, *_, **__: self
    _TENSOR.to = _on_cpu(torch.Tensor.to, positional=True)
    _MODULE.to = _on_cpu(torch.nn.Module.to, positional=True)
    _MODULE.to_empty = _on_cpu(torch.nn.Module.to_empty)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))


def _replace_type_names() -> None:
    true_type = torch.Tensor.type

    # Megatron's optimizers sort parameters by type name and accept only CUDA's.
    @functools.wraps(true_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return true_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return true_type(self, dtype, *args, **kwargs)

    _TENSOR.type = type_


def _replace_collectives() -> None:
    dist: Any = torch.distributed
    true_all_to_all = dist.all_to_all_single
    true_all_gather = dist.all_gather
    true_coalescing = dist._coalescing_manager
    true_barrier = dist.barrier
    true_init = dist.init_process_group

    # Megatron's dispatcher converts split sizes to a list only when it copies them off a GPU.
    @functools.wraps(true_all_to_all)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return true_all_to_all(
            output,
            input,
            _as_list(output_split_sizes),
            _as_list(input_split_sizes),
            *args,
            **kwargs,
        )

    # Unlike NCCL, gloo cannot gather tensors of several sizes; each rank broadcasts its own.
    @functools.wraps(true_all_gather)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.numel() for part in tensor_list}) == 1:
            return true_all_gather(tensor_list, tensor, group, async_op)
        group = group or dist.group.WORLD
        tensor_list[dist.get_rank(group)].copy_(tensor)
        works = [
            dist.broadcast(part, group=group, group_src=rank, async_op=async_op)
            for rank, part in enumerate(tensor_list)
            if part.numel()
        ]
        return _Works(works) if async_op else None

    # Gloo joins coalesced tensors, and so converts them to one dtype: quantised parameters, too.
    @contextlib.contextmanager
    def coalescing_manager(group: Any = None, *args: Any, **kwargs: Any) -> Any:
        with true_coalescing(group, *args, **kwargs) as manager:
            yield manager
            group = group or dist.group.WORLD
            for operation in distributed_c10d._world.pg_coalesce_state.get(group, ()):
                if operation.dst_tensor is not None and operation.redop is None:
                    operation.tensor = operation.tensor.view(torch.uint8)
                    operation.dst_tensor = operation.dst_tensor.view(torch.uint8)

    @functools.wraps(true_barrier)
    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return true_barrier(*args, **kwargs)

    # Do not bind a group to a missing device. Megatron leaves its groups open: a thread that
    # outlives the interpreter can abort a run that has succeeded.
    @functools.wraps(true_init)
    def init_process_group(*args: Any, device_id: Any = None, **kwargs: Any) -> Any:
        true_init(*args, **kwargs)
        atexit.register(_destroy_groups)

    for function in (all_to_all_single, all_gather, barrier, init_process_group):
        setattr(dist, function.__name__, function)
        setattr(dist.distributed_c10d, function.__name__, function)
    dist._coalescing_manager = coalescing_manager
    _replace_gloo_groups(dist.ProcessGroupGloo)


def _replace_gloo_groups(gloo: Any) -> None:
    true_init = gloo.__init__
    device = functools.cache(gloo.create_default_device)

    # One device for all groups: each one's thread wakes 100 times a second, and the end of a group
    # waits for it. One thread for each group: two would share the name of their last operation
    # without a lock, and free it twice where it is long, as ALLGATHER_COALESCED (torch 2.15).
    @functools.wraps(true_init)
    def init(
        self: Any, store: Any, rank: int, size: int, timeout: Any = None, **settings: Any
    ) -> None:
        options = gloo._Options()
        options._devices, options._threads = [device()], 1
        for name, value in {"_timeout": timeout, **settings}.items():
            if value is not None:
                setattr(options, name, value)
        true_init(self, store, rank, size, options)
        # A rank that raises at once would else close connections that another still makes.
        store.set(f"connected_{rank}", "")
        store.wait([f"connected_{other}" for other in range(size)])

    gloo.__init__ = init


class _Works(NamedTuple):
    works: list[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class Event:
    """Replacement of a CUDA event; its time is the wall clock at `record`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded_s = 0.0

    def record(self, *_: Any) -> None:
        self._recorded_s = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to `end`, as CUDA's events do."""
        return (end._recorded_s - self._recorded_s) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, *_: Any) -> None:
        pass

    synchronize = wait


class Stream:
    """Replacement of a CUDA stream; work is done when the call returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self, *_: Any) -> None:
        pass

    wait_event = wait_stream = synchronize


class _OneGenerator:
    # Megatron indexes `default_generators` with `current_device()`, which is a device here.
    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __getitem__(self, _: Any) -> torch.Generator:
        return self._generator

    def __len__(self) -> int:
        return 1


def _destroy_groups() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _as_list(splits: Any) -> Any:
    return splits.tolist() if hasattr(splits, "tolist") else splits


def _is_gpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    # torch reads a bare integer as the index of an accelerator.
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function: Callable[..., Any], positional: bool = False) -> Callable[..., Any]:
    """Wrap `function` to use the CPU for a GPU in `device=` or its second argument; never pin."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_gpu(kwargs["device"]):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        if positional and len(args) > 1 and _is_gpu(args[1]):
            args = (args[0], _CPU, *args[2:])
        return function(*args, **kwargs)

    return wrapped
