"""Checks of the machine, and of the launcher that started this process."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_laer.environment import CONNECTIONS, DEVICE
from megatron_laer.files.checks import quoted
from megatron_laer.runtime.comm import launcher
from megatron_laer.support import triton_needs
from megatron_laer.tools.doctor.check import Answer, Check, Status

_WORLD = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", launcher.SLURM_TASKS)
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_NUMBER = re.compile("[0-9]{1,9}")


def cuda(torch: Answer, environment: Mapping[str, str]) -> Check:
    """Check torch's CUDA and the driver, and whether training would use a GPU."""
    found = f"torch's {torch['cuda']}" if torch["cuda"] else "torch without CUDA"
    driver = _driver()
    if driver:
        found += f", driver {driver}"
    if "device_error" in torch:
        return Check("CUDA", found, Status.UNSUPPORTED, torch["device_error"])
    if torch["device"] == "cuda":
        if torch["cards"]:
            return Check("CUDA", found)
        return Check("CUDA", found, Status.MISSING, f"asked for: {torch.get('cuda_error')}")
    hides = (DEVICE, "cpu"), ("CUDA_VISIBLE_DEVICES", "")
    hiding = [f"{name}={value!r}" for name, value in hides if environment.get(name) == value]
    if driver and hiding:
        return Check("CUDA", found, note=f"cards are turned down by {hiding[0]}")
    if driver:
        note = f"torch sees no card: {torch.get('cuda_error')}"
        return Check("CUDA", found, Status.MISSING, note)
    note = "no GPU: Megatron runs on the CPU, with what `megatron-laer flags MODEL --cpu` adds"
    return Check("CUDA", found, note=note)


def _driver() -> str:
    """Return the version of NVIDIA's kernel driver; "" without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    version = re.search(r"Kernel Module\D*([\d.]+)", text)
    return version[1] if version else "of unknown version"


def cards(torch: Answer) -> Check:
    return Check("cards", "; ".join(torch["cards"]) or "none")


def nccl(torch: Answer, on_cuda: bool) -> Check:
    """Check the library of the exchanges between ranks: NCCL, or gloo on the CPU."""
    found = torch["nccl"] or "none"
    if on_cuda and not torch["nccl"]:
        return Check("NCCL", found, Status.MISSING, "install a torch with NCCL")
    if not on_cuda and not torch["gloo"]:
        return Check("NCCL", found, Status.MISSING, "without a GPU, install a torch with gloo")
    return Check("NCCL", found, note="" if on_cuda else "ranks without a GPU use gloo")


def triton(environment: Mapping[str, str], on_cuda: bool) -> Check:
    """Check Triton, which compiles kernels on each node."""
    found = "installed" if triton_needs.is_installed() else "none"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # nightly ones are renamed
        found = importlib.metadata.version("triton")
    if not on_cuda:
        return Check("Triton", found, note="not used without a GPU")
    if not triton_needs.is_installed():
        return Check("Triton", found, Status.OPTIONAL, triton_needs.NO_TRITON)
    if (problem := triton_needs.problem(environment)) is not None:
        return Check("Triton", found, Status.MISSING, problem)
    return Check("Triton", found)


def dataset_helper(megatron: Answer, environment: Mapping[str, str]) -> Check:
    """Check the dataset helper, which a checkout of Megatron builds when training starts."""
    name = "dataset helper"
    if not megatron["builds_helper"]:
        if megatron["has_helper"]:
            return Check(name, "built")
        note = f"{megatron['folder']} has neither the helper nor its Makefile: install it again"
        return Check(name, "none", Status.MISSING, note)
    compiler = (environment.get("CXX", "").split() or ["g++"])[0]
    tools = ("make", compiler, "python3", "python3-config")
    lacks = [tool for tool in tools if shutil.which(tool) is None]
    if lacks:
        note = f"training would build it with {', '.join(lacks)}, not in the PATH"
        return Check(name, "to be built", Status.MISSING, note)
    return Check(name, "to be built", note="Megatron's checkout builds it when training starts")


def launched(environment: Mapping[str, str]) -> Check:
    names = {"WORLD_SIZE": "torchrun", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
    world = _first(environment, _WORLD)
    rank = _first(environment, _RANK)
    which = f"rank {_shown(rank[1])}" if rank else "no rank"
    if world is not None:
        found = f"{names.get(world[0], 'Slurm')}: {which} of {_shown(world[1])}"
    else:
        job = environment.get("SLURM_JOB_ID")
        found = f"none, in Slurm's job {_shown(job)}" if job else "none"
    try:
        launcher.check_ranks(environment)
    except ValueError as error:
        return Check("launcher", found, Status.UNSUPPORTED, str(error))
    return Check("launcher", found)


def node_size(environment: Mapping[str, str], num_cards: int, on_cuda: bool) -> Check:
    """Check the ranks per node that FSEP assumes without --fsep-node-size."""
    given = _first(environment, _WORLD)
    world = int(given[1]) if given and _NUMBER.fullmatch(given[1]) else 1
    try:
        told = launcher.told_ranks_per_node(environment, world)
        size = launcher.ranks_per_node(environment, world, num_cards, on_cuda=on_cuda)
    except ValueError as error:
        return Check("node size", "not known", Status.UNSUPPORTED, str(error))
    source = told[0] if told else "no launcher tells, so all ranks are on one node"
    return Check("node size", f"{size} ({source})")


def connections(environment: Mapping[str, str], on_cuda: bool) -> Check:
    """Check the number of CUDA's queues, on which overlap depends."""
    value = environment.get(CONNECTIONS)
    found = "not set" if value is None else _shown(value)
    if not on_cuda:
        return Check(CONNECTIONS, found, note="not used without a GPU")
    if value not in (None, *map(str, range(1, 33))):
        return Check(CONNECTIONS, found, Status.UNSUPPORTED, "set it to 1 to 32, or unset it")
    if value == "1":
        note = "exchanges overlap in part; unset it but for tensor or context parallelism"
        return Check(CONNECTIONS, found, Status.OPTIONAL, note)
    return Check(CONNECTIONS, found)


def _shown(value: str) -> str:
    return value if _NUMBER.fullmatch(value) else quoted(value)


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str] | None:
    return next(((name, environment[name]) for name in names if name in environment), None)
