"""A torch that is too old for a GPU is refused there, and nowhere else."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import megatron_laer
from megatron_laer import device, session
from megatron_laer.support.torch_version import problem_on_cuda


@pytest.mark.parametrize("version", ["2.8.0", "2.10.0+cu130", "2.15.0a0+git1", "3.0", "nightly"])
def test_new_ones_are_taken(version: str) -> None:
    assert problem_on_cuda(version) is None


@pytest.mark.parametrize("version", ["2.7.1", "2.6.0+cu124", "1.13"])
def test_old_ones_are_refused_with_the_way_out(version: str) -> None:
    problem = problem_on_cuda(version)
    assert problem is not None
    assert problem.startswith(f"torch {version} on a GPU: ")
    assert "install torch>=2.8, or train on the CPU with MEGATRON_LAER_DEVICE=cpu" in problem


def test_fsep_is_not_turned_on_with_an_old_torch_on_a_gpu() -> None:
    with (
        mock.patch.object(torch, "__version__", "2.7.1"),
        mock.patch.object(device, "cpu_installed", return_value=False),
        pytest.raises(ValueError, match=r"FSEP cannot run with torch 2\.7\.1 on a GPU"),
    ):
        megatron_laer.enable()
    assert session.current() is None
