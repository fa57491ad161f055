"""Imports that prepare a process for Megatron on the CPU; a pool's ranks are forked from it.

So imports cost time and memory once. Forked ranks also share the order of sets, unlike torchrun's.
"""

from __future__ import annotations

import atexit
import gc
import os

# Environment of every rank; all but the last one are read when torch is imported. Without a card
# Triton's kernels can only be interpreted.
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "MEGATRON_LAER_DEVICE": "cpu",
}


def _import() -> dict[str, str]:
    before = dict(os.environ)
    from megatron_laer.launch import prepare

    prepare()
    import torch
    from megatron.training import training  # noqa: F401

    # For absent devices each seed would format the caller's stack, a sixth of a short run.
    torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None

    return dict(os.environ.items() - before.items())


os.environ.update(ENVIRONMENT)
# Set by `prepare`, which ranks do not run themselves.
SET_BY_PREPARE = _import()
# Keep imported objects from being walked or copied by ranks.
gc.collect()
gc.freeze()
# Else triton reports its functions as leaked, in twenty lines after a program's last word.
atexit.register(gc.unfreeze)
