"""Comparison of tokens that leave with those that arrive, and of outputs on their way back.

**Out.** A (token, expert) pair has one integer, of the bits of its hidden state and probability. An
expert's pairs add up to the same where the router sends them and in its slots.

**Back.** A token's output is the sum of its pairs', but for roundings. Tokens fall into groups by
the bits of their hidden states, which both sides know. Sums with signs of each group agree, as
those of gradients do. Norms add up without squares, since equal tokens have equal roundings.

Legend: N ranks, T tokens, E experts, C slots per rank, S = N·C slots, R rows, H hidden, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_laer.arrays import Float64, Int64
from megatron_laer.verify.checked import Checked
from megatron_laer.verify.gradients import Roundings
from megatron_laer.verify.sums import MULTIPLIER, SIGNS, bit_sums, signed_sums

# Rows in a group on average, within limits of the number of groups.
_ROWS, _LEAST, _MOST = 16, 2**6, 2**16
# Tokens of a group in the bound of numbers below float16's least.
_TOKENS = 16

Bound = Callable[..., Any]


class PassTokens:
    """Sums of the tokens of one forward pass of a layer on this rank.

    Args:
        tokens_C: rows of each local slot.
        rows: of all ranks together.
        used_here: takes tensors of another stream that the current one reads.
        done: takes this rank's sums once outputs have returned. Pairs and their number are int64,
            `[C, 2]` of its slots and `[E, 2]` of its tokens by expert. Outputs that returned, less
            those computed, are float64 `[G, 6]`, the last two norms of these and those. The last
            argument is the bound of roundings by such norms.
    """

    def __init__(
        self,
        tokens_C: Sequence[int],
        rows: int,
        used_here: Callable[[torch.Tensor], object],
        done: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bound], None],
    ) -> None:
        self._tokens_C = list(tokens_C)
        self._bits = (min(max(rows // _ROWS, _LEAST), _MOST) - 1).bit_length()
        self._used_here, self._done = used_here, done

    @torch.no_grad()
    def sent(self, hidden: torch.Tensor, map_TE: torch.Tensor, probs_TE: torch.Tensor) -> None:
        """Sum up what leaves, of hidden states `[…, H]`."""
        self._sent_T = _hashes(hidden)
        pairs_TE = self._sent_T[:, None] * _odd_bits(probs_TE)
        self._of_tokens = torch.stack([(pairs_TE * map_TE).sum(dim=0), map_TE.sum(dim=0)], dim=1)

    @torch.no_grad()
    def received(self, rows_RH: torch.Tensor, probs_R: torch.Tensor) -> None:
        """Sum up what experts compute, in their order."""
        self._received_R = _hashes(rows_RH)
        pairs_R = self._received_R * _odd_bits(probs_R)
        sums_C = torch.stack([part.sum() for part in pairs_R.split(self._tokens_C)])
        counts = [torch.full_like(sums_C[0], count) for count in self._tokens_C]
        self._of_slots = torch.stack([sums_C, torch.stack(counts)], dim=1)

    @torch.no_grad()
    def computed(self, output_RH: torch.Tensor) -> None:
        self._of_groups = self._by_group(self._received_R, -1, output_RH)

    @torch.no_grad()
    def combined(self, output: torch.Tensor, roundings: Roundings, top_k: int) -> None:
        """Sum up outputs `[…, H]` that have returned, without those of shared experts."""
        for sums in (self._sent_T, self._of_tokens, self._of_slots, self._of_groups):
            self._used_here(sums)  # Megatron may combine tokens on a stream of its own
        returned = self._by_group(self._sent_T, 1, output)
        returned[:, :SIGNS] += self._of_groups[:, :SIGNS]
        of_groups = torch.cat([returned, self._of_groups[:, SIGNS:]], dim=1)
        elements = output.shape[-1] * _TOKENS**2
        bound = partial(roundings.bound, top_k, elements=elements)
        self._done(self._of_slots, self._of_tokens, of_groups, bound)

    def _by_group(self, hashes: torch.Tensor, sign: int, output: torch.Tensor) -> torch.Tensor:
        """Add up sums with signs, and norms, of rows by the group of their hidden states."""
        sums = signed_sums(output.reshape(len(hashes), output.shape[-1]))
        hashes = hashes * MULTIPLIER
        sums[:, :SIGNS] *= (sign - 2 * sign * (hashes >> 8 & 1))[:, None]
        sums[:, SIGNS].sqrt_()
        groups = hashes >> 64 - self._bits & 2**self._bits - 1
        return sums.new_zeros(2**self._bits, SIGNS + 1).index_add_(0, groups, sums)


def differences_out(sent: Checked, slots_NC2: Int64, tokens_E2: Int64) -> Iterator[tuple[int, str]]:
    """Yield a rank with slots of an expert, and a description, where pairs are not those sent.

    Args:
        slots_NC2: sums of pairs and their number in all slots.
        tokens_E2: those that all ranks sent by expert.
    """
    ranks, slots, _ = slots_NC2.shape
    expert_S = sent.placed.layout.slot_expert_S
    slots_E2 = np.zeros_like(tokens_E2)
    np.add.at(slots_E2, expert_S, slots_NC2.reshape(-1, 2))
    wrong_E = (slots_E2 != tokens_E2).any(axis=1)
    moved = (slots_E2.sum(axis=0) == tokens_E2.sum(axis=0)).all()
    for expert in np.flatnonzero(wrong_E).tolist():
        places = np.argwhere(expert_S.reshape(ranks, slots) == expert)
        names = ", ".join(f"slot {slot} of rank {sent.ranks[rank]}" for rank, slot in places)
        arrived, left = int(slots_E2[expert, 1]), int(tokens_E2[expert, 1])
        numbers = f"{arrived} of {left} tokens" if arrived != left else f"{left} tokens"
        yield (
            int(places[0, 0]) if len(places) else 0,
            f"{numbers} of expert {expert} that arrived in {names or 'no slot'} are not those "
            "that ranks sent" + (", and other experts have them" if moved else ""),
        )


def differences_back(
    bound: Bound, _of_slots: Float64, of_groups: Float64
) -> Iterator[tuple[int, str]]:
    """Yield rank 0 and a description if outputs that return are not those computed.

    Args:
        of_groups: all ranks' sums, `[G, 6]`.
    """
    returned, computed = of_groups[:, SIGNS], of_groups[:, SIGNS + 1]
    bounds = bound(norms=computed, sums_norms=returned)
    with np.errstate(invalid="ignore"):
        lacking = np.abs(of_groups[:, :SIGNS]).max(axis=1)
        wrong = lacking > bounds
    if wrong.any():
        worst = int(np.argmax(np.where(wrong, lacking, 0)))
        yield (
            0,
            "outputs that returned to tokens are not the sums of those that experts computed, in "
            f"{wrong.sum()} of {len(wrong)} groups of tokens: they differ by "
            f"{lacking[worst]:.3g}, and roundings by up to {bounds[worst]:.3g}",
        )


def _hashes(hidden: torch.Tensor) -> torch.Tensor:
    """Return an odd number by the bits of each row `[…, H]`; a row of zeros has one too."""
    return 2 * bit_sums(hidden.reshape(-1, hidden.shape[-1])) + 1


def _odd_bits(probs: torch.Tensor) -> torch.Tensor:
    return 2 * probs.float().view(torch.int32).to(torch.int64) + 1
