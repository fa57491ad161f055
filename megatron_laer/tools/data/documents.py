"""Documents of a file, read in pieces of token ids, so that a file may have any length.

This module knows the formats of input; `tokenizers` encodes the texts.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_laer.files.checks import quoted
from megatron_laer.tools.data.tokenizers import (
    MAX_TEXT_BYTES,
    ByteTokenizer,
    Ids,
    readable,
)

FORMATS = ("text", "jsonl")
DEFAULT_JSON_KEY = "text"

# Megatron's own examples use `.json` for their JSONL.
_JSONL = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KEYS_SHOWN = 8


def format_of(path: Path) -> str:
    """Return a file's format by its ending; raise ValueError for a compressed file."""
    if path.suffix in _COMPRESSED:
        raise ValueError(
            f"{quoted(path)} is compressed by its ending; unpack it first, or give --format text "
            "to take its bytes as they are"
        )
    return "jsonl" if path.suffix in _JSONL else "text"


def documents(
    file: BinaryIO, path: Path, text_format: str, json_key: str, tokenizer: ByteTokenizer
) -> Iterator[Iterable[Ids] | None]:
    """Yield the documents of an open file, each in pieces; None stands for one without text.

    Read each document to its end before the next one. Raises ValueError for an unreadable or
    malformed file.
    """
    if text_format == "text":
        yield tokenizer.encode_file(file, path)
        return
    for number, line in _lines(file, path):
        text = _text(line, json_key, f"{quoted(path)}, line {number}")
        yield tokenizer.encode_text(text) if text else None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        number += 1
        with readable(path):
            line = file.readline(MAX_TEXT_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_TEXT_BYTES:
            raise ValueError(
                f"{quoted(path)}, line {number} is longer than {MAX_TEXT_BYTES:,} bytes; a line of "
                f"JSONL holds one document; {_OTHERWISE}"
            )
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line and not line.isspace():
            yield number, line


def _text(line: bytes, key: str, where: str) -> str:
    content = _parsed(line, where)
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {_shown(line)} is no JSON object; {_EXPECTED}")
    if key not in content:
        found = ", ".join(quoted(name, 40) for name in list(content)[:_KEYS_SHOWN])
        more = ", ..." if len(content) > _KEYS_SHOWN else ""
        raise ValueError(
            f"{where} has no key {quoted(key)}, but {found + more or 'none at all'}; name the "
            f"text's with --json-key, or {_OTHERWISE}"
        )
    text = content[key]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {quoted(key)} is of type {type(text).__name__} and no string in "
            f"{_shown(line)}; name the text's key with --json-key"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {quoted(key)} has half a character, {quoted(text[error.start])}, at "
            f"{error.start}; write both halves of a surrogate pair, or the character itself"
        ) from error
    return text


_OTHERWISE = "give --format text to take each file as one document"
_EXPECTED = f'a line must be such as {{"text": "..."}}; or {_OTHERWISE}'


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert the file"
        ) from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError:
        # Python's limit on digits; the error's own message names a Python function.
        problem = "a number is too long"
    raise ValueError(f"{where}: {_shown(line)} is not JSON ({problem}); {_EXPECTED}")


def _shown(line: bytes) -> str:
    return quoted(line[:200].decode("utf-8", "replace").strip(), 80)
