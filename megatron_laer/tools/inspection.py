"""`inspect` describes a checkpoint from its metadata alone.

It needs no ranks and no device, and loads no tensor. Names are printed escaped.

Torch's list of tensors is a pickle of a newer protocol than `torch.load` reads with `weights_only`.
So Python's own unpickler reads it, and looks up torch's descriptions of tensors alone.
"""

from __future__ import annotations

import gc
import io
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_laer.files.checks import one_line, open_input, quoted, read_bytes, read_text
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.state import PlannerState

# Limit on a list of tensors, which needs some hundred bytes for each piece that a rank has saved.
_MAX_LIST_BYTES = 2**28
# Maximum groups whose planner's state is described, of whole and of damaged ones.
_MOST_GROUPS = 8

_TRACKER = "latest_checkpointed_iteration.txt"
_EXPERTS = ".mlp.experts.experts.linear_fc"
# Dimensions of the tensors with all experts, by the last part of their names.
_DIMENSIONS_OF_EXPERTS = {"weight": 3, "bias": 2}

# Shapes and types of tensors by their global names, escaped.
_Tensors = Mapping[str, tuple[torch.Size, torch.dtype]]

# Names in torch's list of tensors, next to those of types; calls of these have no effect elsewhere.
_ALLOWED = {
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "torch.serialization": {"_get_layout"},
}


def describe(path: str | Path) -> tuple[str, bool]:
    """Describe the checkpoint at `path`, a run's directory or one iteration's.

    Also return whether a planner's state is damaged. Raises ValueError without an intact list of
    tensors.
    """
    folder = _find(Path(path))
    tensors = _tensors(folder / ".metadata")
    of_planner, is_damaged = _planner(folder)
    name = f"checkpoint       {one_line(folder)}"
    return "\n".join([name, *_model(tensors), *_optimizer(tensors), *of_planner]), is_damaged


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


class _ListUnpickler(pickle.Unpickler):
    """Unpickler that builds torch's descriptions of tensors, and refuses any other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local"):  # the folder that was written to
            return lambda *parts: parts
        if name in _ALLOWED.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise ValueError(f"it asks for {module}.{name}")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _tensors(path: Path) -> _Tensors:
    content = read_bytes(path, _MAX_LIST_BYTES)
    collects = gc.isenabled()
    # Collections would take three quarters of the time, for objects that all stay.
    gc.disable()
    try:
        found = _ListUnpickler(io.BytesIO(content)).load()
        records = getattr(found, "state_dict_metadata", None)
        if not isinstance(records, dict):
            raise ValueError("it has no state_dict_metadata where one belongs")
        return {
            one_line(name): _shape_and_type(record)
            for name, record in records.items()
            if isinstance(record, TensorStorageMetadata)
        }
    # An unpickler raises many exceptions for damaged content.
    except Exception as error:
        problem = one_line(error, 200) or type(error).__name__
        raise ValueError(f"{path} is no list of tensors: {problem}") from error
    finally:
        if collects:
            gc.enable()


def _shape_and_type(record: TensorStorageMetadata) -> tuple[torch.Size, torch.dtype]:
    shape, dtype = torch.Size(record.size), record.properties.dtype
    if min(shape, default=0) < 0 or not isinstance(dtype, torch.dtype):
        found = f"the size {quoted(tuple(shape))} and the type {quoted(dtype)}"
        raise ValueError(f"a tensor has {found}, expected those of torch")
    return shape, dtype


def _model(tensors: _Tensors) -> Iterator[str]:
    weights = {name: found for name, found in tensors.items() if not _is_optimizers(name)}
    total = sum(math.prod(shape) for shape, _ in weights.values())
    types = sorted({str(dtype).removeprefix("torch.") for _, dtype in weights.values()})
    yield (
        f"weights          {len(weights)} tensors, {total:,} elements, "
        f"{_bytes(weights):,} bytes ({', '.join(types)})"
    )
    embedding = weights.get("embedding.word_embeddings.weight")
    if embedding is not None and len(embedding[0]) == 2:
        vocabulary, hidden = embedding[0]
        yield f"embedding        vocabulary {vocabulary}, hidden {hidden}"
    for name, (shape, _) in sorted(weights.items()):
        dimensions = _DIMENSIONS_OF_EXPERTS.get(name.rpartition(".")[2])
        if _EXPERTS in name and dimensions is not None and len(shape) >= dimensions:
            axes, (experts, *sizes) = shape[:-dimensions], shape[-dimensions:]
            layers = f"{axes[0]} layers, " if axes else ""
            of_one = " x ".join(map(str, sizes))
            yield f"experts          {name}: {layers}{experts} experts of {of_one}"


def _optimizer(tensors: _Tensors) -> Iterator[str]:
    state = {name: found for name, found in tensors.items() if _is_optimizers(name)}
    if not state:
        yield "optimizer        no state"
        return
    kinds = {name.split(".")[2] for name in state if name.startswith("optimizer.state.")}
    named = ", ".join(sorted(kinds))
    yield f"optimizer        {len(state)} tensors, {_bytes(state):,} bytes ({named})"


def _bytes(tensors: _Tensors) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())


def _is_optimizers(name: str) -> bool:
    return name.startswith(("optimizer.", "chained_"))


def _planner(folder: Path) -> tuple[list[str], bool]:
    """Describe the planner's state of some groups, and return whether any group's is damaged."""
    from megatron_laer.runtime.planning.planner_checkpoint import FOLDER

    files = sorted((folder / FOLDER).glob("group-*.bin"), key=lambda file: (len(file.name), file))
    lines: list[str] = []
    number = {"whole": 0, "damaged": 0}
    if not files:
        lines.append(
            "planner          no state: a run that loads this plans anew, from the static layout"
        )
    for file in files:
        name, kind = one_line(file.stem.replace("-", " "), 100), "whole"
        try:
            with open_input(file) as content:
                found = [*_state(name, PlannerState.from_file(content))]
        except (ValueError, OSError) as error:
            found, kind = [one_line(f"planner, {name}: {error}")], "damaged"
        number[kind] += 1
        if number[kind] <= _MOST_GROUPS:
            lines += found
    lines += [
        f"planner          {count - _MOST_GROUPS} more groups with a {kind} state"
        for kind, count in number.items()
        if count > _MOST_GROUPS
    ]
    return lines, number["damaged"] > 0


def _state(name: str, state: PlannerState) -> Iterator[str]:
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
