"""A Slurm for tests, run by the own user: controller, nodes on loopback addresses, and jobs.

Needs the programs of Slurm and munge, but no systemd, cgroups or names to resolve. Only installing
them needs root. Several of these clusters can run at once.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
INSTALL = f"apt-get install --no-install-recommends {PACKAGES}"
NEEDED_VARIABLE = "MEGATRON_LAER_NEED_SLURM"
PROGRAMS = "munged slurmctld slurmd sbatch salloc scancel scontrol sinfo srun squeue".split()
# Debian puts the daemons where only root's PATH leads.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

_START_S = 120.0
_WAIT_S = 900.0
_FINAL = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL TIMEOUT".split())


def require_programs() -> None:
    """Skip a test where programs of Slurm are missing; fail it where Slurm is needed."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        message = f"Slurm is not installed: {INSTALL} (missing: {', '.join(missing)})"
        if os.environ.get(NEEDED_VARIABLE) == "1":
            pytest.fail(message)
        pytest.skip(message)


@dataclass(frozen=True)
class Cluster:
    """Slurm's nodes on this machine, each with fake GPUs; `folder` has all of its files and logs.

    The names of nodes are addresses.
    """

    folder: Path
    nodes: tuple[str, ...]

    def environment(self, **more: str) -> dict[str, str]:
        """Return this environment for the cluster's commands, without a Slurm job's variables."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SALLOC_"))
        }
        return kept | {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")} | more

    def run(
        self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> str:
        result = subprocess.run(
            words,
            env=self.environment(**(environment or {})),
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600.0,
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {result.returncode}: {result.stdout}")
        return result.stdout

    def submit(
        self,
        *words: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        log: str = "%j",
    ) -> Job:
        """Submit a job; the `log` of an array's tasks is `%A_%a`, as their names."""
        sbatch = ("sbatch", "--parsable", f"--output={self.folder}/jobs/{log}.log", *words)
        return Job(self, self.run(*sbatch, cwd=cwd, environment=environment).strip())

    def cancel_jobs(self) -> None:
        self.run("scancel", f"--user={getpass.getuser()}")
        deadline_s = time.monotonic() + _WAIT_S
        while left := self.run("squeue", "--noheader"):
            assert time.monotonic() < deadline_s, f"still there:\n{left}"
            time.sleep(0.1)


@dataclass(frozen=True)
class Job:
    """Submitted job; its name is its number, or that of its array and of its task."""

    cluster: Cluster
    name: str

    @property
    def log(self) -> str:
        path = self.cluster.folder / "jobs" / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def field(self, name: str) -> str:
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.name)
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)[name]

    def signal(self, name: str, *options: str) -> None:
        self.cluster.run("scancel", f"--signal={name}", *options, self.name)

    def wait_until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = 900.0
    ) -> None:
        """Wait until the condition holds; AssertionError with the log if the job ends first."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            state = self.field("JobState")
            if condition():
                return
            assert state not in _FINAL, f"{state}, and not yet {what}:\n{self.log[-6000:]}"
            assert time.monotonic() < deadline_s, f"{state}, not yet {what}:\n{self.log[-6000:]}"
            time.sleep(0.1)

    def wait_for_text(self, text: str, count: int = 1) -> None:
        self.wait_until(lambda: self.log.count(text) >= count, f"{count} × {text!r} in its log")

    def processes(self) -> list[psutil.Process]:
        """Return all processes that have this job's number, its own shell and ranks among them."""
        found = []
        for process in _processes(self.cluster):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == self.name:
                    found.append(process)
        return found

    def launchers(self, node: str) -> list[psutil.Process]:
        """Return the processes of torchrun on a node, one or none."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                of_node = process.environ().get("SLURMD_NODENAME") == node
                words = process.cmdline()[1:4]
                if of_node and words[:2] == ["-P", "-c"] and "torch.distributed.run" in words[2]:
                    found.append(process)
        return found

    def end(self) -> str:
        self.wait_until(lambda: self.field("JobState") in _FINAL, "ended")
        return self.field("JobState")

    def restart_now(self) -> None:
        """Shorten the two minutes that requeued jobs wait by default."""
        self.wait_until(lambda: self.field("JobState") == "PENDING", "requeued")
        # Its credentials are still refused in the second of its end.
        self.cluster.run("scontrol", "update", f"JobId={self.name}", "StartTime=now+2")


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Yield a running cluster of two nodes with two GPUs each; end it with all its jobs.

    The folder must be empty and have a short path: a socket's has 107 characters at most.
    """
    # All of 127/8 is this machine. Not 127.0.0.1, where others listen.
    network = f"127.{random.randrange(1, 255)}.{random.randrange(255)}"
    cluster = Cluster(folder, (f"{network}.1", f"{network}.2"))
    _write_files(cluster)
    try:
        _start(cluster)
        yield cluster
    finally:
        _end(cluster)


