"""Helper processes of Megatron's checkpoint writer live exactly as long as their rank.

The writer passes its results through a `multiprocessing` manager, which stays from the first save
on, and async saves write in a worker process. A launcher signals every process of a job: both die,
and a rank with `--exit-signal-handler`, which saves then, fails to. After a SIGKILL of the rank
both stay. Here they hear no signal, and watch their rank. Not here: data loaders' workers, in which
Megatron sets its handler itself, and the writer of nvidia-resiliency-ext.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing import util
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_laer.platform import cpu
from megatron_laer.platform.helpers import end_with_parent, signals_blocked
from megatron_laer.plugin.patching import Patch, original_of

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"


def _with_lasting_manager(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            with async_utils._disable_gc(), signals_blocked():
                manager.start(initializer=end_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return original(mp_mode)

    return get_write_results_queue


def _with_lasting_worker(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def _get_process(cls: Any, rank: int, mp_mode: str = "spawn", *args: Any, **kwargs: Any) -> Any:
        fresh = cls._persistent_process is None
        # Spawned, not taken from a fork server: that one would be ended by the signal as well, and
        # if it blocked signals, so would all that it starts for others.
        with signals_blocked():
            process = original.__func__(cls, rank, "spawn", *args, **kwargs)
        if fresh:
            # At a rank's exit multiprocessing terminates the worker, which is deaf to that, and
            # waits for it.
            util.Finalize(None, process.kill, exitpriority=0)
        return process

    return classmethod(_get_process)


def _run_worker(*args: Any) -> None:
    """Run Megatron's loop of the worker, in the worker, which finds this function by its name."""
    end_with_parent()
    cpu.install_in_helper()
    original_of(_WORKER_LOOP)(*args)


_WORKER_LOOP = Patch(
    f"{_STRATEGIES}.async_utils",
    "PersistentAsyncCaller.async_loop",
    lambda _original: staticmethod(_run_worker),
    "the worker of async saves ends with its rank",
)
WRITER_PATCHES = (
    Patch(
        f"{_STRATEGIES}.filesystem_async",
        "get_write_results_queue",
        _with_lasting_manager,
        "a signal to the whole job leaves the writer's manager, which ends with its rank",
    ),
    Patch(
        f"{_STRATEGIES}.async_utils",
        "PersistentAsyncCaller._get_process",
        _with_lasting_worker,
        "a signal to the whole job leaves the worker of async saves",
    ),
    _WORKER_LOOP,
)
