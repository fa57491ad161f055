"""Cluster files: YAML with a cluster's hardware constants, and the same content as JSON.

The keys are the fields of the classes in `clusters`, whose annotations decide how a value is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.yaml_text import parse_yaml, read_yaml
from megatron_laer.planner.clusters import BackEnd, Cluster, Figure
from megatron_laer.planner.gemm_curve import GemmCurve

# Limits of constants in files: far beyond any machine, and far from where sums of times overflow.
_LEAST_RATE, _MOST_RATE = 1.0, 1e24
_MOST_SECONDS, _MOST_FACTOR, _MOST_COUNT = 3600.0, 1e6, 2**20


def load_cluster(path_or_name: str | Path) -> Cluster:
    """Read a cluster's constants from a YAML file, by its path or the name of a shipped one.

    An unknown name, or content that does not fit, is a ValueError.
    """
    path = yaml_file("cluster", path_or_name)
    content = read_yaml(path)
    try:
        return _cluster(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_cluster(text: str) -> Cluster:
    return _cluster(parse_yaml(text))


def cluster_text(cluster: Cluster) -> str:
    """Return a cluster as YAML text, for `parse_cluster`."""
    text: str = yaml.dump(
        _plain(cluster), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110
    )
    return text


def cluster_content(cluster: Cluster) -> dict[str, Any]:
    """Return a cluster as values for JSON, under the keys of its YAML file."""
    content: dict[str, Any] = _plain(cluster)
    return content


def cluster_of(content: object, where: str) -> Cluster:
    """Return the cluster of `cluster_content`, with the checks of a YAML file."""
    try:
        text = json.dumps(content)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be a cluster") from error
    # With numbers as texts, as the YAML reader returns them.
    return _cluster(json.loads(text, parse_int=str, parse_float=str, parse_constant=str), where)


# Reading.


def _cluster(content: object, where: str = "") -> Cluster:
    return cast(Cluster, _instance(Cluster, content, where))


def _instance(make: Any, content: object, where: str, **given: object) -> object:
    """Return an instance of a dataclass from a mapping of its fields, except those given."""
    values = _mapping(content, where)
    fields = [field for field in dataclasses.fields(make) if field.name not in given]
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    optional = [field.name for field in fields if field.name not in needed]
    missing = [key for key in needed if key not in values]
    unknown = [key for key in values if key not in (*needed, *optional)]
    if missing or unknown:
        lacks = f"lacks the keys {missing}" if missing else ""
        has = f"has the unknown keys {reprlib.repr(unknown)}" if unknown else ""
        raise ValueError(
            f"{where or 'the file'} {' and '.join(filter(None, (lacks, has)))}; expected exactly "
            f"{needed}{f', and possibly {optional}' if optional else ''}"
        )
    types = get_type_hints(make)
    read = {
        key: _read(types[key], key, values[key], _place(where, key))
        for key in (*needed, *optional)
        if key in values
    }
    return _made(lambda: make(**given, **read), where)


def _read(kind: Any, name: str, value: object, where: str) -> object:
    if isinstance(kind, UnionType):
        (kind,) = (member for member in get_args(kind) if member is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(_items(get_args(kind)[0], value, where))
    if kind is str:
        return _text(value, where)
    if kind is int:
        return _count(value, where)
    if kind is float:
        return _limited(name, value, where)
    if kind is GemmCurve:
        points = [
            (_count(tokens, f"{place} tokens"), _limited("flops_per_s", speed, place))
            for place, (tokens, speed) in _points(value, where)
        ]
        return _made(lambda: GemmCurve(tuple(points)), where)
    if kind is Figure:
        numbers = _list(value, 3, where, "a figure [median, low, high]")
        return Figure(*(_number(number, where) for number in numbers))
    return _instance(kind, value, where)


def _items(kind: Any, content: object, where: str) -> Iterator[object]:
    """Yield the items of a mapping with free keys: back ends, or pairs of a name and a value."""
    for key, value in _mapping(content, where).items():
        if kind is BackEnd:
            yield _instance(BackEnd, value, _place(where, key), name=key)
        else:
            yield key, _read(get_args(kind)[1], key, value, _place(where, key))


def _points(value: object, where: str) -> Iterator[tuple[str, Sequence[object]]]:
    for number, point in enumerate(_list(value, None, where, "a list of points [tokens, FLOP/s]")):
        place = f"{where}[{number}]"
        yield place, _list(point, 2, place, "a point [tokens, FLOP/s]")


def _mapping(content: object, where: str) -> Mapping[str, object]:
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{where or 'the file'} holds {reprlib.repr(content)}, expected a mapping of keys"
        )
    return content


def _list(value: object, length: int | None, where: str, what: str) -> Sequence[object]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{where} must be {what}, got {reprlib.repr(value)}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be a text that is not empty, got {reprlib.repr(value)}")
    return value


def _count(value: object, where: str) -> int:
    # Not int(), which also accepts blanks, underscores and digits of other scripts.
    is_number = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19
    if not is_number or not 1 <= int(cast(str, value)) <= _MOST_COUNT:
        limits = f"an integer in 1..{_MOST_COUNT}"
        raise ValueError(f"{where} must be {limits}, got {reprlib.repr(value)}")
    return int(cast(str, value))


def _number(value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, str) and "_" not in value else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a number like 2.37e+14, got {reprlib.repr(value)}")
    return number


def _limited(name: str, value: object, where: str) -> float:
    """Return a number within the limits of its field: a rate, seconds, a spread's end or a factor.

    The classes refuse numbers that are not positive.
    """
    number = _number(value, where)
    if name.endswith("s_per_s"):
        if 0 < number < _LEAST_RATE or number > _MOST_RATE:
            limits = f"in {_LEAST_RATE:g}..{_MOST_RATE:g} per second"
            raise ValueError(f"{where} must be {limits}, got {reprlib.repr(value)}")
        return number
    most, unit = _MOST_FACTOR, ""
    if name.endswith("_s"):
        most, unit = _MOST_SECONDS, " s"
    elif name in ("low", "high"):
        most = _MOST_RATE
    if number > most:
        raise ValueError(f"{where} must be at most {most:g}{unit}, got {reprlib.repr(value)}")
    return number


def _made[T](make: Callable[[], T], where: str) -> T:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _place(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


# Writing.


def _plain(value: Any) -> Any:
    """Return a value as mappings, lists, texts and numbers, for YAML and JSON."""
    if isinstance(value, GemmCurve):
        return [list(point) for point in value.points]
    if isinstance(value, Figure):
        return [value.median, value.low, value.high]
    if dataclasses.is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, BackEnd):
            del held["name"]
        return {name: _plain(one) for name, one in held.items() if one is not None and one != ()}
    if isinstance(value, tuple):  # back ends, or pairs of a name and a value
        pairs = ((item.name, item) if isinstance(item, BackEnd) else item for item in value)
        return {name: _plain(one) for name, one in pairs}
    # torch's version is a subclass of str, which YAML does not write.
    return str(value) if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """YAML writer with short numbers and without aliases, which `parse_yaml` refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    is_short = value == 0.0 or 1e-3 <= value < 1e5
    text = repr(value) if is_short else np.format_float_scientific(value, trim="0", exp_digits=2)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)
