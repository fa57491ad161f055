"""Lent tensors read like others, and no write to them is lost silently."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_laer.integrations.stock_tensors import LentExpert, Loan

Write = Callable[[torch.Tensor, torch.Tensor], object]


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.data = value


def _set_rows(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor[:] = value


def _fill_by_parts(tensor: torch.Tensor, value: torch.Tensor) -> None:
    for part, of_value in zip(tensor.chunk(2), value.chunk(2), strict=True):
        part.view(-1).copy_(of_value.view(-1))


def _wrap(tensor: torch.Tensor, value: torch.Tensor) -> None:
    torch.nn.Parameter(tensor, requires_grad=False).data.copy_(value)


# Each makes the tensor equal to the value. Collectives run in a group of one rank.
WRITES: dict[str, Write] = {
    "copy_": lambda tensor, value: tensor.copy_(value),
    "data.copy_": lambda tensor, value: tensor.data.copy_(value),
    "data =": _set_data,
    "detach": lambda tensor, value: tensor.detach().copy_(value),
    "[:] =": _set_rows,
    "views": _fill_by_parts,
    "Parameter": _wrap,
    "copy.copy": lambda tensor, value: copy.copy(tensor).copy_(value),
    "alias": lambda tensor, value: torch.ops.aten.alias(tensor).copy_(value),
    "other bits": lambda tensor, value: tensor.view(torch.uint8).copy_(value.view(torch.uint8)),
    "_foreach_copy_": lambda tensor, value: torch._foreach_copy_([tensor], [value]),
    "out=": lambda tensor, value: torch.add(value, 0, out=tensor),
    "arithmetic": lambda tensor, value: tensor.mul_(0).add_(value),
    "all_gather_into_tensor": lambda tensor, value: dist.all_gather_into_tensor(tensor, value),
    "all_to_all_single": lambda tensor, value: dist.all_to_all_single(tensor, value),
    "scatter": lambda tensor, value: dist.scatter(tensor, [value], src=0),
    "all_reduce": lambda tensor, value: dist.all_reduce(tensor.zero_().add_(value)),
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def lent(loan: Loan) -> tuple[torch.Tensor, LentExpert]:
    block = torch.arange(24.0).view(2, 4, 3)
    return block, LentExpert(block[1], loan)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_reach_the_owner_or_raise(write: Write) -> None:
    value = -torch.arange(12.0).view(4, 3)
    loan = Loan(is_writable=True)
    block, tensor = lent(loan)
    write(tensor, value)
    assert torch.equal(block[1], value) and loan.is_written
    assert torch.equal(block[0], torch.arange(12.0).view(4, 3))

    before = block.clone()
    loan.is_over = True
    with pytest.raises(RuntimeError, match="written back by now: write to it before"):
        write(tensor, value + 1)
    assert torch.equal(block, before)

    block, tensor = lent(Loan(is_writable=False))
    before = block.clone()
    with pytest.raises(RuntimeError, match=r"read-only: .*writable=True\), .*load_stock_named"):
        write(tensor, value)
    assert torch.equal(block, before)


@pytest.mark.parametrize(
    "exchange",
    [lambda t: t.set_(torch.zeros(4, 3)), lambda t: t.resize_(2), lambda t: _set_data(t, t[0])],
)
def test_other_memory_is_refused(exchange: Callable[[torch.Tensor], object]) -> None:
    block, tensor = lent(Loan(is_writable=True))
    with pytest.raises(RuntimeError, match="a copy of weights that FSEP has in slices: "):
        exchange(tensor)
    assert torch.equal(block, torch.arange(24.0).view(2, 4, 3))


def test_reads_give_plain_tensors(tmp_path: Path) -> None:
    loan = Loan(is_writable=False)
    block, tensor = lent(loan)
    expected = block[1].clone()
    torch.save(tensor, tmp_path / "saved.pt")
    with io.BytesIO() as between:
        ForkingPickler(between).dump(tensor)
        sent = pickle.loads(between.getvalue())
    received = [torch.empty(4, 3)]
    dist.all_gather(received, tensor)
    reads = {
        "clone": tensor.clone(),
        "to": tensor.to(torch.float64).float(),
        "cat": torch.cat([tensor[:2], tensor[2:]]),
        "product": torch.eye(4) @ tensor,
        "deepcopy": copy.deepcopy(tensor),
        "torch.save": torch.load(tmp_path / "saved.pt"),
        "pickle": pickle.loads(pickle.dumps(tensor)),
        "another process": sent,
        "numpy": torch.tensor(tensor.numpy()),
        "tolist": torch.tensor(tensor.tolist()),
        "all_gather": received[0],
        "copy_": torch.empty_like(tensor, device="cpu").copy_(tensor.detach()),
    }
    for name, read in reads.items():
        assert type(read) is torch.Tensor and torch.equal(read, expected), name
    dist.broadcast(tensor, src=0)  # reads only the sender's
    assert tensor.data_ptr() == block[1].data_ptr() and not loan.is_written
    with pytest.raises(ValueError, match="read-only"):
        tensor.numpy()[0] = 1


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "clone": lambda tensor: tensor.clone(),
    "data": lambda tensor: tensor.data,
    "copy_": lambda tensor: torch.empty(4, 3).copy_(tensor),
    "all_gather": lambda tensor: dist.all_gather([torch.empty(4, 3)], tensor),
    "numpy": lambda tensor: tensor.numpy(),
    "tolist": lambda tensor: tensor.tolist(),
    "pickle": pickle.dumps,
    "another process": ForkingPickler.dumps,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_old_weights_cannot_be_read(read: Callable[[torch.Tensor], object]) -> None:
    version = 0
    _, tensor = lent(Loan(is_writable=False, is_old=lambda: version > 0))
    read(tensor)
    version = 1
    with pytest.raises(RuntimeError, match="have changed since: ask for it again"):
        read(tensor)


def test_marks_are_kept() -> None:
    plain = torch.zeros(2)
    plain.allreduce = False  # type: ignore[attr-defined]
    assert LentExpert(plain, Loan(is_writable=False)).allreduce is False  # type: ignore[attr-defined]
