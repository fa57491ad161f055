"""Megatron's flags in files and command lines."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_laer.files.checks import quoted, read_text
from megatron_laer.files.yaml_text import Content, read_yaml
from megatron_laer.tools.model_flags import flag_words

# Expressions that Megatron evaluates, such as ([0]*3+[1]*58) in --moe-layer-freq, and their limit.
_PATTERN = re.compile(r"[,\d\[\]()+*]*\*[,\d\[\]()+*]*", re.ASCII)
_DIGITS = re.compile(r"[0-9]+")
_MOST_LAYERS = 10**7
NOT_EXPANDED = (
    "shell variables are not expanded; put `echo` before the command, and give the line that it "
    "prints"
)
# A variable of a shell, or the output of a command; all words of a list.
_VARIABLE = re.compile(r"\$[A-Za-z_{(@*0-9]|`")
_LIST = re.compile(r"\$\{\w+\[[@*]\]|\$[@*]")
# A flag with its value in a row of CSV.
_ROW = re.compile(r"--[\w-]+,")
# The time of shlex grows with the square of a word.
_MAX_BYTES = 2**18


def flags_in_file(path: Path) -> list[str]:
    """Read the flags of a YAML file (.yaml, .yml), else of a command line, such as a script's."""
    if path.suffix not in (".yaml", ".yml"):
        text = read_text(path, _MAX_BYTES).replace("\\\n", " ")  # a backslash continues a line
        try:
            flags = script_flags(shlex.split(text, comments=True))
        except ValueError as error:
            raise ValueError(f"{path}: no command line: {error}{_looks_like(text)}") from error
        is_list = any(_ROW.match(word) for word in flags)
        if is_list or not any(word.startswith(("--", "$")) for word in flags):
            lacks = "has flags in rows with commas" if is_list else "has no flags"
            raise ValueError(f"{path}: {lacks} and cannot be judged{_looks_like(text)}")
        return flags
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: give `flag: value` lines")
    try:
        return [word for key, value in _settings(content) for word in flag_words(key, value)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _looks_like(text: str) -> str:
    """Name a format that is not read, with the formats that are."""
    lines = text.strip().splitlines() or [""]
    found = "JSON" if lines[0][:1] in ("{", "[") else "CSV" if "," in lines[0] else ""
    kind = f"it looks like {found}; " if found else ""
    return f"; {kind}give a command line, or `flag: value` lines in a file that ends in .yaml"


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


def check_variables(words: Sequence[str]) -> None:
    """Refuse variables of a shell that may stand for flags.

    One that is the value of a flag alone, as in --data-path $DATA, is left to its flag.
    """
    for before, word in pairwise(["", *words]):
        if has_variable(word) and (not before.startswith("--") or _LIST.search(word)):
            raise ValueError(f"{quoted(word)}: {NOT_EXPANDED}")


def has_variable(text: str) -> bool:
    return _VARIABLE.search(text) is not None


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
