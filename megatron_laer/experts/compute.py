"""Linear layers over restored experts, one GEMM per slot.

Back end of the experts' compute; the activation between the two layers is Megatron's own (see
`experts.module`). Runs no collective.

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch

from megatron_laer.runtime.weights.restored import RestoredExperts


class _SlotLinear(torch.autograd.Function):
    """`F.linear` of each slot's tokens with the slot's matrix.

    The matrices come from the handle, in forward and again in backward, so that they can be freed
    in between; the ticket stands for them in autograd's graph. Writes every slot's weight gradient
    straight into the `[C, R, K]` buffer that is exchanged; separate `F.linear` calls would leave C
    tensors to be stacked.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        input_TK: torch.Tensor,
        ticket_CRK: torch.Tensor,
        restored: RestoredExperts,
        position: int,
        tokens_C: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(input_TK)
        ctx.restored, ctx.position, ctx.tokens_C = restored, position, tokens_C
        weight_CRK = restored.matrix(position)
        output_TR = input_TK.new_empty(input_TK.shape[0], ticket_CRK.shape[1])
        for weight_RK, (start, end) in zip(weight_CRK.unbind(0), _spans(tokens_C), strict=True):
            torch.mm(input_TK[start:end], weight_RK.t(), out=output_TR[start:end])
        return output_TR

    @staticmethod
    def backward(ctx: Any, grad_TR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (input_TK,) = ctx.saved_tensors
        weight_CRK = ctx.restored.matrix(ctx.position)
        input_needs, weight_needs = ctx.needs_input_grad[:2]
        grad_input_TK = torch.empty_like(input_TK) if input_needs else None
        grad_weight_CRK = ctx.restored.new_grad(weight_CRK) if weight_needs else None
        for slot, (start, end) in enumerate(_spans(ctx.tokens_C)):
            grad = grad_TR[start:end]
            if grad_input_TK is not None:
                torch.mm(grad, weight_CRK[slot], out=grad_input_TK[start:end])
            if grad_weight_CRK is not None:
                torch.mm(grad.t(), input_TK[start:end], out=grad_weight_CRK[slot])
        if ctx.position == 0:  # the first layer is the last to need the weights in backward
            ctx.restored.release()
        return grad_input_TK, grad_weight_CRK, None, None, None


def _spans(tokens_C: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(tokens_C, initial=0)))


class SlotLinear(torch.nn.Module):
    """Stands where Megatron's MLP expects a linear layer; owns no parameter.

    `bind` gives it the weights of one forward call, `unbind` takes them away.
    """

    def __init__(
        self, input_size: int, output_size: int, *, position: int, init_method: Any
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.position = position
        self.init_method = init_method
        self._bound: tuple[torch.Tensor, RestoredExperts, list[int]] | None = None

    def bind(
        self, ticket_CRK: torch.Tensor, restored: RestoredExperts, tokens_C: list[int]
    ) -> None:
        """Use these slots' weights; the input's rows are sorted by slot, `tokens_C[c]` each."""
        self._bound = (ticket_CRK, restored, tokens_C)

    def unbind(self) -> None:
        """Forget the weights, so that they can be freed."""
        self._bound = None

    def forward(self, input_TK: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Megatron's convention: the output, and no bias."""
        assert self._bound is not None, "SlotLinear called without weights"
        ticket_CRK, restored, tokens_C = self._bound
        return _SlotLinear.apply(input_TK, ticket_CRK, restored, self.position, tokens_C), None
