"""Loops that write to a model's parameters by name reach the experts of FSEP too.

As in reinforcement learning, copies of models are swapped in place, and checkpoints are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_laer
from megatron_laer import session
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.distributed.test_stock_loading import flags_of

Named = Iterable[tuple[str, torch.Tensor]]
Write = Callable[[torch.Tensor, torch.Tensor], object]


class Copies:
    def __init__(self, read: Callable[[], Named]) -> None:
        self._read = read
        self._copies: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def backup(self, tag: str) -> None:
        kept = self._copies.setdefault(tag, {})
        for name, parameter in self._read():
            if name not in kept:
                kept[name] = torch.empty_like(parameter, device=torch.device("cpu"))
            kept[name].copy_(parameter.detach(), non_blocking=True)

    @torch.no_grad()
    def restore(self, tag: str) -> None:
        for name, parameter in self._read():
            parameter.copy_(self._copies[tag][name], non_blocking=True)


def _from_first_rank(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Receive from rank 0, in two halves, a value that only rank 0 has."""
    half = len(parameter) // 2
    for part, of_value in ((slice(half), value[:half]), (slice(half, None), value[half:])):
        if dist.get_rank() == 0:
            parameter[part].copy_(of_value)
        dist.broadcast(parameter[part], src=0)


WRITES: dict[str, Write] = {
    "copy_": lambda parameter, value: parameter.copy_(value),
    "data.copy_": lambda parameter, value: parameter.data.copy_(value),
    "data =": lambda parameter, value: setattr(parameter, "data", value),
    "_foreach_copy_": lambda parameter, value: torch._foreach_copy_([parameter], [value]),
    "broadcast": _from_first_rank,
}


def values(model: list[torch.nn.Module]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]


def swapped(flags: list[str]) -> None:
    def check(model: list[torch.nn.Module]) -> None:
        copies = Copies(
            lambda: (
                pair
                for chunk in model
                for pair in megatron_laer.stock_named_parameters(chunk, grouped=True, writable=True)
            )
        )
        actor = values(model)
        copies.backup("actor")
        with torch.no_grad():
            for chunk in model:
                for parameter in chunk.parameters():
                    parameter.mul_(-2).add_(1)
        reference = values(model)
        copies.backup("ref")
        assert not any(torch.equal(*pair) for pair in zip(actor, reference, strict=True))
        for tag, expected in ("actor", actor), ("ref", reference), ("actor", actor):
            copies.restore(tag)
            for found, kept in zip(values(model), expected, strict=True):
                assert torch.equal(found, kept), (tag, found.shape)

    train(flags, check)


def written(flags: list[str]) -> None:
    def check(model: list[torch.nn.Module]) -> None:
        (chunk,) = model

        def named(**given: Any) -> Iterator[tuple[str, torch.Tensor]]:
            return megatron_laer.stock_named_parameters(chunk, **given)

        group = session.get_fsep_group()
        for number, write in enumerate(WRITES.values()):
            expected = {
                name: torch.full_like(tensor, number).add_(torch.arange(tensor.shape[-1]))
                for name, tensor in named()
            }
            with torch.no_grad():
                for name, parameter in named(writable=True):
                    write(parameter, expected[name])
            for name, tensor in named():
                assert torch.equal(tensor, expected[name]), (number, name)

        late = {name: tensor for name, tensor in named(writable=True) if ".experts." in name}
        read = {name: tensor for name, tensor in named() if ".experts." in name}
        for given, words in (late, "has been written back by now"), (read, "is read-only"):
            for name, tensor in given.items():
                assert torch.equal(tensor, expected[name]), name
                for write in WRITES.values():
                    if write is not _from_first_rank or dist.get_rank(group) == 0:
                        with torch.no_grad(), pytest.raises(RuntimeError, match=words):
                            write(tensor, expected[name])
            for tensor in given.values():
                if dist.get_rank() == 0:
                    dist.broadcast(tensor, src=0)  # read and sent
                    continue
                with pytest.raises(RuntimeError, match=words):
                    dist.broadcast(tensor, src=0)
                dist.broadcast(tensor.clone(), src=0)  # otherwise the other rank would wait

        step = session.current()
        assert step is not None
        tensor = late[name]
        step.end_step(weights_changed=False)
        tensor.clone()
        step.end_step(weights_changed=True)
        with pytest.raises(RuntimeError, match="these have changed since"):
            tensor.clone()

        stopped = named(writable=True)
        tensor = next(tensor for name, tensor in stopped if ".experts." in name)
        tensor.zero_()
        with pytest.raises(RuntimeError, match="what was written is lost; iterate to the end"):
            stopped.close()  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"ask for the writable \[False, True\]"):
            named(writable=dist.get_rank() == 1)

    train(flags, check)


def test_copies_of_models_are_swapped_in_place(ranks: RankPools, text_data: str) -> None:
    ranks(2).run(swapped, flags_of(text_data))


def test_every_way_to_write_reaches_the_slices_or_raises(ranks: RankPools, text_data: str) -> None:
    ranks(2).run(written, flags_of(text_data))
