"""A cluster's hardware constants are read from its YAML file here, and written to one.

Recordings of metrics hold the same content as JSON. `clusters` has the values. Nothing here
measures.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.yaml_text import parse_yaml, read_yaml
from megatron_laer.planner.clusters import (
    BackEnd,
    Cluster,
    Contention,
    Figure,
    HostTime,
    Link,
    SolveTime,
    Spread,
)
from megatron_laer.planner.gemm_curve import GemmCurve

# Of constants in files: far beyond any machine, and far from where sums of times overflow.
_LEAST_RATE, _MOST_RATE = 1.0, 1e24
_MOST_SECONDS, _MOST_FACTOR = 3600.0, 1e6
# Characters of a line of text in a file that is written.
_WIDTH = 110
# A text that needs no quotes.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def load_cluster(path_or_name: str | Path) -> Cluster:
    """Read a cluster's constants, by path to a YAML file or by the name of one we ship.

    Raises:
        ValueError: an unknown name, or a file whose content does not fit; the message says what
            would.
        OSError: a path that cannot be read.
    """
    path = yaml_file("cluster", path_or_name)
    content = read_yaml(path)
    try:
        return _cluster(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_cluster(text: str) -> Cluster:
    """Make a cluster from the text of its YAML file.

    Raises:
        ValueError: whatever is wrong with it.
    """
    return _cluster(parse_yaml(text))


def cluster_text(cluster: Cluster) -> str:
    """Write a cluster as the text of a YAML file, of which `parse_cluster` makes it again."""
    return "\n".join(_lines(_plain(cluster), "")) + "\n"


def cluster_content(cluster: Cluster) -> dict[str, Any]:
    """Return a cluster as JSON can hold it, under the keys of its YAML file."""
    content: dict[str, Any] = _plain(cluster)
    return content


def cluster_of(content: object, where: str) -> Cluster:
    """Make a cluster of `cluster_content` again, with the checks of a YAML file.

    Args:
        where: the content lies, for messages.

    Raises:
        ValueError: whatever is wrong with it.
    """
    try:
        text = json.dumps(content)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be a cluster") from error
    # With its numbers as texts, as YAML is read.
    return _cluster(json.loads(text, parse_int=str, parse_float=str, parse_constant=str), where)


# Reading.


def _cluster(content: object, where: str = "") -> Cluster:
    return _Fields(content, where).build(
        Cluster,
        {
            "backward_gemm_factor": _factor,
            "host": _host,
            "contention": _contention,
            "memory_bytes_per_s": _rate,
            "back_ends": _back_ends,
            "spreads": _spreads,
            "figures": _figures,
            "measured": _measured,
        },
        name=_text,
        source=_text,
        assumed=_text,
        nodes=_count,
        ranks_per_node=_count,
        gemm=_gemm,
        intra=_link,
        inter=_link,
        solve=_solve,
    )


class _Fields:
    """Reads a mapping of a YAML file key by key, with errors that say where.

    Raises:
        ValueError: not a mapping.
    """

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{where or 'the file'} holds {_quote(content)}, expected a mapping of keys"
            )
        self._content = content
        self._where = where

    def build[T](
        self,
        make: Callable[..., T],
        optional: Mapping[str, Callable[[object, str], Any]] | None = None,
        **readers: Callable[[object, str], Any],
    ) -> T:
        """Call `make` with one argument per key, each read by its reader.

        Args:
            optional: readers of keys that may be left out.

        Raises:
            ValueError: missing or unknown keys, or a value that does not fit.
        """
        optional = optional or {}
        missing = [key for key in readers if key not in self._content]
        unknown = [key for key in self._content if key not in (*readers, *optional)]
        if missing or unknown:
            also = f", and possibly {list(optional)}" if optional else ""
            lacks = f"lacks the keys {missing}" if missing else ""
            has = f"has the unknown keys {_quote(unknown)}" if unknown else ""
            raise ValueError(
                f"{self._where or 'the file'} {' and '.join(filter(None, (lacks, has)))}; "
                f"expected exactly {list(readers)}{also}"
            )
        values = {
            key: reader(self._content[key], self._place(key))
            for key, reader in (*readers.items(), *optional.items())
            if key in self._content
        }
        try:
            return make(**values)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}" if self._where else str(error)) from error

    def items[T](self, read: Callable[[object, str], T]) -> tuple[tuple[str, T], ...]:
        """Return all keys, whatever they are, with their values as `read` reads them."""
        return tuple((key, read(value, self._place(key))) for key, value in self._content.items())

    def _place(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be a text that is not empty, got {_quote(value)}")
    return value


def _count(value: object, where: str) -> int:
    # Not int(): that takes blanks, underscores and digits of other scripts too.
    if not isinstance(value, str) or not (value.isascii() and value.isdigit() and len(value) < 19):
        raise ValueError(f"{where} must be an integer of at least 1, got {_quote(value)}")
    if int(value) < 1:
        raise ValueError(f"{where} must be an integer of at least 1, got {_quote(value)}")
    return int(value)


def _number(value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, str) and "_" not in value else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a number like 2.37e+14, got {_quote(value)}")
    return number


def _rate(value: object, where: str) -> float:
    number = _number(value, where)
    # What is not positive is told by the classes, which take infinite rates as well.
    if 0 < number < _LEAST_RATE or number > _MOST_RATE:
        raise ValueError(
            f"{where} must be in {_LEAST_RATE:g}..{_MOST_RATE:g} per second, got {_quote(value)}"
        )
    return number


def _seconds(value: object, where: str) -> float:
    number = _number(value, where)
    if number > _MOST_SECONDS:
        raise ValueError(f"{where} must be at most {_MOST_SECONDS:g} s, got {_quote(value)}")
    return number


def _factor(value: object, where: str) -> float:
    number = _number(value, where)
    if number > _MOST_FACTOR:
        raise ValueError(f"{where} must be at most {_MOST_FACTOR:g}, got {_quote(value)}")
    return number


def _bound(value: object, where: str) -> float:
    """Read an end of a spread, of whatever constant: sums and products of such stay finite."""
    number = _number(value, where)
    if number > _MOST_RATE:
        raise ValueError(f"{where} must be at most {_MOST_RATE:g}, got {_quote(value)}")
    return number


def _gemm(value: object, where: str) -> GemmCurve:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where} must be a list of points [tokens, FLOP/s], got {_quote(value)}")
    points = []
    for number, point in enumerate(value):
        if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
            raise ValueError(
                f"{where}[{number}] must be a point [tokens, FLOP/s], got {_quote(point)}"
            )
        points.append(
            (_count(point[0], f"{where}[{number}] tokens"), _rate(point[1], f"{where}[{number}]"))
        )
    try:
        return GemmCurve(tuple(points))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _link(value: object, where: str) -> Link:
    return _Fields(value, where).build(
        Link, {"peer_s": _seconds}, bytes_per_s=_rate, latency_s=_seconds
    )


def _solve(value: object, where: str) -> SolveTime:
    return _Fields(value, where).build(
        SolveTime, base_s=_seconds, slot_s=_seconds, count_s=_seconds
    )


def _host(value: object, where: str) -> HostTime:
    return _Fields(value, where).build(HostTime, launch_s=_seconds, gate=_solve)


def _contention(value: object, where: str) -> Contention:
    return _Fields(value, where).build(Contention, gemm=_factor, exchange=_factor)


def _back_ends(value: object, where: str) -> tuple[BackEnd, ...]:
    def read(curves: object, place: str) -> Callable[[str], BackEnd]:
        def make(**curve: GemmCurve) -> Callable[[str], BackEnd]:
            return lambda name: BackEnd(name, **curve)

        return _Fields(curves, place).build(
            make, forward=_gemm, input_grad=_gemm, weight_grad=_gemm
        )

    return tuple(named(name) for name, named in _Fields(value, where).items(read))


def _spreads(value: object, where: str) -> tuple[tuple[str, Spread], ...]:
    def read(spread: object, place: str) -> Spread:
        return _Fields(spread, place).build(Spread, low=_bound, high=_bound, source=_text)

    return _Fields(value, where).items(read)


def _figures(value: object, where: str) -> tuple[tuple[str, Figure], ...]:
    def read(figure: object, place: str) -> Figure:
        if not isinstance(figure, Sequence) or isinstance(figure, str) or len(figure) != 3:
            raise ValueError(f"{place} must be a figure [median, low, high], got {_quote(figure)}")
        return Figure(*(_number(number, place) for number in figure))

    return _Fields(value, where).items(read)


def _measured(value: object, where: str) -> tuple[tuple[str, str], ...]:
    return _Fields(value, where).items(_text)


def _quote(value: object) -> str:
    """Quote a value for a message, cut short."""
    return reprlib.repr(value)


# Writing.


def _plain(value: Any) -> Any:
    """Return values as a YAML file has them: mappings, lists, texts and numbers."""
    if isinstance(value, GemmCurve):
        return [list(point) for point in value.points]
    if isinstance(value, Figure):
        return [value.median, value.low, value.high]
    if isinstance(value, BackEnd):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name != "name"
        }
    if dataclasses.is_dataclass(value):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(held) for name, held in fields if held is not None and held != ()}
    if isinstance(value, tuple):  # of back ends, or of pairs of a name and something
        pairs = ((item.name, item) if isinstance(item, BackEnd) else item for item in value)
        return {name: _plain(held) for name, held in pairs}
    return value


def _lines(content: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Yield the lines of a mapping; what holds nothing but short values is put on one line."""
    for key, value in content.items():
        start = f"{indent}{_scalar(key)}:"
        one_line = f"{start} {_flow(value)}"
        if isinstance(value, str) and len(one_line) > _WIDTH and _is_foldable(value):
            yield f"{start} >-"
            yield from textwrap.wrap(
                value,
                _WIDTH,
                initial_indent=f"{indent}  ",
                subsequent_indent=f"{indent}  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        elif isinstance(value, Mapping) and (
            len(one_line) > _WIDTH
            or any(isinstance(held, (Mapping, list)) for held in value.values())
        ):
            yield start
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list) and any(isinstance(item, list) for item in value):
            yield start
            yield from (f"{indent}  - {_flow(item)}" for item in value)
        else:
            yield one_line


def _is_foldable(text: str) -> bool:
    return text.isprintable() and text == " ".join(text.split())


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_scalar(key)}: {_flow(held)}' for key, held in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return _scalar(value)


def _scalar(value: str | int | float) -> str:
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else f'"{"".join(map(_escaped, value))}"'
    if isinstance(value, int):
        return str(value)
    if value == 0.0 or 1e-3 <= value < 1e5:
        return repr(value)
    return np.format_float_scientific(value, trim="-", exp_digits=2)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"
