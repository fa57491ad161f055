"""Sums of bits see any change of a matrix, and a `Verifier` sums up what its setting says."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_laer.choices import Verify
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.runtime import verifier
from megatron_laer.runtime.verifier import Verifier
from megatron_laer.verify import sums
from megatron_laer.verify.sums import bit_sums
from megatron_laer.verify.weights import Read, VerificationError, differences
from tests.placed import placed

DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return random bits, which are NaN and infinite numbers as well."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_parts_add_up_wherever_a_matrix_is_cut(dtype: torch.dtype) -> None:
    matrices = drawn(3, 7, 11, dtype=dtype)
    whole = bit_sums(matrices)
    for cut in range(8):
        parts = matrices[:, :cut], matrices[:, cut:]
        of_parts = [bit_sums(part, first) for part, first in zip(parts, (0, cut * 11), strict=True)]
        assert torch.equal(sum(of_parts), whole)
    with mock.patch.object(sums, "_CHUNK", 8):
        assert torch.equal(bit_sums(matrices), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_and_every_two_swapped_elements_change_the_sum(
    dtype: torch.dtype,
) -> None:
    matrix = drawn(1, 5, 9, dtype=dtype, seed=1)
    expected, bits = bit_sums(matrix), matrix.view(torch.uint8).view(-1)
    for at in range(8 * len(bits)):
        bits[at // 8] ^= 1 << at % 8
        assert not torch.equal(bit_sums(matrix), expected), at
        bits[at // 8] ^= 1 << at % 8
    elements = bits.view(-1, dtype.itemsize)
    for one in range(len(elements)):
        for other in range(one):
            if not torch.equal(elements[one], elements[other]):
                elements[[one, other]] = elements[[other, one]]
                assert not torch.equal(bit_sums(matrix), expected), (one, other)
                elements[[one, other]] = elements[[other, one]]
    assert torch.equal(bit_sums(matrix), expected)


def test_slots_that_a_layout_leaves_free_are_not_compared() -> None:
    layout = ExpertLayout.from_slots(2, 3, 4, [0, 1, 2, 2, 3, EMPTY])
    read = Read("layer 1", "forward", 0, "direct", placed(layout, at_home=True))
    owned_NEM = np.arange(16).reshape(2, 4, 2)
    slots_NCM = np.full((2, 1, 2), 7)
    slots_NCM[0, 0] = owned_NEM.sum(axis=0)[2]
    assert [*differences(read, slots_NCM, owned_NEM)] == []
    slots_NCM[0, 0, 1] += 1
    assert [*differences(read, slots_NCM, owned_NEM)] == [(0, 0, 2, 1)]


LAYERS = ("layer 1", "layer 2", "layer 3")


class Reads:
    """Reads of a rank without peers, by the `Verifier` that it holds."""

    def __init__(self, setting: Verify | int) -> None:
        self.way = "direct"
        choose = lambda _: SimpleNamespace(name=self.way)  # noqa: E731
        streams: Any = SimpleNamespace(readers=[], exchange=SimpleNamespace(choose=choose))
        groups: Any = SimpleNamespace(size=1, rank=0, index=0, ranks=(0,))
        self.readers = streams.readers
        self.verifier = Verifier(setting, groups, streams, torch.device("cpu"))
        self.placed = placed(ExpertLayout.from_slots(1, 2, 2, [0, 1]))
        self.matrices = [drawn(2, 3, 4, dtype=torch.bfloat16)]
        self.owned = self.matrices[0].clone()
        self.share: Any = SimpleNamespace(
            form=SimpleNamespace(parts=("bf16",)),
            sizes=[(3, 4)],
            bit_sums=lambda *_: bit_sums(self.owned).unsqueeze(1),
        )

    def read(self, layer: str) -> None:
        weights: Any = SimpleNamespace(
            name=layer, share=self.share, index=SimpleNamespace(placed=self.placed)
        )
        for reader in self.readers:
            reader(weights, self.matrices)

    def step(self, step: int) -> int:
        """Return the reads that were compared of one of each layer."""
        before = self.verifier.checks
        self.verifier.begin_step(step, LAYERS)
        for layer in LAYERS:
            self.read(layer)
        self.verifier.end_step()
        return self.verifier.checks - before


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Gather from no other rank."""
    alone = mock.patch.object(verifier, "gather_integers", lambda own, *_: own.numpy()[None])
    with alone:
        yield


@pytest.mark.parametrize(
    ("setting", "compared"),
    [
        (Verify.OFF, [0] * 8),
        (Verify.ALL, [3] * 8),
        # The first two steps whole, then a layer of each step 6, 9, 12.
        (3, [3, 3, 1, 0, 0, 1, 0, 0]),
        (1, [3, 3, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_setting_says_which_reads_are_compared(
    setting: Verify | int, compared: list[int]
) -> None:
    reads = Reads(setting)
    reads.verifier.start()
    assert [reads.step(step) for step in range(4, 12)] == compared
    reads.verifier.close()
    assert reads.readers == []


def test_each_layer_has_its_turn() -> None:
    reads, seen = Reads(10), list[str]()
    reads.verifier.start()
    reads.step(0), reads.step(1)
    for step in range(2, 61):
        reads.verifier.begin_step(step, LAYERS)
        seen += reads.verifier._layers
        reads.verifier.end_step()
    assert seen == ["layer 2", "layer 3", "layer 1"] * 2
    reads.verifier.close()


def test_a_new_kind_of_exchange_is_compared_at_its_first_use_and_evaluations_are_not() -> None:
    reads = Reads(1000)
    reads.verifier.start()
    reads.step(1), reads.step(2)
    reads.read("layer 1")  # between steps
    assert reads.step(3) == 0
    reads.way = "relay"
    assert [reads.step(4), reads.step(5)] == [1, 0]
    reads.verifier.close()


def test_owners_are_summed_up_when_they_are_read_and_compared_before_torchs_optimizers_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reads = Reads(Verify.ALL)
    reads.verifier.start()
    reads.verifier.begin_step(0, LAYERS)
    reads.read("layer 1")
    reads.owned.view(torch.uint8).zero_()  # another optimizer's step, within the step
    reads.verifier.end_step()
    assert reads.verifier.checks == 1

    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reads.verifier.begin_step(1, LAYERS)
    reads.read("layer 2")
    with pytest.raises(VerificationError, match=r"step 1: layer 2, .*before the optimizer's step"):
        optimizer.step()
    assert parameter.item() == 1.0
    reads.verifier.close()
    optimizer.step()
    assert parameter.item() == 0.0
