"""Interface and names of GEMM back ends, which multiply the tokens of a rank's slots.

A back end is a module of this folder with an object `GEMM` that has the methods of `SlotGemm`. The
module's name is the back end's. It computes and does nothing else: the weights, the gradient's
memory and autograd are the caller's (`layer/experts/slot_linear.py`).

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_laer.config import GemmBackEnd

if TYPE_CHECKING:  # in this package, `torch` is the back end of that name
    import torch


class SlotGemm(Protocol):
    """Product of the tokens of each slot, which lie in a row, with the slot's own matrix.

    In all methods `tokens_C` has the number of tokens of each slot, on the host, and zeros among
    them; their sum is T. A result is written by the time the current stream gets there.
    """

    def problem(
        self, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
    ) -> str | None:
        """Return why this back end cannot compute there, with a way out; None if it can."""
        ...

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

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        input_TK: torch.Tensor,
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
        *,
        accumulate: bool = False,
    ) -> None:
        """Write the gradients of all slots' matrices to `out_CRK`, zeros for slots without tokens.

        Args:
            out_CRK: contiguous, in the tokens' dtype, or in float32, to which nothing is rounded.
            accumulate: add to `out_CRK`, instead of overwriting it.
        """
        ...


def gemm_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def gemm_in_force(asked: GemmBackEnd) -> GemmBackEnd:
    """Return the back end that computes; `auto` is `loop` while docs/gpu_status.md has no figures.

    With figures of a card, `auto` becomes what was fastest there.
    """
    return GemmBackEnd.LOOP if asked is GemmBackEnd.AUTO else asked


def slot_gemm(name: str) -> SlotGemm:
    """Return the back end of this name; no other one is imported."""
    if name not in gemm_names():
        raise ValueError(f"{name!r} is no GEMM back end; take one of: {', '.join(gemm_names())}")
    back_end: SlotGemm = importlib.import_module(f"{__name__}.{name}").GEMM
    return back_end


def check_gemm(
    name: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
) -> None:
    """Refuse a back end that cannot compute with this: see `SlotGemm.problem`."""
    if (problem := slot_gemm(name).problem(device, dtype, sizes)) is not None:
        raise ValueError(f"--fsep-gemm {name}: {problem}")
