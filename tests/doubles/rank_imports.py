"""Imports that prepare a process for ranks of tests: those of `megatron_laer.cpu`, and doubles."""

from __future__ import annotations

# First, since it prepares the process for torch and Megatron.
from megatron_laer.cpu import rank_imports  # noqa: F401
from tests.doubles.install import install

install()
