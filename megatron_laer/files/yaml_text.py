"""YAML that people write by hand, read as texts, lists and mappings alone.

It guesses no types: `237e12` is a number to us, where YAML 1.1 has a text, and `no` is no boolean.
Unneeded and dangerous features are refused: tags, deep nesting, and anchors and aliases, which
write a text of any length in a few bytes. Callers interpret the texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_laer.files.checks import quoted, read_text

type Content = str | list[Content] | dict[str, Content] | None

# PyYAML has two parsers. That of libyaml takes a tenth of the time; that in Python says more
# of errors, and needs some seconds for a megabyte. Our shipped files have a kilobyte.
_FASTEST: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
MAX_BYTES = 2**16
MAX_DEPTH = 16


def read_yaml(path: Path) -> Content:
    """Read the content of a YAML file; return None if it is empty."""
    text = read_text(path, MAX_BYTES)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_yaml(text: str) -> Content:
    with suppress(yaml.YAMLError):
        return _document(yaml.parse(text, Loader=_FASTEST))
    try:
        return _document(yaml.parse(text, Loader=yaml.BaseLoader))
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        what = " ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{where}not valid YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position}: not valid YAML: {error.reason}") from error


def _document(events: Iterator[yaml.Event]) -> Content:
    found: list[Content] = []
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if found:
                raise ValueError(f"{_line(event)}: a second document begins; leave only one")
            found.append(_node(next(events), events, 0))
    return found[0] if found else None


def _node(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Content:
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise ValueError(
            f"{_line(event)}: anchors and aliases (&{event.anchor}, *{event.anchor}) are not "
            "taken; write the value again"
        )
    if event.tag is not None:
        raise ValueError(f"{_line(event)}: tags such as {quoted(event.tag)} are not taken")
    if isinstance(event, yaml.ScalarEvent):
        return str(event.value)
    if depth == MAX_DEPTH:
        raise ValueError(f"{_line(event)}: nested too deeply; at most {MAX_DEPTH} levels are taken")
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Content] = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_node(item, events, depth + 1))
        return items
    mapping: dict[str, Content] = {}
    while not isinstance(item := next(events), yaml.MappingEndEvent):
        key = _node(item, events, depth + 1)
        if not isinstance(key, str):
            raise ValueError(f"{_line(item)}: a list or a mapping is no key; write a text")
        if key in mapping:
            raise ValueError(
                f"{_line(item)}: the key {quoted(key)} is given twice; remove one of them"
            )
        mapping[key] = _node(next(events), events, depth + 1)
    return mapping


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}"
