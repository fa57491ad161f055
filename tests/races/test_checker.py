"""The checker's own distinction between races and order."""

from __future__ import annotations

import gc

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.copies import Download
from megatron_laer.runtime.comm.streams import make_comm_stream
from tests.fake_cuda.device import observed
from tests.fake_cuda.observing import effects
from tests.fake_cuda.streams import Stream, current_stream


def test_streams_may_read_together_and_write_other_bytes() -> None:
    with observed() as device:
        other, tensor = Stream(), torch.zeros(4, 4, device="cuda")
        other.wait_stream(current_stream())
        with torch.cuda.stream(other):  # type: ignore[arg-type]
            tensor[2:].add_(1)
            tensor[:2].sum()
        tensor[:2].sum()
    assert device.checker.races == []


def test_memory_that_another_stream_reads_must_be_recorded_or_waited_for_before_it_is_freed() -> (
    None
):
    def use(how: str) -> list[str]:
        with observed() as device:
            other, tensor = Stream(), torch.zeros(4, device="cuda")
            other.wait_stream(current_stream())
            with torch.cuda.stream(other):  # type: ignore[arg-type]
                tensor.sum()
            if how == "recorded":
                tensor.record_stream(other)  # type: ignore[arg-type]
            if how == "waited for":
                current_stream().wait_stream(other)
            if how == "the host waits":
                other.synchronize()
            frees = device.checker.frees
            del tensor
            gc.collect()
            assert device.checker.frees > frees
            assert device.checker.races == []
            torch.zeros(4, device="cuda")  # may get that memory
        return device.checker.races

    assert ["was not recorded" in race for race in use("nothing")] == [True]
    assert use("recorded") == use("waited for") == use("the host waits") == []


def test_memory_that_only_autograd_holds_is_not_taken_for_freed() -> None:
    with observed() as device:
        weight = torch.ones(3, requires_grad=True, device="cuda")
        output = (weight * 2).exp().sum()
        gc.collect()
        frees = device.checker.frees
        output.backward()
        assert device.checker.frees > frees


def test_a_pool_and_a_communication_stream_refuse_a_second_compute_stream() -> None:
    device = torch.device("cuda", 0)
    with observed():
        pool, comm_stream = BufferPool(), make_comm_stream("gradients", device, overlaps=True)
        tensor = pool.take((2,), torch.float32, device)
        assert comm_stream.submit(lambda: tensor.zero_(), "reduce").wait() is tensor
        with torch.cuda.stream(Stream()):  # type: ignore[arg-type]
            with pytest.raises(AssertionError, match=r"a buffer pool is used on stream \d+, and"):
                pool.put_back(tensor)
            with pytest.raises(AssertionError, match="the communication stream of gradients is"):
                comm_stream.submit(lambda: tensor, "reduce")


def read_late() -> list[str]:
    """Return a rank's report on copies to the host that are read after another one was started."""
    with observed():
        download = Download(torch.device("cuda", 0))
        said = []
        first, second = (download.start(torch.tensor([of], device="cuda")) for of in (0.0, 1.0))
        assert second().tolist() == [1.0]
        for read in (first, second):
            with pytest.raises(AssertionError) as caught:
                read()
            said.append(str(caught.value))
    return said


def test_a_copy_to_the_host_is_read_once_and_before_the_next(ranks: RankPools) -> None:
    (said,) = ranks(1).run(read_late)
    assert ["a copy is read twice, or after another one" in sentence for sentence in said] == [
        True,
        True,
    ]


def test_names_of_arguments_tell_what_every_collective_of_torch_touches() -> None:
    for schema in torch._C._jit_get_all_schemas():
        kind, _, name = schema.name.rpartition("::")
        if kind == "c10d" and name not in ("check_for_nan", "barrier", "monitored_barrier_"):
            names = [each.name for each in schema.arguments if "Tensor" in str(each.type)]
            assert any(effects(name, argument) for argument in names), schema
