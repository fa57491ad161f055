"""Tests: `unit` in milliseconds, `distributed` on gloo ranks, `convergence`, and `gpu`."""

import os

from megatron_laer.cpu import ranks
from megatron_laer.environment import POISON

# Ranks of tests are forked from a process that has the doubles.
ranks.preparation = "tests.doubles.rank_imports"

# Before `megatron_laer.runtime.comm.memory` reads it. In all processes of tests memory then has
# impossible numbers until it is written.
os.environ[POISON] = "1"
