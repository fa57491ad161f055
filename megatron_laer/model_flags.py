"""Model configurations in YAML, turned into Megatron's flags.

A file is grouped for the reader; a group's keys are Megatron's flags without the dashes, so there
is nothing to look up twice:

    description: a model for tests
    architecture:
      num-layers: 4              # --num-layers 4
      swiglu: true               # --swiglu
    moe:
      moe-router-topk: 2

Whether a flag exists and its value fits is Megatron's parser to say, not this module's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from megatron_laer.shipped import yaml_file

GROUPS = ("architecture", "moe", "initialization", "precision", "data")

_KEY = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


def model_flags(path_or_name: str | Path) -> list[str]:
    """Megatron's flags for a model, by path to a YAML file or by the name of one we ship.

    Raises:
        ValueError: an unknown name, or a file whose content does not fit; the message says what
            would.
        OSError: a path that cannot be read.
    """
    path = yaml_file("model", path_or_name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    flags: dict[str, list[str]] = {}
    for key, value in _settings(content, path):
        if key in flags:
            raise ValueError(f"{path}: {key} is given twice; leave one out")
        flags[key] = [f"--{key}", *_words(key, value, path)]
    return [word for words in flags.values() for word in words]


def _settings(content: object, path: Path) -> Iterator[tuple[str, object]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {content!r}, expected a mapping with the groups {GROUPS}")
    description = content.get("description")
    if not isinstance(description, str) or not description.strip():
        raise ValueError(f"{path}: description must say what the model is, got {description!r}")
    for group, settings in content.items():
        if group == "description":
            continue
        if group not in GROUPS:
            raise ValueError(f"{path}: unknown group {group!r}; groups are {', '.join(GROUPS)}")
        if not isinstance(settings, Mapping):
            raise ValueError(f"{path}: {group} must hold `flag: value` lines, got {settings!r}")
        for key, value in settings.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ValueError(
                    f"{path}: {group}: {key!r} is no flag; write Megatron's without its dashes, "
                    "such as num-layers"
                )
            yield key, value


def _words(key: str, value: object, path: Path) -> list[str]:
    if value is True:
        return []
    values = value if isinstance(value, list) else [value]
    for item in values:
        # bool is an int in Python, and `no` is a bool in YAML.
        if isinstance(item, bool) or not isinstance(item, int | float | str) or item == "":
            raise ValueError(
                f"{path}: {key} is {value!r}; give true for a switch, else a number, a text or a "
                "list of them. A switch that is off is left out"
            )
    if not values:
        raise ValueError(f"{path}: {key} is an empty list; give it values or leave it out")
    return [str(item) for item in values]