def _write_files(cluster: Cluster) -> None:
    folder, nodes = cluster.folder, cluster.nodes
    for name in ("munge", "state", "log", "dev", "jobs", *(f"spool/{node}" for node in nodes)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(stat.S_IRUSR)
    (folder / "munge").chmod(stat.S_IRWXU)
    for number in range(2):
        # Without a file Slurm does not count a GPU, and a regular file sets no variable.
        (folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
    controller_port, *ports = free_ports(nodes[0], 1 + len(nodes))
    host, user = socket.gethostname(), getpass.getuser()
    described = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs=4 "
        "RealMemory=4096 Gres=gpu:2"
        for node, port in zip(nodes, ports, strict=True)
    )
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}({nodes[0]})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# A node whose daemon gets no processor for that long is taken for lost.
SlurmdTimeout=60
SlurmctldTimeout=60
MinJobAge=86400
# Ports follow from it, and may be used by another cluster.
FirstJobId={random.randrange(1, 50_000_000)}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
GresTypes=gpu
{described}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
""")
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/dev/gpu[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def free_ports(address: str, count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    munge = folder / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    files["seed-file"] = "seed"
    cluster.run("munged", "--force", *(f"--{key}={munge / name}" for key, name in files.items()))
    cluster.run("slurmctld", "-i")
    for node in cluster.nodes:
        start_node(cluster, node)
    deadline_s = time.monotonic() + _START_S
    shown = ""
    while shown != f"{len(cluster.nodes)} idle":
        if time.monotonic() > deadline_s:
            logs = [path.read_text() for path in sorted((folder / "log").iterdir())]
            raise RuntimeError(f"Slurm did not start ({shown}):\n" + "\n".join(logs))
        with contextlib.suppress(RuntimeError):  # it may not listen yet
            found = cluster.run("sinfo", "--noheader", "--partition=test", "--format=%D %T")
            shown = found.strip()
        time.sleep(0.1)


def start_node(cluster: Cluster, node: str) -> None:
    cluster.run("slurmd", "-N", node)


def kill_node(cluster: Cluster, node: str, silently: bool) -> None:
    """Kill a node's daemon and all its processes with SIGKILL.

    With `silently`, Slurm learns of it only by missing the node. Otherwise the step's manager still
    reports the ends of its processes, and ends itself.
    """
    victims = [psutil.Process(int((cluster.folder / f"slurmd.{node}.pid").read_text()))]
    for process in _processes(cluster):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURMD_NODENAME") == node:
                managers = [each for each in process.parents() if each.name() == "slurmstepd"]
                victims += [*managers, process] if silently else [process]
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            if silently or process.name() != "slurmstepd":
                process.kill()
    psutil.wait_procs(victims, timeout=60.0)


def _processes(cluster: Cluster) -> list[psutil.Process]:
    """Return all processes with this cluster's configuration."""
    mine = str(cluster.folder / "slurm.conf")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == mine:
                found.append(process)
    return found


def _end(cluster: Cluster) -> None:
    with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, AssertionError):
        cluster.cancel_jobs()
    for path in (*cluster.folder.glob("*.pid"), cluster.folder / "munge" / "pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGTERM)
    left = _processes(cluster)
    _, left = psutil.wait_procs(left, timeout=10.0)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10.0)
