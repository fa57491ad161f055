"""`python -m megatron_laer inspect`: what a checkpoint holds, told from its metadata.

Needs no ranks and no device, and loads no tensor. Torch keeps the list of tensors as a pickle; it
is read with the few classes such a list is made of, so that looking at a checkpoint runs no code
that somebody put into it.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.planner.state import PlannerState

_TRACKER = "latest_checkpointed_iteration.txt"
_EXPERTS = ".mlp.experts.experts.linear_fc"
_OPTIMIZER = "optimizer."

# What torch's list of tensors is made of: plain records, and torch's names for types.
_ALLOWED: dict[str, set[str] | None] = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.planner": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "builtins": {"dict", "list", "set", "tuple"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


@dataclass(frozen=True)
class Entry:
    """One tensor as the checkpoint's metadata describes it."""

    shape: tuple[int, ...]
    dtype: str
    item_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape, dtype=np.int64))


def describe(path: str | Path) -> str:
    """A report on the checkpoint at `path`, which is a run's directory or one iteration's.

    Raises:
        ValueError: no checkpoint, or a damaged one; a planner's state that is damaged is part of
            the report.
    """
    folder = _find(Path(path))
    config = _json(folder / "metadata.json")
    tensors = _tensors(folder / ".metadata")
    lines = [f"checkpoint       {folder}", f"format           {_format(config)}"]
    lines += _model(tensors)
    lines += _optimizer(tensors)
    lines += _planner(folder)
    return "\n".join(lines)


# Finding it.


def _find(path: Path) -> Path:
    """The directory of one iteration."""
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give a checkpoint's, or that of a run")
    tracker = path / _TRACKER
    if not tracker.is_file():
        if (path / "metadata.json").is_file():
            return path
        raise ValueError(
            f"{path} is no checkpoint: it holds neither {_TRACKER} (a run that saved one) nor "
            "metadata.json (a complete torch_dist checkpoint)"
        )
    text = _text(tracker).strip()
    if text != "release" and not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(f"{tracker} holds {text[:40]!r}, expected an iteration")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not (folder / "metadata.json").is_file():
        raise ValueError(
            f"{tracker} names {folder.name}, which has no metadata.json: it is missing, "
            "incomplete, or not of the format torch_dist"
        )
    return folder


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _format(config: Mapping[str, Any]) -> str:
    backend = config.get("sharded_backend", "unknown")
    return f"{backend} {config.get('sharded_backend_version', '')}".strip()


# Tensors.


class _Unpickler(pickle.Unpickler):
    """Makes records of torch's list of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        allowed = _ALLOWED.get(module, set())
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and allowed is not None and name not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        found = super().find_class(module, name)
        is_torchs = getattr(found, "__module__", "").startswith("torch.distributed.checkpoint")
        if allowed is None and not (isinstance(found, type) and is_torchs):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return found


def _tensors(path: Path) -> dict[str, Entry]:
    """Every tensor by its global name."""
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        found = metadata.state_dict_metadata
        return {
            str(name): Entry(
                tuple(int(size) for size in entry.size),
                str(entry.properties.dtype).removeprefix("torch."),
                entry.properties.dtype.itemsize,
            )
            for name, entry in found.items()
            if hasattr(entry, "properties")
        }
    except Exception as error:  # damaged pickles raise whatever they like
        raise ValueError(f"{path} is no list of tensors: {error!r}") from error


def _model(tensors: Mapping[str, Entry]) -> Iterator[str]:
    weights = {name: entry for name, entry in tensors.items() if not _is_optimizers(name)}
    total = sum(entry.elements for entry in weights.values())
    size = sum(entry.elements * entry.item_bytes for entry in weights.values())
    types = sorted({entry.dtype for entry in weights.values()})
    yield (
        f"weights          {len(weights)} tensors, {total:,} elements, {size:,} bytes "
        f"({', '.join(types)})"
    )
    embedding = weights.get("embedding.word_embeddings.weight")
    if embedding is not None and len(embedding.shape) == 2:
        yield f"embedding        vocabulary {embedding.shape[0]}, hidden {embedding.shape[1]}"
    for name, entry in sorted(weights.items()):
        if _EXPERTS in name and name.endswith(".weight") and len(entry.shape) >= 3:
            *axes, experts, rows, columns = entry.shape
            layers = f"{axes[0]} layers, " if axes else ""
            yield f"experts          {name}: {layers}{experts} experts of {rows} x {columns}"


def _optimizer(tensors: Mapping[str, Entry]) -> Iterator[str]:
    state = {name: entry for name, entry in tensors.items() if _is_optimizers(name)}
    if not state:
        yield "optimizer        no state"
        return
    size = sum(entry.elements * entry.item_bytes for entry in state.values())
    kinds = {name.split(".")[2] for name in state if name.startswith("optimizer.state.")}
    yield f"optimizer        {len(state)} tensors, {size:,} bytes ({', '.join(sorted(kinds))})"


def _is_optimizers(name: str) -> bool:
    return name.startswith((_OPTIMIZER, "chained_"))


# The planner.


def _planner(folder: Path) -> Iterator[str]:
    from megatron_laer.runtime.planner_checkpoint import FOLDER, read_state

    files = sorted((folder / FOLDER).glob("group-*.bin"), key=lambda file: (len(file.name), file))
    if not files:
        yield "planner          no state: a run that loads this plans anew, from the static layout"
    for file in files:
        name = file.stem.replace("-", " ")
        try:
            state = PlannerState.from_bytes(read_state(str(file)))
        except (ValueError, OSError) as error:
            yield f"planner, {name}: {error}"
            continue
        num_ranks, capacity, num_experts = state.shape
        plans = ", ".join(str(plan.source_step) for plan in state.plans) or "none"
        yield (
            f"planner, {name}: N = {num_ranks} ranks, C = {capacity} slots, E = {num_experts} "
            f"experts; goes on with step {state.next_step}, layout version {state.version}, "
            f"plans not in force yet from steps {plans}"
        )
        for layer, layout in zip(state.layers, state.layouts, strict=True):
            replicas = " ".join(map(str, layout.replicas_E.tolist()))
            yield f"  {layer}: replicas per expert {replicas}"
