"""Sums of tokens tell lost, doubled and moved ones from roundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.verify.checked import Checked
from megatron_laer.verify.gradients import Roundings
from megatron_laer.verify.tokens import PassTokens, differences_back, differences_out
from tests.placed import placed

T, E, H, TOP_K = 512, 16, 96, 4


class Pass:
    """A pass of one rank that has a slot for each expert, with roundings in this many hops."""

    def __init__(self, dtype: torch.dtype, hops: int, equal: int = 0) -> None:
        draws = torch.Generator().manual_seed(4)
        self.hops = hops
        self.hidden_TH = torch.randn(T, H, generator=draws).to(dtype)
        scores_TE = torch.rand(T, E, generator=draws)
        self.hidden_TH[:equal], scores_TE[:equal] = self.hidden_TH[0], scores_TE[0].clone()
        chosen = scores_TE.topk(TOP_K, dim=1).indices
        self.map_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, chosen, True)
        self.probs_TE = (scores_TE * self.map_TE).softmax(dim=1) * self.map_TE
        self.expert_R, self.token_R = self.map_TE.T.nonzero().unbind(1)
        self.weights_EHH = torch.randn(E, H, H, generator=draws)
        layout = ExpertLayout.from_slots(1, E, E, [*range(E)])
        self.checked = Checked("layer 1", "dispatch", 0, "rank", placed(layout), (), (5,))

    def found(
        self,
        out: Callable[[torch.Tensor, torch.Tensor], Any] = lambda *_: None,
        back: Callable[[torch.Tensor], Any] = lambda _: None,
    ) -> list[str]:
        """Return findings where rows and their probabilities, or returned outputs, are changed."""
        sums: list[Any] = []
        counts_E = self.map_TE.sum(dim=0).tolist()
        tokens = PassTokens(counts_E, T * TOP_K, lambda _: None, lambda *of: sums.extend(of))
        tokens.sent(self.hidden_TH.view(2, -1, H), self.map_TE, self.probs_TE)
        rows_RH = self.hidden_TH[self.token_R].clone()
        probs_R = self.probs_TE[self.token_R, self.expert_R].clone()
        out(rows_RH, probs_R)
        tokens.received(rows_RH, probs_R)
        by_expert = zip(rows_RH.split(counts_E), self.weights_EHH, strict=True)
        output_RH = torch.cat([rows.float() @ weights for rows, weights in by_expert])
        output_RH = (output_RH * probs_R[:, None]).to(rows_RH.dtype)
        tokens.computed(output_RH)
        returned_RH = output_RH.clone()
        back(returned_RH)
        roundings = Roundings(rows_RH.dtype, rows_RH.dtype, self.hops)
        tokens.combined(self._combined(returned_RH).view(2, -1, H), roundings, TOP_K)
        of_slots, of_tokens, of_groups, bound = sums
        given = self.checked, of_slots.numpy()[None], of_tokens.numpy()
        of_outputs = differences_back(bound, np.empty(0), of_groups.numpy())
        return [text for _, text in (*differences_out(*given), *of_outputs)]

    def _combined(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """Add up a token's rows, in one hop or as experts of two ranks in two nodes do."""
        parts_THP = []
        for part_R in torch.chunk(torch.arange(len(rows_RH)), 1 if self.hops == 1 else 4):
            sums_TH = torch.zeros(T, H).index_add_(0, self.token_R[part_R], rows_RH[part_R].float())
            parts_THP.append(sums_TH.to(rows_RH.dtype))
        while len(parts_THP) > 1:
            pairs = zip(parts_THP[::2], parts_THP[1::2], strict=True)
            parts_THP = [(one.float() + other.float()).to(one.dtype) for one, other in pairs]
        return parts_THP[0]


@pytest.mark.parametrize("equal", [0, 300, T])
@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_tokens_have_no_finding_even_if_they_are_equal(
    dtype: torch.dtype, hops: int, equal: int
) -> None:
    assert Pass(dtype, hops, equal).found() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_wrong_row_is_seen_on_its_way_out(dtype: torch.dtype) -> None:
    of = Pass(dtype, 1)
    bits = torch.int32 if dtype == torch.float32 else torch.int16

    def lost(at: int) -> Callable[..., None]:
        return lambda rows_RH, _: rows_RH[at].zero_()

    def flipped(at: int) -> Callable[..., None]:
        return lambda rows_RH, _: rows_RH[at].view(bits).__setitem__(at % H, at % 2**15)

    def doubled(at: int) -> Callable[..., None]:
        def change(*rows: torch.Tensor) -> None:
            for row in rows:
                row[at] = row[at - 1]

        return change

    def other_probability(at: int) -> Callable[..., None]:
        return lambda _, probs_R: probs_R.view(torch.int32)[at].bitwise_xor_(1)

    for at in (1, 7, 900, T * TOP_K - 1):
        for change in (lost, flipped, doubled, other_probability):
            found, *_ = of.found(change(at))
            expert = int(of.expert_R[at])
            assert found == (
                f"{int(of.map_TE[:, expert].sum())} tokens of expert {expert} that arrived in slot "
                f"{expert} of rank 5 are not those that ranks sent"
            )


def test_tokens_of_two_experts_in_each_others_place_are_named_so() -> None:
    of = Pass(torch.bfloat16, 1)

    def moved(*rows: torch.Tensor) -> None:
        for row in rows:
            row[[0, -1]] = row[[-1, 0]]

    found = of.found(moved)[:2]
    assert "of expert 0 " in found[0] and f"of expert {E - 1} " in found[1]
    assert all(text.endswith(" sent, and other experts have them") for text in found)


def test_numbers_of_tokens_that_quotas_do_not_have_are_named() -> None:
    of = Pass(torch.float32, 1)
    tokens_E2 = np.full((E, 2), 7)
    slots_1E2 = tokens_E2[None].copy()
    slots_1E2[0, 3] = 5
    ((rank, text),) = differences_out(of.checked, slots_1E2, tokens_E2)
    assert rank == 0 and text == (
        "5 of 7 tokens of expert 3 that arrived in slot 3 of rank 5 are not those that ranks sent"
    )


@pytest.mark.parametrize(("dtype", "hops"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_nearly_every_output_that_is_lost_or_doubled_on_its_way_back_is_seen(
    dtype: torch.dtype, hops: int
) -> None:
    of = Pass(dtype, hops)
    rows = range(0, T * TOP_K, 41)
    for factor in (0, 2):
        seen = [
            of.found(back=lambda rows_RH, at=at, by=factor: rows_RH[at].mul_(by)) for at in rows
        ]
        assert sum(map(bool, seen)) >= 0.98 * len(rows)
        assert all(
            "in 1 of 128 groups of tokens: they differ by " in text for (text,) in seen if text
        )


@pytest.mark.parametrize("hops", [1, 3])
def test_shifted_outputs_are_seen_in_most_groups(hops: int) -> None:
    (found,) = Pass(torch.bfloat16, hops).found(
        back=lambda rows_RH: rows_RH.copy_(rows_RH.roll(1, 0))
    )
    number = int(found.split(" groups of tokens")[0].split(" in ")[-1].split(" of ")[0])
    assert number > 100
