"""Header of a planner's state in a checkpoint: its sizes and flags, as JSON with checked types.

`state` has the format. Nothing here reads or makes the arrays behind the header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_laer.planner.forecast import WINDOW
from megatron_laer.planner.layout import check_shape

MAGIC = b"FSEPPLAN"
FORMAT = 1
PREFIX = struct.Struct("<8sII")
SLOT, LEVEL = np.dtype("<i2"), np.dtype("<i8")

_KEYS = {
    "num_ranks": int,
    "capacity": int,
    "num_experts": int,
    "next_step": int,
    "version": int,
    "layers": list,
    "kept": list,
    "errors": list,
    "plans": list,
}
_PLAN_KEYS = {"source_step": int, "plan_ms": float}

_MAX_LAYERS = 2**16
_MAX_NAME = 200
# Far above the header of _MAX_LAYERS layers with long names.
_MAX_HEADER_BYTES = 2**26
MAX_STEP = 2**62


def header_length(data: bytes) -> int:
    if len(data) < PREFIX.size:
        raise ValueError(f"has {len(data)} bytes, a planner's state has at least {PREFIX.size}")
    magic, number, length = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"is no planner's state: begins with {magic!r}, not {MAGIC!r}")
    if number != FORMAT:
        raise ValueError(f"has format {number}, this version reads format {FORMAT}")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length} bytes, at most {_MAX_HEADER_BYTES} are read")
    return int(length)


def read_header(text: bytes) -> dict[str, Any]:
    """Return the header with checked types; errors are None for the paper's forecasts."""
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("has a header that is nested too deeply") from error
    except ValueError as error:
        raise ValueError("is damaged: its header must be JSON") from error
    _check_types("header", header, _KEYS)
    check_names(header["layers"])
    if len(header["kept"]) != len(header["layers"]) or not all(
        type(kept) is int and 0 <= kept <= WINDOW for kept in header["kept"]
    ):
        raise ValueError(f"kept must be a list of integers in 0..{WINDOW}, one per layer")
    if len(header["errors"]) != len(header["layers"]) or not all(
        errors is None
        or (isinstance(errors, list) and [type(error) for error in errors] == [int, int])
        for errors in header["errors"]
    ):
        raise ValueError("errors must be a list of two integers or null, one per layer")
    for plan in header["plans"]:
        _check_types("plan", plan, _PLAN_KEYS)
    checked: dict[str, Any] = header
    return checked


def header_shape(header: dict[str, Any]) -> tuple[int, int, int]:
    shape = header["num_ranks"], header["capacity"], header["num_experts"]
    check_shape(*shape)
    return shape


def payload_bytes(header: dict[str, Any]) -> int:
    """Return the size of the arrays: layouts and forecasts."""
    num_ranks, capacity, num_experts = header_shape(header)
    num_layouts = len(header["layers"]) * (1 + len(header["plans"]))
    slots_bytes = num_ranks * capacity * SLOT.itemsize
    levels_bytes = int(sum(header["kept"])) * num_ranks * num_experts * LEVEL.itemsize
    return num_layouts * slots_bytes + levels_bytes


def _check_types(what: str, found: object, wanted: dict[str, type]) -> None:
    """Require exactly these keys with exactly these types (a bool is not an int)."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must have {_types_text(wanted)}, got a {type(found).__name__}")
    types = {key: type(value) for key, value in found.items()}
    if types != wanted:
        raise ValueError(f"{what} must have {_types_text(wanted)}, got {_types_text(types)}")


def check_names(names: Sequence[object]) -> None:
    if not all(isinstance(name, str) and 1 <= len(name) <= _MAX_NAME for name in names):
        raise ValueError(f"layer names must be texts of 1 to {_MAX_NAME} characters")
    if not 1 <= len(names) <= _MAX_LAYERS or len(set(names)) != len(names):
        raise ValueError(f"layers must be 1 to {_MAX_LAYERS} different names, got {len(names)}")


def check_range(what: str, number: int, highest: int) -> None:
    if not 0 <= number <= highest:
        raise ValueError(f"{what} must be in 0..{highest}, got {number}")


def _types_text(wanted: dict[str, type]) -> str:
    return ", ".join(f"{key} ({kind.__name__})" for key, kind in wanted.items())
