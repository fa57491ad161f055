"""Back end `torch`: torch's `grouped_mm`, one call for all slots.

On GPUs of compute capability 9 and 10 and in bf16 that is one kernel. Elsewhere torch copies the
offsets to the host and loops over the slots, which would make every layer wait. On the CPU, where
nothing waits, it runs in fp32 too.

Weight gradients are those of `loop`. `grouped_mm` can neither write to given memory, nor float32
from bf16. A copy to the exchanged buffer would take longer than the `torch.mm` launches it saves.

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate as running_sums
from typing import Any

import torch

from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.layer.experts.gemm.loop import Loop
from megatron_laer.runtime.comm.copies import upload

_ALIGNMENT = 16  # of rows, in bytes
_CAPABILITIES = (9, 10)
_KEPT = 64  # uploaded offsets, which a microbatch's four products share


class _Torch(Loop):
    """`SlotGemm` by one call for all slots, except for weight gradients."""

    def problem(
        self, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
    ) -> str | None:
        way_out = "give --fsep-set gemm=loop"
        if _grouped_mm() is None:
            return (
                f"torch {torch.__version__} has no torch.nn.functional.grouped_mm; install a newer "
                f"torch, or {way_out}"
            )
        if device.type == "cuda":
            if dtype != torch.bfloat16:
                return f"on a GPU it computes in bf16, not in {dtype}; give --bf16, or {way_out}"
            capability = torch.cuda.get_device_capability(device)
            if capability[0] not in _CAPABILITIES:
                found = ".".join(map(str, capability))
                return (
                    f"the card has compute capability {found}, for which torch has no grouped "
                    f"kernel (it has for 9.0 and 10.0); {way_out}"
                )
        multiple = _ALIGNMENT // dtype.itemsize
        odd = sorted({size for size in sizes if size % multiple})
        if odd:
            return (
                f"sizes of experts must be multiples of {multiple} in {dtype}, and "
                f"{', '.join(map(str, odd))} is not; {way_out}"
            )
        return None

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        return _multiply(input_TK, weight_CRK.transpose(1, 2), tokens_C)

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        return _multiply(grad_TR, weight_CRK, tokens_C)


def _multiply(
    tokens_TX: torch.Tensor, weight_CXY: torch.Tensor, tokens_C: Sequence[int]
) -> torch.Tensor:
    """Return the tokens of each slot times its matrix; X and Y are R and K or the reverse."""
    if not len(tokens_TX):
        return tokens_TX.new_empty(0, weight_CXY.shape[2])
    grouped_mm = _grouped_mm()
    assert grouped_mm is not None, "the back end was not asked for its problem"
    ends_C = _ends(tuple(tokens_C), tokens_TX.device)
    output_TY: torch.Tensor = grouped_mm(tokens_TX.contiguous(), weight_CXY, offs=ends_C)
    return output_TY


@functools.lru_cache(maxsize=_KEPT)
def _ends(tokens_C: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return upload(torch.tensor(list(running_sums(tokens_C)), dtype=torch.int32), device)


def _grouped_mm() -> Any:
    return getattr(torch.nn.functional, "grouped_mm", None)


GEMM: SlotGemm = _Torch()
