"""These rows are about the machine, and about the launcher that started this process."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_laer.environment import CONNECTIONS, DEVICE
from megatron_laer.files.checks import quoted
from megatron_laer.runtime.comm import launcher
from megatron_laer.tools.doctor.asking import program_says
from megatron_laer.tools.doctor.row import Answer, Row, Verdict

_WORLD = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", launcher.SLURM_TASKS)
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_NUMBER = re.compile("[0-9]{1,9}")


def system() -> Row:
    """Name the operating system and the processor."""
    found = f"{platform.platform()}, {os.cpu_count()} cores"
    if sys.platform == "linux":
        return Row("system", found)
    return Row("system", found, Verdict.UNSUPPORTED, "use Linux")


def cuda(torch: Answer, environment: Mapping[str, str]) -> Row:
    """Say what torch was built with, the driver's version, and whether training would use a GPU."""
    found = f"torch's {torch['cuda']}" if torch["cuda"] else "torch without CUDA"
    driver = _driver()
    if driver:
        found += f", driver {driver}"
    if "device_error" in torch:
        return Row("CUDA", found, Verdict.UNSUPPORTED, torch["device_error"])
    if torch["device"] == "cuda":
        if torch["cards"]:
            return Row("CUDA", found)
        return Row("CUDA", found, Verdict.MISSING, f"asked for: {torch.get('cuda_error')}")
    hides = (DEVICE, "cpu"), ("CUDA_VISIBLE_DEVICES", "")
    hiding = [f"{name}={value!r}" for name, value in hides if environment.get(name) == value]
    if driver and hiding:
        return Row("CUDA", found, note=f"cards are turned down by {hiding[0]}")
    if driver:
        return Row("CUDA", found, Verdict.MISSING, f"torch sees no card: {torch.get('cuda_error')}")
    note = "no GPU: Megatron runs on the CPU, with what `megatron-laer flags MODEL --cpu` adds"
    return Row("CUDA", found, note=note)


def _driver() -> str:
    """Read the version of NVIDIA's kernel driver; "" without one."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    version = re.search(r"Kernel Module\D*([\d.]+)", said)
    return version[1] if version else "of unknown version"


def cards(torch: Answer) -> Row:
    """List the GPUs that torch sees."""
    return Row("cards", "; ".join(torch["cards"]) or "none")


def nccl(torch: Answer, on_cuda: bool) -> Row:
    """Name the library that ranks exchange with, or say whether gloo is there on the CPU."""
    found = torch["nccl"] or "none"
    if on_cuda and not torch["nccl"]:
        return Row("NCCL", found, Verdict.MISSING, "install a torch with NCCL")
    if not on_cuda and not torch["gloo"]:
        return Row("NCCL", found, Verdict.MISSING, "without a GPU, install a torch with gloo")
    return Row("NCCL", found, note="" if on_cuda else "ranks without a GPU use gloo")


def dataset_helper(megatron: Answer, environment: Mapping[str, str]) -> Row:
    """Look for the dataset helper; a checkout builds it at start with the `python3` in the PATH."""
    name = "dataset helper"
    if not megatron["builds_helper"]:
        if megatron["has_helper"]:
            return Row(name, "built")
        way_out = f"{megatron['folder']} has neither the helper nor its Makefile: install it again"
        return Row(name, "none", Verdict.MISSING, way_out)
    compiler = (environment.get("CXX", "").split() or ["g++"])[0]
    lacks = list(_build_lacks(compiler))
    if lacks:
        note = f"training would build it with {'; '.join(lacks)}"
        return Row(name, "to be built", Verdict.MISSING, note)
    return Row(name, "to be built", note="Megatron's checkout builds it when training starts")


def _build_lacks(compiler: str) -> Iterator[str]:
    # As the Makefile calls them.
    for tool in ("make", compiler):
        if shutil.which(tool) is None:
            yield f"{tool}, which is not in the PATH"
    for command in (["python3", "-m", "pybind11", "--includes"], ["python3-config", "--help"]):
        if shutil.which(command[0]) is None or program_says(command) is None:
            yield f"`{shlex.join(command)}`, which does not run"
    suffix = program_says(["python3-config", "--extension-suffix"])
    expected = sysconfig.get_config_var("EXT_SUFFIX")
    if suffix and suffix != expected:
        yield f"python3 in the PATH, for {suffix}, but this Python needs {expected}"


def compiler(environment: Mapping[str, str]) -> Row:
    """Name the C++ compiler that an installation from source would use."""
    asked = environment.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        said = program_says([*name.split(), "--version"])
        if said:
            return Row("compiler", said.splitlines()[0])
    found = f"none (CXX={quoted(asked)} fails, or takes too long)" if asked else "none"
    return Row("compiler", found, Verdict.OPTIONAL, "for installing from source")


def launched(environment: Mapping[str, str]) -> Row:
    """Say which launcher started this process, as which rank."""
    names = {"WORLD_SIZE": "torchrun", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
    said = _first(environment, _WORLD)
    rank = _first(environment, _RANK)
    which = f"rank {_shown(rank[1])}" if rank else "no rank"
    if said is not None:
        found = f"{names.get(said[0], 'Slurm')}: {which} of {_shown(said[1])}"
    else:
        job = environment.get("SLURM_JOB_ID")
        found = f"none, in Slurm's job {_shown(job)}" if job else "none"
    try:
        launcher.check_ranks(environment)
    except ValueError as error:
        return Row("launcher", found, Verdict.UNSUPPORTED, str(error))
    return Row("launcher", found)


def node_size(environment: Mapping[str, str], cards: int, on_cuda: bool) -> Row:
    """Count the ranks per node as FSEP would without --fsep-node-size."""
    said = _first(environment, _WORLD)
    world = int(said[1]) if said and _NUMBER.fullmatch(said[1]) else 1
    try:
        told = launcher.told_ranks_per_node(environment, world)
        size = launcher.ranks_per_node(environment, world, cards, on_cuda=on_cuda)
    except ValueError as error:
        return Row("node size", "not known", Verdict.UNSUPPORTED, str(error))
    source = told[0] if told else "no launcher tells, so all ranks are on one node"
    return Row("node size", f"{size} ({source})")


def connections(environment: Mapping[str, str], on_cuda: bool) -> Row:
    """Read the number of CUDA's queues, on which overlap depends."""
    value = environment.get(CONNECTIONS)
    found = "not set" if value is None else _shown(value)
    if not on_cuda:
        return Row(CONNECTIONS, found, note="not used without a GPU")
    if value not in (None, *map(str, range(1, 33))):
        return Row(CONNECTIONS, found, Verdict.UNSUPPORTED, "set it to 1 to 32, or unset it")
    if value == "1":
        note = "exchanges hardly overlap; unset it but for tensor or context parallelism"
        return Row(CONNECTIONS, found, Verdict.OPTIONAL, note)
    return Row(CONNECTIONS, found)


def _shown(value: str) -> str:
    return value if _NUMBER.fullmatch(value) else quoted(value)


def _first(environment: Mapping[str, str], names: Iterable[str]) -> tuple[str, str] | None:
    return next(((name, environment[name]) for name in names if name in environment), None)
