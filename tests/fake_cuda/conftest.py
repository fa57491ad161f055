"""Ranks of these tests alone, as in `tests/races`."""

from tests.races.conftest import ranks

__all__ = ["ranks"]
