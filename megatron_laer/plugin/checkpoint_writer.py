"""Helper processes of checkpoint writers that live exactly as long as their rank.

The writer passes its results through a `multiprocessing` manager, which stays from the first save
on; async saves write in a worker process. A launcher's signal to all processes of a job would end
both, and a rank with `--exit-signal-handler` could not save. After a SIGKILL of the rank both would
stay. So they block signals and watch their rank. This covers Megatron's own writer and, if Megatron
has found it, nvidia-resiliency-ext's. Data loaders' workers need nothing: Megatron sets its handler
in them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import weakref
from collections.abc import Callable
from multiprocessing import util
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_laer import device
from megatron_laer.helper_processes import end_with_parent, signals_blocked
from megatron_laer.plugin.patching import Patch, around, original_of

logger = logging.getLogger(__name__)

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_NVRX = "nvidia_resiliency_ext.checkpointing.async_ckpt"


def _lasting_manager(original: Any, mp_mode: str = "spawn") -> Any:
    from megatron.core.dist_checkpointing.strategies import async_utils

    filesystem_async: Any = sys.modules[original.__module__]
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        with async_utils._disable_gc(), signals_blocked():
            manager.start(initializer=end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    return original(mp_mode)


_WORKER_STAYS = "a signal to the whole job leaves the worker of async saves"


@around(f"{_STRATEGIES}.async_utils", "PersistentAsyncCaller._get_process", _WORKER_STAYS)
def _lasting_worker(
    original: Any, cls: Any, rank: int, mp_mode: str = "spawn", *args: Any, **kwargs: Any
) -> Any:
    fresh = cls._persistent_process is None
    # Spawned, not from a fork server: the signal would also end that one. If it blocked signals, so
    # would all processes that it starts for others.
    with signals_blocked():
        process = original(cls, rank, "spawn", *args, **kwargs)
    if fresh:
        # At a rank's exit multiprocessing sends SIGTERM, which the worker blocks, and waits.
        util.Finalize(None, process.kill, exitpriority=0)
    return process


@around(f"{_NVRX}.core", "PersistentAsyncCaller._start_worker", _WORKER_STAYS)
def _lasting_nvrx_worker(original: Any, caller: Any, rank: int) -> None:
    # Its own abort sends SIGTERM, and SIGKILL only after 30 s.
    with signals_blocked():
        original(caller, rank)
    util.Finalize(None, _abandon, args=(weakref.ref(caller),), exitpriority=0)


def _abandon(caller_of: Callable[[], Any]) -> None:
    """Kill the worker of a caller that a failing rank leaves open.

    The worker blocks SIGTERM, so multiprocessing, or the caller when deleted, would wait for ever.
    """
    caller = caller_of()
    if caller is not None and caller.process is not None:
        caller.process.kill()
        caller.process = None


def _run_worker(*args: Any) -> None:
    """Run Megatron's worker loop, in the worker. Pickled by name, so at module level."""
    _prepare_worker()
    original_of(_WORKER_LOOP)(*args)


def _run_nvrx_worker(*args: Any) -> None:
    _prepare_worker()
    original_of(_NVRX_WORKER_LOOP)(*args)


def _prepare_worker() -> None:
    end_with_parent()
    device.install_cpu_in_helper()


_ENDS_WITH_RANK = "the worker of async saves ends with its rank"
_WORKER_LOOP = Patch(
    f"{_STRATEGIES}.async_utils",
    "PersistentAsyncCaller.async_loop",
    lambda _original: staticmethod(_run_worker),
    _ENDS_WITH_RANK,
)
_NVRX_WORKER_LOOP = Patch(
    f"{_NVRX}.core",
    # Megatron starts its workers as daemons.
    "PersistentAsyncCaller.async_loop_for_daemon_worker",
    lambda _original: staticmethod(_run_nvrx_worker),
    _ENDS_WITH_RANK,
)
_manager_of, _nvrx_manager_of = (
    around(
        f"{module}.filesystem_async",
        "get_write_results_queue",
        "a signal to the whole job leaves the writer's manager, which ends with its rank",
    )(_lasting_manager)
    for module in (_STRATEGIES, _NVRX)
)
WRITER_PATCHES = (_manager_of, _lasting_worker, _WORKER_LOOP)
NVRX_PATCHES = (_nvrx_manager_of, _lasting_nvrx_worker, _NVRX_WORKER_LOOP)


def nvrx_patches() -> tuple[Patch, ...]:
    """Return the patches of nvidia-resiliency-ext, if Megatron has found it.

    An unknown version is not patched, with a warning: all works but saving after a signal to the
    job.
    """
    from megatron.core.dist_checkpointing.strategies import torch

    if not getattr(torch, "HAVE_NVRX", False):
        return ()
    try:
        for patch in NVRX_PATCHES:
            patch.owner_and_name()
    except ImportError:
        if int(os.environ.get("RANK", "0")) == 0:
            logger.warning(
                "FSEP: the installed nvidia-resiliency-ext is not known: a signal to the whole job "
                "ends its helpers, and a save by --async-strategy nvrx then fails; take mcore"
            )
        return ()
    return NVRX_PATCHES
