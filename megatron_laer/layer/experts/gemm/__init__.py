"""Interface and names of GEMM back ends, which multiply the tokens of a rank's slots.

A back end is a module of this folder, of the same name, with an object `GEMM` that implements
`SlotGemm`. It only computes: the caller owns weights, gradients and autograd
(`layer/experts/slot_linear.py`).

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from megatron_laer.choices import GemmBackEnd

if TYPE_CHECKING:  # in this package, `torch` is the back end of that name
    import torch


class SlotGemm(Protocol):
    """Product of the tokens of each slot, in consecutive rows, with the slot's own matrix.

    `tokens_C` has the number of tokens of each slot, on the host, perhaps zero; their sum is T. A
    result is ready in the order of the current stream.
    """

    def problem(
        self, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
    ) -> str | None:
        """Return why this back end cannot compute there, with a remedy; None if it can."""
        return None

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        """Return the output `[T, R]`, as `F.linear` of each slot's tokens."""
        ...

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        """Return the gradient of the input `[T, K]`, given that of the output."""
        ...

    def kept(self, input_TK: torch.Tensor, tokens_C: Sequence[int]) -> Any:
        """Return the form of the input that `weight_grad` needs.

        It may be quantised: Megatron's combined schedule frees the input after forward.
        """
        return input_TK

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        kept_TK: Any,
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        """Write the gradients of all slots' matrices to `out_CRK`, zeros for slots without tokens.

        Args:
            kept_TK: the input as `kept` returned it.
            out_CRK: contiguous, in the tokens' dtype, or in float32 without rounding.
        """
        ...


def gemm_names() -> list[str]:
    return [name.value for name in GemmBackEnd]


def slot_gemm(name: str) -> SlotGemm:
    back_end: SlotGemm = importlib.import_module(f"{__name__}.{name}").GEMM
    return back_end


def check_gemm(
    name: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
) -> None:
    if (problem := slot_gemm(name).problem(device, dtype, sizes)) is not None:
        raise ValueError(f"--fsep-set gemm={name}: {problem}")
