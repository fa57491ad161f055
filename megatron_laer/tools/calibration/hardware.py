"""Names of the ranks' hardware and software, for the cluster file."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_laer.tools.calibration.gemms import compute_dtype
from megatron_laer.tools.calibration.settings import CalibrationSettings
from megatron_laer.version import __version__


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(
    hardware: Sequence[str], settings: CalibrationSettings, device: torch.device
) -> Mapping[str, str]:
    on_cuda = device.type == "cuda"
    names = [f"{count} x {name}" for name, count in Counter(hardware).most_common()]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if on_cuda else "none, but gloo"
    gated = "gated" if settings.expert.gated else "not gated"
    return {
        "hardware": ", ".join(names),
        "nodes": f"{len(hardware) // settings.node_size} of {settings.node_size} ranks",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda) if on_cuda else "none",
        "NCCL": nccl,
        "NumPy": np.__version__,
        "megatron_laer": __version__,
        "threads of a rank": str(torch.get_num_threads()),
        "expert": f"hidden {settings.expert.hidden}, ffn {settings.expert.ffn}, {gated}, "
        f"{str(compute_dtype(device)).removeprefix('torch.')}, {settings.slots} slots",
        "thoroughness": "quick" if settings.quick else "full",
    }
