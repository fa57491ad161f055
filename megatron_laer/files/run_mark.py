"""Marks next to recordings, which tell a restart from another run.

Both start at step 0. One restarts a run that died before its first checkpoint; the other was given
the same folder by mistake. There are two signs of the same run:

- it saves to and loads from the same folder of checkpoints, so a restart continues it;
- the same process launched its ranks, as torchrun does for restarts. Its count of restarts is no
  sign, since it also restarts a refused run. Nor is its run id alone: people put it into scripts.

A run without signs leaves no mark, and is refused as unrelated.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from megatron_laer.files.checks import read_bytes
from megatron_laer.files.writing import write_file

_MAX_BYTES = 1000
_checkpoints: str | None = None


def set_checkpoints(load: str | None, save: str | None, *, finetune: bool) -> None:
    """Set this run's folders of checkpoints; with `finetune` every start begins at step 0."""
    global _checkpoints
    _checkpoints = None
    if load and save and not finetune and os.path.realpath(load) == os.path.realpath(save):
        _checkpoints = os.path.realpath(save)


def is_of_this_run(recording: Path) -> bool:
    """Return whether the recording's mark has a sign of this process's run."""
    try:
        content = read_bytes(_mark_of(recording), _MAX_BYTES)
    except (OSError, ValueError):
        return False
    return not _signs().isdisjoint(content.decode(errors="replace").split())


def mark(recording: Path) -> None:
    """Mark a recording as written by this process's run, replacing an earlier run's mark."""
    signs, path = _signs(), _mark_of(recording)
    if signs:
        content = "".join(f"{sign}\n" for sign in sorted(signs))
        # A link there is of no run, and may lead to any file.
        write_file(path, content, through_links=False)
    else:
        path.unlink(missing_ok=True)


def _mark_of(recording: Path) -> Path:
    return recording.with_name(f".{recording.name}.run")


def _signs() -> set[str]:
    """Return this run's signs as digests, since recordings are passed on and paths are private."""
    found = []
    if _checkpoints is not None:
        found.append(f"checkpoints {_checkpoints}")
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    if launch is not None:
        with contextlib.suppress(OSError):  # no Linux, or a hidden /proc
            found.append(f"launcher {_process(os.getppid())} {launch}")
    return {hashlib.sha256(os.fsencode(sign)).hexdigest() for sign in found}


def _process(pid: int) -> str:
    """Return a name of a process that no other on this machine, earlier or later, has."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # The program's name, in brackets, may have blanks; the start time is the 22nd field.
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{boot} {pid} {start}"
