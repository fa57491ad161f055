"""Routers of a model under test whose tokens choose experts by topic.

Legend: T tokens, E experts, X topics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

TOPICS = 4


def by_topic(chunk: torch.nn.Module) -> None:
    """Let topics decide most of each router's choices; a token's place in the batch is its topic.

    Experts of one topic are spread over all nodes of stock's placement.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            module.gating = partial(_with_taste, module.gating)


def _with_taste(
    gating: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    logits = gating(hidden)
    experts = logits.shape[-1]
    topic_T = torch.arange(logits.numel() // experts) % TOPICS
    likes_TE = topic_T[:, None] == torch.arange(experts) % TOPICS
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=likes_TE.shape))
    taste_TE = (4.0 * likes_TE + noise).to(logits)
    return logits + taste_TE.view(logits.shape)
