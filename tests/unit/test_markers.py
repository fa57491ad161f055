"""The markers that pyproject.toml registers, against the tests that carry them."""

import tomllib
from pathlib import Path

import pytest

from tests.conftest import KINDS

_ROOT = Path(__file__).resolve().parents[2]
_PYPROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MARKERS = [
    marker.split(":")[0].split("(")[0]
    for marker in _PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
]
_SOURCES = [path.read_text(encoding="utf-8") for path in _ROOT.glob("tests/**/test_*.py")]


@pytest.mark.parametrize("marker", MARKERS)
def test_every_registered_marker_is_on_a_test(marker: str) -> None:
    has_a_folder = marker in KINDS and any(_ROOT.glob(f"tests/{marker}/test_*.py"))
    assert has_a_folder or any(f"pytest.mark.{marker}" in source for source in _SOURCES)


def test_every_folder_of_tests_is_named_for_a_kind() -> None:
    assert {path.parent.name for path in _ROOT.glob("tests/**/test_*.py")} == {*KINDS, "tools"}


def test_a_test_is_of_the_kind_of_its_folder(request: pytest.FixtureRequest) -> None:
    assert [mark.name for mark in request.node.iter_markers() if mark.name in KINDS] == ["unit"]
