"""Ranks of these tests alone, as in `tests/fake_cuda`."""

from tests.fake_cuda.conftest import ranks

__all__ = ["ranks"]
