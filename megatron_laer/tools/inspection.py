"""`inspect` describes a checkpoint from its metadata alone.

It needs no ranks and no device, and loads no tensor. Torch's list of tensors is a pickle, which
`inert_pickle` reads without running code in it. Names are printed escaped.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_laer.files.checks import one_line, open_input, quoted, read_bytes, read_text
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.state import PlannerState
from megatron_laer.tools import inert_pickle
from megatron_laer.tools.inert_pickle import Name, PickledObject

# Limit on a list of tensors, which needs some hundred bytes for each piece that a rank has saved.
_MAX_LIST_BYTES = 2**28
_MAX_SIZE = 2**63 - 1
_MAX_AXES = 64

_TRACKER = "latest_checkpointed_iteration.txt"
_EXPERTS = ".mlp.experts.experts.linear_fc"
# Dimensions of the tensors with all experts, by the last part of their names.
_DIMENSIONS_OF_EXPERTS = {"weight": 3, "bias": 2}
_OPTIMIZER = "optimizer."

# Classes in torch's list of tensors, and torch's names for types. None of them is imported, and a
# list with any other name is refused.
_MODULES = (
    "torch",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_NAMES = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"dict", "list", "set", "tuple"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint's metadata."""

    shape: tuple[int, ...]
    dtype: str
    item_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def describe(path: str | Path) -> str:
    """Describe the checkpoint at `path`, a run's directory or one iteration's.

    Raises ValueError without an intact checkpoint; a damaged planner's state is only described.
    """
    folder = _find(Path(path))
    config = _json(folder / "metadata.json")
    tensors = _tensors(folder / ".metadata")
    lines = [f"checkpoint       {one_line(folder)}", f"format           {_format(config)}"]
    lines += _model(tensors)
    lines += _optimizer(tensors)
    lines += _planner(folder)
    return "\n".join(lines)


def _find(path: Path) -> Path:
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
    text = read_text(tracker).strip()
    if text != "release" and not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(f"{tracker} holds {quoted(text, 40)}, expected an iteration")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not (folder / "metadata.json").is_file():
        raise ValueError(
            f"{tracker} names {folder.name}, which has no metadata.json: it is missing, "
            "incomplete, or not of the format torch_dist"
        )
    return folder


def _json(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON: nested too deeply") from error
    except ValueError as error:
        # Python's limit on digits is no JSONDecodeError; its message names a Python function.
        problem = error if isinstance(error, json.JSONDecodeError) else "a number is too long"
        raise ValueError(f"{path} is not JSON: {problem}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _format(config: Mapping[str, Any]) -> str:
    backend = config.get("sharded_backend", "unknown")
    return one_line(f"{backend} {config.get('sharded_backend_version', '')}".strip(), 100)


def _tensors(path: Path) -> dict[str, Entry]:
    """Read every tensor by its global name, escaped."""
    content = read_bytes(path, _MAX_LIST_BYTES)
    try:
        metadata = inert_pickle.read(content, _is_torchs)
        found = _attribute(metadata, "state_dict_metadata")
        if not isinstance(found, dict):
            raise ValueError("its state_dict_metadata is no mapping")
        return {
            one_line(name): _entry(name, record)
            for name, record in found.items()
            if isinstance(record, PickledObject) and record.name.name == "TensorStorageMetadata"
        }
    except ValueError as error:
        raise ValueError(f"{path} is no list of tensors: {error}") from error


def _is_torchs(name: Name) -> bool:
    is_plain = "." not in name.name
    return is_plain and (name.module in _MODULES or name.name in _NAMES.get(name.module, ()))


def _entry(name: str, record: PickledObject) -> Entry:
    size, properties = _attribute(record, "size"), _attribute(record, "properties")
    shape = size.arguments[0] if isinstance(size, PickledObject) and size.arguments else None
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_AXES
        or any(type(length) is not int or not 0 <= length <= _MAX_SIZE for length in shape)
    ):
        raise ValueError(
            f"tensor {quoted(name)} has the size {reprlib.repr(shape)}, expected integers in "
            f"0..{_MAX_SIZE}"
        )
    # Properties pickle themselves as a tuple that starts with the type.
    state = properties.state if isinstance(properties, PickledObject) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, Name) or dtype.module != "torch":
        raise ValueError(f"tensor {quoted(name)} has no type of torch's")
    return Entry(shape, dtype.name, _item_bytes(dtype.name))


def _attribute(record: Any, name: str) -> Any:
    state = record.state if isinstance(record, PickledObject) else None
    if not isinstance(state, dict) or name not in state:
        raise ValueError(f"it has no {name} where one belongs")
    return state[name]


@cache
def _item_bytes(dtype: str) -> int:
    import torch

    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no type {quoted(dtype)}")
    return found.itemsize


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
        dimensions = _DIMENSIONS_OF_EXPERTS.get(name.rpartition(".")[2])
        if _EXPERTS in name and dimensions is not None and len(entry.shape) >= dimensions:
            axes, (experts, *sizes) = entry.shape[:-dimensions], entry.shape[-dimensions:]
            layers = f"{axes[0]} layers, " if axes else ""
            of_one = " x ".join(map(str, sizes))
            yield f"experts          {name}: {layers}{experts} experts of {of_one}"


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


def _planner(folder: Path) -> Iterator[str]:
    from megatron_laer.runtime.planning.planner_checkpoint import FOLDER

    files = sorted((folder / FOLDER).glob("group-*.bin"), key=lambda file: (len(file.name), file))
    if not files:
        yield "planner          no state: a run that loads this plans anew, from the static layout"
    for file in files:
        name = one_line(file.stem.replace("-", " "), 100)
        try:
            with open_input(file) as content:
                state = PlannerState.from_file(content)
        except (ValueError, OSError) as error:
            yield one_line(f"planner, {name}: {error}")
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
            empty = layout.to_list().count(EMPTY)
            unused = f"; {empty} of {layout.num_slots} slots empty" if empty else ""
            yield f"  {one_line(layer)}: replicas per expert {replicas}{unused}"
