"""Measurement of a cluster by all ranks of a launcher; rank 0 gets the result."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from megatron_laer.device import cpu_needed
from megatron_laer.files import memory
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.runtime.build import default_cluster
from megatron_laer.runtime.comm import launcher
from megatron_laer.runtime.comm.streams import make_comm_stream
from megatron_laer.tools.calibration.constants import measured_cluster, with_card
from megatron_laer.tools.calibration.contention import contention_jobs
from megatron_laer.tools.calibration.gemms import compute_dtype, gemm_jobs, usable_back_ends
from megatron_laer.tools.calibration.host import host_jobs
from megatron_laer.tools.calibration.links import exchange_jobs, make_partners
from megatron_laer.tools.calibration.sampling import Job, measure
from megatron_laer.tools.calibration.settings import START, CalibrationSettings, make_settings
from megatron_laer.tools.model_flags import DEFAULT_SIZES, ExpertSizes
from megatron_laer.version import __version__

_TIMEOUT = datetime.timedelta(minutes=10)

# Wraps the jobs in a progress bar.
Progress = Callable[[Sequence[Job]], Iterable[Job]]


@contextmanager
def all_ranks() -> Iterator[dist.ProcessGroup]:
    """Connect the launcher's ranks by gloo during the block, for control messages."""
    try:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the ranks did not find each other: {error}; {START}") from error
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


def together[T](control: dist.ProcessGroup, do: Callable[[], T]) -> T:
    """Return the result of a function, and raise one rank's error on all. Collective."""
    result, problem = None, None
    try:
        result = do()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        problem = str(error) or type(error).__name__
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=control)
    for rank, found in enumerate(problems):
        if found is not None:
            everywhere = all(other == found for other in problems)
            raise ValueError(found if everywhere else f"rank {rank}: {found}")
    return result  # type: ignore[return-value]


def agree_on_settings(
    expert: ExpertSizes | None,
    node_size: int | None,
    *,
    quick: bool,
    control: dist.ProcessGroup,
) -> tuple[CalibrationSettings, torch.device]:
    """Choose each rank's device and the common settings. Collective over all ranks.

    None means an expert that suits the device, and the launcher's node size.
    """
    settings, device = together(control, lambda: _settings(expert, node_size, quick))
    everybody = [settings] * dist.get_world_size()
    dist.all_gather_object(everybody, settings, group=control)
    for rank, other in enumerate(everybody):
        theirs = vars(other)
        found = [(name, of) for name, of in vars(everybody[0]).items() if of != theirs[name]]
        if found:
            differing = "; ".join(f"{name} is {of} and {theirs[name]}" for name, of in found)
            raise ValueError(
                f"ranks 0 and {rank} would measure differently ({differing}); "
                "start all with the same arguments and MEGATRON_LAER_DEVICE, on the same kind of "
                "device"
            )
    return settings, device


def calibrate(
    name: str,
    settings: CalibrationSettings,
    device: torch.device,
    control: dist.ProcessGroup,
    progress: Progress,
) -> Cluster | None:
    """Measure a cluster and return it on rank 0, None on others. Collective over all ranks."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Two groups of all ranks, so that exchanges during GEMMs have a communicator of their own.
    everybody, exchanging = (cast(dist.ProcessGroup, dist.new_group(backend=backend)) for _ in "12")
    partners = make_partners(settings, backend)
    usable: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(usable, usable_back_ends(settings, device), group=control)
    back_ends = [name for name in usable[0] if all(name in names for names in usable)]
    stream = make_comm_stream("calibrate", device, overlaps=True)
    jobs = [
        *gemm_jobs(back_ends, settings, device),
        *exchange_jobs(partners, settings, device),
        *host_jobs(everybody, settings, device),
        *contention_jobs(stream, exchanging, control, settings, device),
    ]
    try:
        with torch.no_grad():
            figures = measure(progress(jobs * settings.rounds), settings, control)
    finally:
        stream.close()
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, _hardware_name(device), group=control)
    if dist.get_rank() != 0:
        return None
    measured = _described(names, settings, device)
    cluster = measured_cluster(figures, settings, len(names) // settings.node_size, name, measured)
    if device.type == "cpu":
        return cluster
    memory_gib = torch.cuda.mem_get_info(device)[1] / 2**30
    return with_card(cluster, memory_gib, load_cluster(default_cluster(device)))


# Experts by `on_cuda`: Mixtral-8x7B's, and one that a processor computes in milliseconds.
_EXPERTS = {False: ExpertSizes(512, 1024, True), True: DEFAULT_SIZES}


def _settings(
    expert: ExpertSizes | None, node_size: int | None, quick: bool
) -> tuple[CalibrationSettings, torch.device]:
    on_cuda = not cpu_needed()
    world_size = dist.get_world_size()
    if on_cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own: torch sees "
                f"{torch.cuda.device_count()}; start as many ranks on a node as it has GPUs"
            )
        torch.cuda.set_device(local_rank)
    if node_size is None:
        node_size = launcher.ranks_per_node(
            os.environ, world_size, torch.cuda.device_count() if on_cuda else 0, on_cuda=on_cuda
        )
    if world_size % node_size:
        works = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"nodes of {node_size} ranks do not divide the {world_size} ranks; give --node-size "
            f"with one of {works}"
        )
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    made = make_settings(expert or _EXPERTS[on_cuda], node_size, on_cuda=on_cuda, quick=quick)
    # On a processor, the ranks of a node share its memory.
    free = torch.cuda.mem_get_info()[0] if on_cuda else memory.available_bytes() // node_size
    made.check_memory(free)
    return made, device


def _hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _described(
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
