"""Routers of a model under test whose tokens choose experts by topic, and rows between nodes.

Legend: T tokens, E experts, X topics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.cpu.training import Record, train
from megatron_laer.planner.token_rows import SizeMessages, TokenRows

TOPICS = 4


def by_topic(chunk: torch.nn.Module, strength: float = 4.0) -> None:
    """Let topics decide most of each router's choices; a token's place in the batch is its topic.

    Experts of one topic are spread over all nodes of stock's placement.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            module.gating = partial(_with_taste, module.gating, strength)


def _with_taste(
    gating: Callable[[torch.Tensor], torch.Tensor], strength: float, hidden: torch.Tensor
) -> torch.Tensor:
    logits = gating(hidden)
    experts = logits.shape[-1]
    topic_T = torch.arange(logits.numel() // experts) % TOPICS
    likes_TE = topic_T[:, None] == torch.arange(experts) % TOPICS
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=likes_TE.shape))
    taste_TE = (strength * likes_TE + noise).to(logits)
    return logits + taste_TE.view(logits.shape)


def train_counted(flags: list[str], probe: Any, topical: bool = True) -> tuple[Record, list[int]]:
    """Train, and count the rows that this rank sends to other nodes in each step's forwards."""
    rows_of_step, original = [0], SizeMessages.rows

    def rows(self: SizeMessages, sizes_X: Int64) -> TokenRows:
        found = original(self, sizes_X)
        assert found.has_two_stages
        node = self.rank // self.node_size
        rows_of_step[-1] += sum(found.first_sent) - found.first_sent[node]
        return found

    def counted(chunks: list[torch.nn.Module]) -> Any:
        rows_of_step.append(0)
        return probe(chunks)

    with mock.patch.object(SizeMessages, "rows", rows):
        record = train(flags, counted, None, by_topic if topical else None)
    return record, rows_of_step[:-1]
