"""`install` replaces CUDA by functions that keep everything on the CPU.

torch draws from its default CPU generator, whichever generator Megatron selects for "the GPU". So
experts start equal on every expert-parallel rank. Tensor-parallel shards do too, unless
`--use-cpu-initialization` cuts them from one whole matrix. Dropout shares its draws with the data
loader, so a run with dropout resumes correctly, but not bit for bit. For that, use
`--attention-dropout 0 --hidden-dropout 0`.
"""

from __future__ import annotations

import os
import sys
import warnings

from megatron_laer.environment import CONNECTIONS, DEVICE

MEGATRON_FSDP = "--use-megatron-fsdp"


def install() -> None:
    """Replace CUDA in torch and Megatron for the rest of the process."""
    loaded = [name for name in ("megatron.training", "megatron.core") if name in sys.modules]
    if loaded:
        raise RuntimeError(
            f"the CPU platform was asked for after {' and '.join(loaded)} had been imported; call "
            "megatron_laer.launch.prepare() before any import of megatron"
        )
    _set_environment()

    from megatron_laer.cpu import cuda

    cuda.replace()

    from megatron_laer.cpu import megatron_fixes

    megatron_fixes.fix()


def install_in_helper() -> None:
    """Replace CUDA in torch alone, in a process that a rank spawned."""
    from megatron_laer.cpu import cuda

    cuda.replace()


def _set_environment() -> None:
    # Processes that this one spawns (checkpoint writers) must choose the same device.
    os.environ[DEVICE] = "cpu"
    # Megatron's jit warm-up would compile for CUDA.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron refuses sequence parallelism and overlap without it, and Megatron-FSDP with it; the
    # CPU ignores it.
    if MEGATRON_FSDP not in sys.argv:
        os.environ.setdefault(CONNECTIONS, "1")
    # Hide a GPU from torch's C++ side as well.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Megatron asks for pinned batches; without a device every DataLoader warns.
    warnings.filterwarnings("ignore", message=r"'pin_memory' argument is set as true")
    # Nine of Megatron's modules say in every process that kernels for GPUs are not there.
    warnings.filterwarnings(
        "ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed"
    )
    warnings.filterwarnings("ignore", message=r"Only transformer-engine>=\S+ supports MoE experts")
