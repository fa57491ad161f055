"""Stock runs of parity rows, each made once and kept on disk under a digest of its causes.

A record depends on Megatron, torch, the processor, the data, the command line, and on this
project's files in `SOURCES`, but not on FSEP. `pytest --cache-clear` forgets all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Adapt, Record
from tests.documents import ROOT
from tests.parity.replay import train_row

# Files and folders with this project's code in a stock run, but for definitions of FSEP's flags.
SOURCES = (
    "pretrain_gpt.py",
    "megatron_laer/cpu",
    "megatron_laer/device.py",
    "megatron_laer/environment.py",
    "megatron_laer/launch.py",
    "megatron_laer/plugin",
    "tests/delayed_weights.py",
    "tests/doubles",
    "tests/parity/adapted.py",
    "tests/parity/bridge_lora.py",
    "tests/parity/replay.py",
    "tests/specs",
    "tests/te_fp8.py",
)
# Environment variables that choose how torch computes.
_VARIABLES = ("OMP_", "MKL_", "ATEN_", "TORCH_", "DNNL_", "ONEDNN_", "TRITON_")
# Kept folders of records: those of two releases of Megatron, before and after a change.
_MOST_FOLDERS = 4
_DATA = "DATA"


class StockRuns:
    """Stock runs on the session's ranks: `runs(4, flags, adapt)` returns a record."""

    def __init__(self, ranks: RankPools, data: str, folder: Path) -> None:
        self.made = 0
        self._ranks, self._data = ranks, data
        text = [Path(f"{data}{suffix}") for suffix in (".bin", ".idx")]
        causes = [*environment(), *_contents(text, Path(data).parent)]
        self._folder = folder / digest_of(causes)
        self._records: dict[str, Record] = {}
        _forget_old(folder, keep=self._folder)

    def __call__(self, size: int, flags: list[str], adapt: Adapt | None) -> Record:
        words = [_DATA if word == self._data else word for word in flags]
        named = "" if adapt is None else f"{adapt.__module__}.{adapt.__qualname__}"
        key = digest_of([str(size), named, *words])
        if key not in self._records:
            path = self._folder / key
            if not path.exists():
                record = self._ranks(size).run(train_row, flags, None, adapt)[0]
                self.made += 1
                # A rename leaves no record that ends early.
                written = path.with_name(f"{key}.{os.getpid()}")
                written.write_bytes(pickle.dumps(record))
                written.replace(path)
            self._records[key] = pickle.loads(path.read_bytes())
        return self._records[key]


def digest_of(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)} {part}".encode())
    return found.hexdigest()


def environment(variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return all that a stock run depends on, but for its data and its command line."""
    return [
        sys.version,
        torch.__version__,
        np.__version__,
        *processor(),
        *(f"{name}={variables[name]}" for name in sorted(variables) if name.startswith(_VARIABLES)),
        *_sources(),
    ]


@cache
def _sources() -> tuple[str, ...]:
    import megatron.core

    (megatron_folder,) = {Path(megatron.core.__file__).parents[1]}
    ours = [path for name in SOURCES for path in files_of(ROOT / name)]
    return (*_contents(ours, ROOT), *_contents(files_of(megatron_folder), megatron_folder))


def files_of(path: Path) -> list[Path]:
    """Return the code in a folder, or this file."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in (".py", ".so", ".cpp"))


def _contents(files: Iterable[Path], root: Path) -> Iterator[str]:
    for file in files:
        yield f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def processor() -> list[str]:
    """Return the processor's kind: torch chooses its kernels by what that can do."""
    kinds = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kinds += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return kinds


def _forget_old(folder: Path, keep: Path) -> None:
    """Keep the folders that were used last, this one among them."""
    keep.mkdir(parents=True, exist_ok=True)
    os.utime(keep)
    used = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in used[_MOST_FOLDERS:]:
        shutil.rmtree(path, ignore_errors=True)
