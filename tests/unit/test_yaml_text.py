"""YAML as texts, lists and mappings, and refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from megatron_laer.files import yaml_text
from megatron_laer.files.yaml_text import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

ROOT = Path(__file__).resolve().parents[2]

DEEPEST: list[Any] = []
for _ in range(MAX_DEPTH - 1):
    DEEPEST = [DEEPEST]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("# only a comment", None),
        ("---", ""),
        ("text", "text"),
        ("{a: 1, b: no, c: 1e3, d: '2'}", {"a": "1", "b": "no", "c": "1e3", "d": "2"}),
        ("{e: ~, f: 2001-01-01, <<: x}", {"e": "~", "f": "2001-01-01", "<<": "x"}),
        ("- [1, [2, {a: }]]", [["1", ["2", {"a": ""}]]]),
        ("[[" * (MAX_DEPTH // 2 - 1) + "[[]]" + "]]" * (MAX_DEPTH // 2 - 1), DEEPEST),
        ("a:\n  b: |\n    two\n    lines\n", {"a": {"b": "two\nlines\n"}}),
    ],
)
def test_values_are_the_texts_that_are_written(text: str, content: object) -> None:
    assert parse_yaml(text) == content


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_both_parsers_read_our_files_alike(path: Path) -> None:
    found = read_yaml(path)
    with mock.patch.object(yaml_text, "_FASTEST", yaml.BaseLoader):
        assert read_yaml(path) == found and isinstance(found, dict)


def test_a_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("[")
    with pytest.raises(ValueError, match=rf"^{path}: line 1: not valid YAML"):
        read_yaml(path)
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match=r"x\.yaml' has 65,537 bytes; at most 65,536"):
        read_yaml(path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"pipe\.yaml' is a pipe"):
        read_yaml(tmp_path / "pipe.yaml")
