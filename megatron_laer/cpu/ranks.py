"""`RankPool` runs functions on ranks, in processes that are started once.

    with RankPool(4) as pool:
        results = pool.run(function, argument)      # one result per rank

A function must be at module level, since ranks import it by path. An exception on any rank comes
back with its traceback; a time-out dumps every rank's stacks and ends the pool.

Nothing outlives a pool: each rank leads a session of its own, whose processes end with it.
Megatron's checkpoint writer, for one, leaves a server process on every rank. If that outlives its
rank, it keeps Python from exiting, since it holds the pipe of multiprocessing's resource tracker.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Lines of each rank's log shown on a failure: stacks of all threads, and the lines before.
_SHOWN_LINES = 250
_STACK_SIGNAL = signal.SIGUSR1

# Module whose import prepares the process that ranks are forked from, one for all pools.
preparation = "megatron_laer.cpu.rank_imports"


class RankError(AssertionError):
    """Failure or time-out of a function on some rank."""


@dataclass
class Raised:
    """Exception of a rank."""

    type_name: str
    message: str
    traceback: str


class RankPool:
    """`world_size` processes on the CPU platform, forked from one that `preparation` names."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        # Wait this long for the other ranks once one has raised, since they may wait for it.
        self.patience_s = 120.0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._logs: list[Path] = []
        self._store: Any = None
        # Registered before multiprocessing's own handler, which would wait for ranks for ever.
        atexit.register(self.close)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return bool(self._processes)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 1200.0) -> list[Any]:
        """Call `function(*args)` on every rank and return the results, rank 0 first."""
        results = self.run_raw(function, *args, timeout_s=timeout_s)
        for rank, result in enumerate(results):
            if isinstance(result, Raised):
                self.close()
                raise RankError(f"rank {rank} of {self.world_size}:\n{result.traceback}")
        return results

    def run_raw(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 1200.0
    ) -> list[Any]:
        """Run as `run` does, with a `Raised` in place of a failed rank's result."""
        if not self._processes:
            self._start()
        task = (function.__module__, function.__qualname__, args, self._open_store())
        for pipe in self._pipes:
            pipe.send(task)
        return self._collect(timeout_s)

    def close(self) -> None:
        for process in self._processes:
            # A rank that does not lead its session yet has started nothing.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        for log in self._logs:
            log.unlink(missing_ok=True)
        self._processes, self._pipes, self._logs, self._store = [], [], [], None

    def _open_store(self) -> int:
        """Serve a store for one call's process group, as torchrun does, and return its port.

        A second group would find the first one's addresses. If rank 0 served it, earlier ranks
        would retry only after up to a second.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port: int = self._store.port
        return port

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([preparation])
        for rank in range(self.world_size):
            here, there = context.Pipe()
            handle, name = tempfile.mkstemp(prefix=f"rank-{rank}-", suffix=".log")
            os.close(handle)
            process = context.Process(
                target=_serve,
                args=(there, rank, self.world_size, name, dict(os.environ)),
                daemon=False,
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
            self._logs.append(Path(name))

    def _collect(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(self._stop_with_stacks(_why_stopped(results, timeout_s)))
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    raise RankError(self._stop_with_stacks(f"rank {rank} died")) from None
            if _raised(results):
                deadline = min(deadline, time.monotonic() + self.patience_s)
        return [results[rank] for rank in range(self.world_size)]

    def _stop_with_stacks(self, reason: str) -> str:
        for process, log in zip(self._processes, self._logs, strict=True):
            if process.is_alive():
                written = log.stat().st_size
                os.kill(process.pid, _STACK_SIGNAL)
                _await_stacks(process, log, written)
        tails = []
        for rank, log in enumerate(self._logs):
            lines = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            tails += [f"--- rank {rank}", *lines]
        self.close()
        return f"{reason}; the last lines of every rank:\n" + "\n".join(tails)


def _raised(results: dict[int, Any]) -> dict[int, Raised]:
    return {rank: found for rank, found in results.items() if isinstance(found, Raised)}


def _why_stopped(results: dict[int, Any], timeout_s: float) -> str:
    """Return which ranks have results, behind the errors of others, for which they may wait."""
    raised = [f"rank {rank}:\n{found.traceback}" for rank, found in _raised(results).items()]
    given = f"results of ranks {sorted(results)}, no other"
    return "\n".join([*raised, given if raised else f"{given} after {timeout_s} s"])


def _await_stacks(process: Any, log: Path, written: int, within_s: float = 60.0) -> None:
    """Wait until a rank has written its stacks and nothing more for 1 s, or has ended."""
    give_up_s = time.monotonic() + within_s
    sizes = [written]
    while process.is_alive() and time.monotonic() < give_up_s:
        time.sleep(0.5)
        sizes.append(log.stat().st_size)
        if sizes[-1] > written and len(set(sizes[-3:])) == 1:
            return


class RankPools:
    """Pools by number of ranks, `pools(4)`; above `most` ranks in all, others are closed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size)
        wanted = self._pools[world_size]
        others = [pool for pool in self._pools.values() if pool.running and pool is not wanted]
        if world_size + sum(pool.world_size for pool in others) > self._most:
            for pool in others:
                pool.close()
        return wanted

    def __enter__(self) -> RankPools:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()


def _serve(
    pipe: Connection, rank: int, world_size: int, log: str, environment: dict[str, str]
) -> None:
    lead_session(log)
    faulthandler.register(_STACK_SIGNAL, all_threads=True)
    from megatron_laer.cpu.rank_imports import ENVIRONMENT, SET_BY_PREPARE

    # The process it was forked from has the environment of the first pool's start.
    os.environ.clear()
    os.environ.update(environment | SET_BY_PREPARE)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True",
        PYTHONWARNINGS="ignore",
        **ENVIRONMENT,
    )
    frozen = False
    while True:
        try:
            module, name, args, port = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            result = pickle.dumps(function(*args))
        except BaseException as error:
            traceback.print_exc()
            raised = Raised(type(error).__name__, str(error), traceback.format_exc())
            result = pickle.dumps(raised)
        # Bytes, since `send` would pass every tensor as an open file that lives as long as it does.
        pipe.send_bytes(result)
        sys.stdout.flush()
        if not frozen:
            # Imported objects stay; each later collection walked all of them, a fifth of a run.
            gc.collect()
            gc.freeze()
            frozen = True


def lead_session(log: str) -> None:
    """Start a session that ends with this process's starter, and write output to a file."""
    os.setsid()
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _end_with_the_starter() -> None:
    """End this rank and its processes with the pool's process; the fork server would stay."""
    starter = multiprocessing.parent_process()
    assert starter is not None, "a rank is a child of its pool's process"
    starter.join()
    os.killpg(0, signal.SIGKILL)
