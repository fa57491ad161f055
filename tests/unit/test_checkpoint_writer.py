"""The worker of async saves on ranks with a GPU: a new process, not a fork of its rank.

Covers Megatron's own writer, and nvidia-resiliency-ext's where that is installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import NEEDS_NVRX
from tests.processes import outlive, python_path, start

# Megatron asks torch for the worker's GPU; new processes import this replacement.
RANK = """
import os, signal, sys
import torch
torch.cuda.device_count, torch.cuda.set_device = lambda: 1, lambda _: None

def save(path):
    with open(path, "w") as file:
        file.write("saved")

if __name__ == "__main__":
    import megatron_laer
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    megatron_laer.enable()
    if sys.argv[2] == "mcore":
        worker = async_utils.PersistentAsyncCaller._get_process(0, "forkserver")
        caller = async_utils.PersistentAsyncCaller
        requests, completed = caller._persistent_queue, caller._persistent_comp_q
        request_class = async_utils.AsyncRequest
    else:
        from nvidia_resiliency_ext.checkpointing.async_ckpt import core, filesystem_async

        # In this mode it does without a GPU.
        caller = core.PersistentAsyncCaller(cpu_shm_mode=True)
        caller._start_worker(0)
        worker, requests, completed = caller.process, caller.queue, caller.comp_q
        request_class = core.AsyncRequest
    queue = filesystem_async.get_write_results_queue("fork")
    for helper in (worker.pid, queue._manager._process.pid):
        os.kill(helper, signal.SIGTERM)
        os.kill(helper, signal.SIGUSR1)
    requests.put(request_class(save, (sys.argv[1],), [], call_idx=3))
    assert completed.get() == 3
    queue.put("result")
    assert queue.get() == "result"
    print("helpers", worker.pid, queue._manager._process.pid, flush=True)
    sys.stdin.readline()
    raise ValueError("a rank fails while its worker waits for work")
"""


@pytest.mark.releases
@pytest.mark.parametrize("end", ["fails", "is killed"])
@pytest.mark.parametrize("writer", ["mcore", pytest.param("nvrx", marks=NEEDS_NVRX)])
def test_helpers_work_on_after_a_signal_and_end_however_their_rank_ends(
    tmp_path: Path, writer: str, end: str
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with start(script, tmp_path / "file", writer) as rank:
        assert rank.stdout is not None
        lines = iter(rank.stdout.readline, "")
        words = next((line.split() for line in lines if line.startswith("helpers")), [])
        if end == "is killed":
            rank.kill()
        # The helpers hold its output, so this waits for them too.
        _, errors = rank.communicate(timeout=600.0)
    helpers = [int(word) for word in words[1:]]
    assert len(helpers) == 2, errors
    assert (tmp_path / "file").read_text() == "saved"
    assert rank.returncode == (1 if end == "fails" else -signal.SIGKILL)
    assert ("a rank fails while" in errors) == (end == "fails")
    assert outlive(helpers) == []


def test_an_unknown_nvidia_resiliency_ext_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from megatron.core.dist_checkpointing.strategies import torch

    from megatron_laer.plugin import checkpoint_writer
    from megatron_laer.plugin.patching import Patch

    unknown = (Patch("nowhere", "function", lambda original: original, "is not there"),)
    monkeypatch.setattr(checkpoint_writer, "NVRX_PATCHES", unknown)
    monkeypatch.setattr(torch, "HAVE_NVRX", False, raising=False)
    assert checkpoint_writer.nvrx_patches() == ()
    assert "take mcore" not in caplog.text
    monkeypatch.setattr(torch, "HAVE_NVRX", True)
    assert checkpoint_writer.nvrx_patches() == ()
    assert "take mcore" in caplog.text


SEMAPHORES = """
import multiprocessing, sys
from megatron_laer.helper_processes import signals_blocked

with signals_blocked():
    lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name, flush=True)
sys.stdin.readline()
"""


def test_names_of_semaphores_go_when_a_ranks_session_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SEMAPHORES],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as rank:
        assert rank.stdout is not None
        name = rank.stdout.readline().strip()
        file = Path(f"/dev/shm/sem.{name.removeprefix('/')}")
        assert name and file.exists()
        os.killpg(rank.pid, signal.SIGKILL)
    give_up_s = time.monotonic() + 60.0
    while file.exists() and time.monotonic() < give_up_s:
        time.sleep(0.05)
    left = file.exists()
    file.unlink(missing_ok=True)
    assert not left
