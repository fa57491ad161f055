"""The CPU platform lets Megatron's own training loop run with gloo where there is no GPU.

Megatron calls `torch.cuda` unconditionally. `install` puts functions in its place that keep
everything on the CPU; with a GPU nothing in here is active. Not here: what is replaced in torch
(`cpu_torch.py`), what is mended in Megatron itself (`cpu_megatron.py`), defects that a GPU run
shares (`wheel.py`).

Randomness: torch draws from its default generator on the CPU, whatever generator Megatron selects
for "the GPU". Three things follow. Experts start equal on every expert-parallel rank. So do
tensor-parallel shards, unless `--use-cpu-initialization` cuts them from one whole matrix. And
dropout shares its draws with the data loader, so a run with dropout resumes correctly but not bit
for bit; use `--attention-dropout 0 --hidden-dropout 0` where that matters.
"""

import os
import sys
import warnings

from megatron_laer.environment import CONNECTIONS, DEVICE

CPU_FLAGS: tuple[str, ...] = (
    "--distributed-backend",
    "gloo",
    # The fused and Transformer Engine kernels exist for CUDA only.
    "--transformer-impl",
    "local",
    "--attention-backend",
    "unfused",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
)
"""Megatron's flags that a run without a GPU needs, ready to be put on a command line."""

_DEVICES = ("auto", "cpu", "cuda")

_installed = False


def needed(force: bool = False) -> bool:
    """Tell whether Megatron has to run on the CPU: asked for, or without a usable CUDA device.

    `force` or `MEGATRON_LAER_DEVICE=cpu` ask for it; `MEGATRON_LAER_DEVICE=cuda` rules it out, so
    that a broken driver shows as Megatron's own error. Imports torch only where neither decides.
    """
    asked = os.environ.get(DEVICE, "auto")
    if asked not in _DEVICES:
        raise ValueError(
            f"{DEVICE}={asked!r} names no device; use one of {', '.join(_DEVICES)}, or unset it"
        )
    if _installed or force or asked == "cpu":
        return True
    if asked == "cuda":
        return False

    import torch

    return not torch.cuda.is_available()


def install() -> None:
    """Put CPU functions in CUDA's place for the rest of the process; a second call does nothing.

    Raises RuntimeError where Megatron is imported already: its modules have then bound names of
    `torch.cuda` and compiled functions that can no longer be replaced.
    """
    global _installed
    if _installed:
        return
    loaded = [name for name in ("megatron.training", "megatron.core") if name in sys.modules]
    if loaded:
        raise RuntimeError(
            f"the CPU platform was asked for after {' and '.join(loaded)} had been imported; call "
            "megatron_laer.launch.prepare() before any import of megatron"
        )
    _set_environment()

    from megatron_laer.platform import cpu_torch

    cpu_torch.replace()

    from megatron_laer.platform import cpu_megatron

    cpu_megatron.mend()
    _installed = True


def install_in_helper() -> None:
    """Replace `torch.cuda` where needed, in a process that a rank spawned, and nothing in Megatron.

    The main script was imported here again, and Megatron maybe with it: unlike a rank, a helper
    cannot ask for everything first.
    """
    if not _installed and needed():
        from megatron_laer.platform import cpu_torch

        cpu_torch.replace()


def installed() -> bool:
    """Tell whether this process runs on the CPU in CUDA's place."""
    return _installed


def _set_environment() -> None:
    # Processes that this one spawns (checkpoint writers) must choose the same device.
    os.environ[DEVICE] = "cpu"
    # Megatron's jit warm-up would compile for CUDA.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron refuses sequence parallelism and overlap without it; it means nothing on the CPU.
    os.environ.setdefault(CONNECTIONS, "1")
    # A GPU that the user turned down must stay invisible to torch's C++ side as well.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Megatron asks for pinned batches; without a device that is a warning at every DataLoader.
    warnings.filterwarnings("ignore", message=r"'pin_memory' argument is set as true")
