"""Sums of bits and with signs see any change of a matrix, wherever it lies."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from megatron_laer.verify import sums
from megatron_laer.verify.sums import SIGNS, bit_sums, signed_sums
from tests.unit.test_restored_experts import streams as streams

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_with_signs_are_linear_and_see_where_a_number_lies(dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(2)
    one, other = (torch.randn(3, 7, 11, generator=draws).to(dtype) for _ in range(2))
    both = signed_sums(one.double() + 2 * other.double())
    expected = signed_sums(one)[:, :SIGNS] + 2 * signed_sums(other)[:, :SIGNS]
    torch.testing.assert_close(both[:, :SIGNS], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(signed_sums(one)[:, SIGNS], one.double().square().sum(dim=(1, 2)))
    parts = [signed_sums(part, first) for part, first in ((one[:, :3], 0), (one[:, 3:], 33))]
    torch.testing.assert_close(sum(parts), signed_sums(one), rtol=0, atol=1e-12)
    with mock.patch.object(sums, "_CHUNK", 8):
        torch.testing.assert_close(signed_sums(one), sum(parts), rtol=0, atol=1e-12)


def test_signs_are_as_good_as_drawn_ones() -> None:
    """Each sign is +1 in half of all places, next to any sign of places near it."""
    places = 2**16
    signs = signed_sums(torch.eye(2**11).view(2**11, 1, 2**11))[:, :SIGNS].T.numpy()
    assert set(np.unique(signs)) == {-1.0, 1.0}
    ones = torch.ones(1, places)
    spread = 5 * places**0.5
    assert (signed_sums(ones)[0, :SIGNS].abs() < spread).all()
    limit = 5 * signs.shape[1] ** 0.5
    for one in range(SIGNS):
        for other in range(one):
            assert abs((signs[one] * signs[other]).sum()) < limit
        for distance in (*range(1, 70), 128, 256, 512, 1024):
            assert abs((signs[one, distance:] * signs[one, :-distance]).sum()) < limit, distance
