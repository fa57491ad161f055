"""Importing this makes a process ready for Megatron on the CPU; a pool's ranks are forked from it.

Imports take a rank longer than most of what it is then asked for, and what was imported once
stands in memory once. Ranks of torchrun start by themselves, each with an order of sets of its own;
forked ones share theirs.
"""

from __future__ import annotations

import gc
import os

from megatron_laer.testing.ranks import ENVIRONMENT

os.environ.update(ENVIRONMENT)

from megatron_laer.launch import prepare

prepare()

from megatron.training import training  # noqa: E402, F401

# No rank walks or copies what was imported.
gc.collect()
gc.freeze()
