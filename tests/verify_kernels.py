"""The Triton kernels of sums equal torch, in Triton's interpreter or on a card.

`TRITON_INTERPRET=1 python -m tests.verify_kernels` checks them on the CPU. Triton reads this at
import, so tests start a process.
"""

from __future__ import annotations

import itertools

import torch

from megatron_laer.verify import kernels
from megatron_laer.verify.sums import bit_sums, signed_sums

# Matrices, elements of each, and elements between their ends, within and over a program's part.
SIZES = ((1, 1, 0), (3, 15, 1), (2, 2048, 0), (5, 2049, 7), (2, 2**15 + 3, 0), (1, 2**17 - 1, 0))
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)
# Of a part's first element. Numbers of places have 64 bits.
FIRST = (0, 1, 2**30)


def check_all(device: str) -> int:
    """Compare sums of rows that lie apart and, from the second on, on any address."""
    draws = torch.Generator().manual_seed(1)
    cases = list(itertools.product(SIZES, DTYPES, FIRST))
    for (number, elements, gap), dtype, first in cases:
        size = number, (elements + gap) * dtype.itemsize
        memory = torch.randint(0, 256, size, dtype=torch.uint8, generator=draws).view(dtype)
        expected = bit_sums(memory[:, :elements], first)
        bits_NP = memory.to(device).view(torch.uint8).view(_BITS[dtype.itemsize])[:, :elements]
        of_parts = kernels.bit_sums(bits_NP, first)
        assert torch.equal(of_parts.sum(dim=1).cpu(), expected), (number, elements, dtype, first)
        if dtype.is_floating_point:
            floats = torch.randn(number, elements + gap, generator=draws).to(dtype)[:, :elements]
            signed = kernels.signed_sums(floats.to(device), first).sum(dim=1).cpu()
            # Other orders of the same additions.
            at_most = 1e-13 * elements
            torch.testing.assert_close(signed, signed_sums(floats, first), rtol=0, atol=at_most)
    return len(cases)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

if __name__ == "__main__":
    print(f"{check_all('cpu')} cases")
