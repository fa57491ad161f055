"""Tests: `unit` in milliseconds, `distributed` on gloo ranks, `convergence`, and `gpu`."""

from megatron_laer.cpu import ranks

# Ranks of tests are forked from a process that has the doubles.
ranks.preparation = "tests.doubles.rank_imports"
