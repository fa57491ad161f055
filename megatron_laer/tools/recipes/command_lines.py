"""Megatron's flags in files and command lines."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_laer.files.checks import quoted, read_text
from megatron_laer.files.yaml_text import Content, read_yaml
from megatron_laer.tools.model_flags import flag_words

# Expressions that Megatron evaluates, such as ([0]*3+[1]*58) in --moe-layer-freq, and their limit.
_PATTERN = re.compile(r"[,\d\[\]()+*]*\*[,\d\[\]()+*]*", re.ASCII)
_DIGITS = re.compile(r"[0-9]+")
_MOST_LAYERS = 10**7
# The time of shlex grows with the square of a word.
_MAX_BYTES = 2**18


def flags_in_file(path: Path) -> list[str]:
    """Read the flags of a YAML file (.yaml, .yml), else of a command line, such as a script's."""
    if path.suffix not in (".yaml", ".yml"):
        text = read_text(path, _MAX_BYTES).replace("\\\n", " ")  # a backslash continues a line
        try:
            return script_flags(shlex.split(text, comments=True))
        except ValueError as error:
            raise ValueError(f"{path}: no command line: {error}") from error
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: give `flag: value` lines")
    try:
        return [word for key, value in _settings(content) for word in flag_words(key, value)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def script_flags(words: list[str]) -> list[str]:
    """Return the flags of a command line without the words that start the script, if any."""
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    flags = words[script + 1 :]
    return flags[1:] if flags[:1] == ["--"] else flags


def check_patterns(words: list[str]) -> None:
    """Refuse a layer pattern whose evaluation would exhaust memory or never end."""
    for word in words:
        pattern = word.rpartition("=")[2]
        if not _PATTERN.fullmatch(pattern):
            continue
        numbers = [
            number.lstrip("0")[: len(str(_MOST_LAYERS))] for number in _DIGITS.findall(pattern)
        ]
        if "**" in pattern or math.prod(int(number or 1) for number in numbers) > _MOST_LAYERS:
            raise ValueError(
                f"{quoted(pattern)}: no pattern of layers, or one of too many; write it as "
                "([0]*3+[1]*58), at most some thousand layers"
            )


def without(words: Sequence[str], flags: Collection[str]) -> list[str]:
    kept, is_dropped = [], False
    for word in words:
        if word.startswith("--"):
            is_dropped = word.split("=")[0] in flags
        if not is_dropped:
            kept.append(word)
    return kept


def _settings(content: Mapping[str, Content]) -> Iterator[tuple[str, Content]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _settings(value)
        elif key != "description":  # of a model configuration as we ship them
            yield key, value
