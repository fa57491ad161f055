"""Names of environment variables that several modules read; docs/settings.md lists all."""

from __future__ import annotations

import os
from collections.abc import Mapping

DEVICE = "MEGATRON_LAER_DEVICE"
POISON = "MEGATRON_LAER_POISON"
UNRELEASED_MEGATRON = "MEGATRON_LAER_UNRELEASED_MEGATRON"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
MOST_QUEUES = "32"
GROUPED_TENSORS = "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"

# Prefixes of variables by the library that reads them at import without naming them in its errors.
_READ_BY = {"tqdm": ("TQDM_",)}


def has_one_queue(environment: Mapping[str, str]) -> bool:
    """Return True if kernels of all CUDA streams pass one hardware queue, in launch order."""
    return environment.get(CONNECTIONS) == "1"


def variables_behind(error: BaseException) -> dict[str, str]:
    """Return the set variables that concern the library which raised an error, by name."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    prefixes = _READ_BY.get(module.partition(".")[0], ())
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
