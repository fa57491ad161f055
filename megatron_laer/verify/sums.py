"""Sums of a matrix that are the same wherever it lies, and add up over its parts.

**Of its bits**, one integer of 64. The bits of each element are an integer, and count as often as
an odd number that its position has. Integers are exact: neither the order of additions nor the
number of parts changes a sum. A flipped bit changes it by an odd number times a power of two below
2**64, so never goes unseen. Elements in each other's places change it by the product of two
differences, those of their bits and of their positions' numbers.

**With signs**, which bits of that number decide, in float64. They are linear, as an exchange's sums
are. An error e of the matrix changes such a sum by about its norm ‖e‖.

Legend: N matrices, P elements of each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_laer.device import kernels_of

# Integers by the bytes of an element.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplier and shift by which positions become numbers without a pattern.
MULTIPLIER, SHIFT = 0x2545F4914F6CDD1D, 29
# Sums with signs of a matrix, and the bit of a position's number that decides the first one's.
SIGNS, FIRST_SIGN = 4, 60
# Elements that torch widens to 8 bytes at once.
_CHUNK = 2**18


def launch_kernels(device: torch.device) -> None:
    """Launch the kernels for each type of an element, which compiles them before training."""
    for bits in _BITS.values():
        bit_sums(torch.zeros(1, 1, dtype=bits, device=device))
    for floats in (torch.bfloat16, torch.float16, torch.float32):
        signed_sums(torch.zeros(1, 1, dtype=floats, device=device))


@torch.no_grad()
def bit_sums(matrices: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return the sums of the bits of N matrices, int64 `[N]`, on the current stream.

    Args:
        matrices: `[N, …]` of any dtype; each one's elements are contiguous.
        first: position of each one's first element in a whole of which it is a part. The sums of
            all parts add up to the whole's.
    """
    bits_NP = matrices.detach().flatten(1).view(_BITS[matrices.element_size()])
    if (kernels := kernels_of("megatron_laer.verify", matrices.device)) is not None:
        of_blocks: torch.Tensor = kernels.bit_sums(bits_NP, first)
        return of_blocks.sum(dim=1)
    sums_N = torch.zeros(len(bits_NP), dtype=torch.int64, device=bits_NP.device)
    for part_NP, numbers_P in _chunks(bits_NP, first):
        sums_N += (part_NP.to(torch.int64) * numbers_P).sum(dim=1)
    return sums_N


@torch.no_grad()
def signed_sums(matrices: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return sums of N matrices of floats, float64 `[N, 5]`, as `bit_sums` does.

    Four have signs, and the last one is that of squares.
    """
    floats_NP = matrices.detach().flatten(1)
    if (kernels := kernels_of("megatron_laer.verify", matrices.device)) is not None:
        of_blocks: torch.Tensor = kernels.signed_sums(floats_NP, first)
        return of_blocks.sum(dim=1)
    shape, device = (len(floats_NP), SIGNS + 1), floats_NP.device
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    bits = torch.arange(FIRST_SIGN, FIRST_SIGN + SIGNS, device=device)
    for part_NP, numbers_P in _chunks(floats_NP, first):
        part_NP = part_NP.to(torch.float64)
        signs = 1 - 2 * ((numbers_P * MULTIPLIER)[:, None] >> bits & 1)
        sums[:, :SIGNS] += part_NP @ signs.to(torch.float64)
        sums[:, SIGNS] += part_NP.square().sum(dim=1)
    return sums


def _chunks(values_NP: torch.Tensor, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of the matrices with the numbers of their positions, int64 `[P]`."""
    for begin in range(0, values_NP.shape[1], _CHUNK):
        part_NP = values_NP[:, begin : begin + _CHUNK]
        places_P = torch.arange(part_NP.shape[1], device=part_NP.device) + (first + begin)
        numbers_P = places_P * MULTIPLIER
        yield part_NP, (numbers_P ^ (numbers_P >> SHIFT)) | 1
