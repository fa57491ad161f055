"""Rows of `doctor` about the machine and the launcher, for given findings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import pytest

from megatron_laer.support import triton_needs
from megatron_laer.tools.cli import doctor
from megatron_laer.tools.doctor import machine
from megatron_laer.tools.doctor.check import Check, Status

CPU = {"cuda": "13.2", "cards": [], "device": "cpu", "cuda_error": "no device"}


@pytest.mark.parametrize(
    ("torch", "driver", "environment", "verdict"),
    [
        ({}, "", {}, "ok: no GPU: Megatron runs on the CPU"),
        ({}, "580.1", {}, "missing: torch sees no card: no device"),
        ({}, "580.1", {"CUDA_VISIBLE_DEVICES": ""}, "ok: cards are turned down"),
        ({}, "580.1", {"CUDA_VISIBLE_DEVICES": "7"}, "missing: torch sees no card: no device"),
        ({}, "580.1", {"MEGATRON_LAER_DEVICE": "cpu"}, "ok: cards are turned down"),
        ({"device": "cuda"}, "", {"MEGATRON_LAER_DEVICE": "cuda"}, "missing: asked for: no device"),
        ({"cards": ["1 x H100"]}, "580.1", {"MEGATRON_LAER_DEVICE": "cpu"}, "ok: cards are turned"),
        ({"cards": ["1 x H100"], "device": "cuda"}, "580.1", {}, "ok"),
    ],
)
def test_unusable_cards_are_told_from_none(torch, driver, environment, verdict, monkeypatch):
    monkeypatch.setattr(machine, "_driver", lambda: driver)
    row = machine.cuda(CPU | torch, environment)
    assert row.status_and_note.startswith(verdict)
    assert row.found == "torch's 13.2" + (f", driver {driver}" if driver else "")


def launcher(world: str, rank: str, local: str, values: str) -> dict[str, str]:
    return dict(zip((world, rank, local), values.split(), strict=True))


TORCHRUN = launcher("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "8 3 4")
MPI = "OMPI_COMM_WORLD_{}".format
MPIRUN = launcher(MPI("SIZE"), MPI("RANK"), MPI("LOCAL_SIZE"), "8 0 2")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE")


@pytest.mark.parametrize(
    ("environment", "launched", "node_size"),
    [
        ({}, "none", "1 (no launcher tells, so all ranks are on one node)"),
        ({"SLURM_JOB_ID": "7"}, "none, in Slurm's job 7", "1 (no launcher tells"),
        (TORCHRUN, "torchrun: rank 3 of 8", "4 (LOCAL_WORLD_SIZE)"),
        (MPIRUN, "Open MPI: rank 0 of 8", "2 (OMPI_COMM_WORLD_LOCAL_SIZE)"),
        (launcher(*SLURM, "8 5 4(x2)"), "Slurm: rank 5 of 8", "4 (SLURM_STEP_TASKS_PER_NODE)"),
        ({"WORLD_SIZE": "8"}, "torchrun: no rank of 8", "8 (no launcher tells"),
    ],
    ids=["none", "job", "torchrun", "mpirun", "srun", "world only"],
)
def test_the_launcher_and_the_node_size_are_as_training_sees_them(environment, launched, node_size):
    assert machine.launched(environment).found == launched
    assert machine.node_size(environment, 0, False).found.startswith(node_size)


def test_a_node_size_that_training_would_refuse_is_unsupported():
    row = machine.node_size({"WORLD_SIZE": "16"}, 8, True)
    assert row.status is Status.UNSUPPORTED
    assert "16 ranks on nodes of 8 GPUs" in row.note


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        ("32", "ok"),
        ("1", "optional: exchanges"),
        ("0", "unsupported"),
        ("x\n", "unsupported"),
        ("9" * 5000, "unsupported"),
    ],
)
def test_connections_are_judged_on_a_gpu(value, verdict):
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": value}
    assert machine.connections(environment, True).status_and_note.startswith(verdict)
    assert not machine.connections(environment, False).stops


def test_triton_needs_a_compiler_and_headers_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_needs, "is_installed", lambda: True)
    monkeypatch.setattr(triton_needs.sysconfig, "get_paths", lambda **_: {"include": tmp_path})
    environment = {"PATH": str(tmp_path)}
    assert machine.triton(environment, False).status is Status.OK
    row = machine.triton(environment, True)
    assert row.stops and "no C compiler (gcc or clang)" in row.note
    (tmp_path / "nvc").touch(0o755)
    row = machine.triton(environment | {"CC": "nvc"}, True)
    assert row.stops and f"{tmp_path} has no Python.h" in row.note
    (tmp_path / "Python.h").touch()
    assert machine.triton(environment | {"CC": "nvc"}, True).status is Status.OK
    monkeypatch.setattr(triton_needs, "is_installed", lambda: False)
    row = machine.triton(environment, True)
    assert row.status is Status.OPTIONAL and "Triton is not installed" in row.note


CHECKOUT = {"folder": "/megatron", "builds_helper": True, "has_helper": False}


def test_a_checkout_of_megatron_needs_the_tools_that_build_its_helper(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    check = machine.dataset_helper(CHECKOUT, {"CXX": "nvc++ -x"})
    assert check.stops and "make, nvc++, python3, python3-config, not in the PATH" in check.note
    for name in ("make", "g++", "python3", "python3-config"):
        (tmp_path / name).touch(0o755)
    assert machine.dataset_helper(CHECKOUT, {}).status is Status.OK


def test_a_wheel_of_megatron_brings_its_helper_or_is_broken():
    wheel = CHECKOUT | {"builds_helper": False}
    assert machine.dataset_helper(wheel | {"has_helper": True}, {}).status is Status.OK
    assert machine.dataset_helper(wheel, {}).stops


def test_the_verdict_comes_first_then_reasons_against_it_and_all_is_escaped(monkeypatch, capsys):
    torch = Check("torch", "boom \x1b[31m\nFAKE  ok", Status.MISSING, "\u202e")
    monkeypatch.setattr(doctor, "examine", lambda _: iter([Check("numpy", "2.0"), torch]))
    assert doctor.run(argparse.Namespace()) == 1
    verdict, nothing, first, second = capsys.readouterr().out.splitlines()
    assert (verdict, nothing) == ("missing or unsupported: torch", "")
    assert first.startswith("torch ") and r"boom \x1b[31m\nFAKE  ok" in first
    assert first.endswith(" missing: \\u202e") and second.startswith("numpy ")


def test_a_terminal_is_asked_for_patience(monkeypatch, capsys):
    def rows(environment: object) -> Iterator[Check]:
        assert "importing torch" in capsys.readouterr().err
        yield Check("torch", "2.15")

    monkeypatch.setattr(doctor, "examine", rows)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert doctor.run(argparse.Namespace()) == 0
