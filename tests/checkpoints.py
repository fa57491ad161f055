"""Content of checkpoints on disk, read without ranks."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_laer.cpu.weights import Tensors
from tests.releases import installed_release

# Megatron's default writer of async saves from release 0.19 on.
NEEDS_NVRX = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_resiliency_ext") is None or installed_release() == "0.18",
    reason="needs nvidia-resiliency-ext 0.6 or newer, which has wheels for Python 3.10 to 3.12",
)


def iteration_folder(directory: Path, iteration: int) -> Path:
    return directory / f"iter_{iteration:07d}"


def saved_iteration(directory: Path) -> int:
    return int((directory / "latest_checkpointed_iteration.txt").read_text())


def saved_tensors(folder: Path) -> Tensors:
    """Return every tensor of a checkpoint, whole, by its global name; AssertionError for a gap."""
    reader = torch_checkpoint.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # about the missing process group
        torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    for name, tensor in tensors.items():
        assert not tensor.isnan().any(), f"shards of {name} leave gaps"
    return tensors


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
