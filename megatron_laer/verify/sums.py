"""Sums of a matrix's bits: one integer of 64 bits, which is the same wherever the matrix lies.

The bits of each element are an integer, and count as often as an odd number that its position has.
Integers are exact: neither the order of additions nor the number of parts changes a sum. A flipped
bit changes it by an odd number times a power of two below 2**64, so never goes unseen. Elements in
each other's places change it by the product of two differences, those of their bits and of their
positions' numbers.

Legend: N matrices, P elements of each.
"""

from __future__ import annotations

import torch

from megatron_laer.device import kernels_of

# Integers by the bytes of an element.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplier and shift by which positions become numbers without a pattern.
MULTIPLIER, SHIFT = 0x2545F4914F6CDD1D, 29
# Elements that torch widens to 8 bytes at once.
_CHUNK = 2**18


def launch_kernel(device: torch.device) -> None:
    """Launch the kernel for each size of an element, which compiles it before training."""
    for bits in _BITS.values():
        bit_sums(torch.zeros(1, 1, dtype=bits, device=device))


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
    for begin in range(0, bits_NP.shape[1], _CHUNK):
        part_NP = bits_NP[:, begin : begin + _CHUNK].to(torch.int64)
        places_P = torch.arange(part_NP.shape[1], device=bits_NP.device) + (first + begin)
        numbers_P = places_P * MULTIPLIER
        numbers_P = (numbers_P ^ (numbers_P >> SHIFT)) | 1
        sums_N += (part_NP * numbers_P).sum(dim=1)
    return sums_N
