"""The routers' choices in a run: recorded, compared with another run's, and given to a run.

Megatron's top-k is intercepted at its routing replay (`RouterReplay`). Sinkhorn and quantile
balancing do not use it, so their results are replaced. All else in a router is unchanged.

Legend: C router calls in a run's order (step, microbatch, layer), T tokens, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.cpu.training import rank_of_environment
from tests import te_graphs

# Own top-k of each router call, highest score first, int16 [C, T, K].
Chosen = npt.NDArray[np.int16]


def differ(one: Chosen, other: Chosen) -> npt.NDArray[np.bool_]:
    """Return whether experts chosen for a token differ in more than their order, [..., T]."""
    return (np.sort(one, axis=-1) != np.sort(other, axis=-1)).any(axis=-1)


@dataclass
class _TopK:
    """Replacement of a router's `RouterReplay`; one serves all routers of a rank."""

    given_CTK: Chosen | None
    chosen: list[Chosen] = field(default_factory=list)

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and indices of the top-k for Megatron, as given where they differ."""
        values, own_TK = default_compute_topk(scores, topk, num_groups, group_topk)
        used_TK = self.choose(own_TK)
        return values if used_TK is own_TK else scores.gather(1, used_TK), used_TK

    @property
    def chosen_CTK(self) -> Chosen:
        return np.stack(self.chosen) if self.chosen else np.zeros((0, 0, 0), np.int16)

    def choose(self, own_TK: torch.Tensor) -> torch.Tensor:
        if te_graphs.makes.get():  # of samples, which stock does not route
            return own_TK
        call = len(self.chosen)
        self.chosen.append(own_TK.numpy().astype(np.int16))
        if self.given_CTK is None:
            return own_TK
        # Tokens that choose alike keep their own order, which decides a softmax's last bit.
        differ_T = torch.from_numpy(differ(self.chosen[call], self.given_CTK[call]))
        given_TK = torch.from_numpy(self.given_CTK[call]).to(own_TK.dtype)
        return torch.where(differ_T[:, None], given_TK, own_TK)


@contextlib.contextmanager
def choices(given: list[Chosen] | None = None) -> Iterator[_TopK]:
    """Note the routers' choices inside the block, which follow all ranks' given ones, if any."""
    from megatron.core.transformer.moe import router
    from megatron.training import get_args

    route = router.topk_routing_with_score_function
    balance, update = router.sinkhorn, router.qb_dual_update
    top_k = _TopK(None if given is None else given[rank_of_environment()])

    def observed(*args: Any, **kwargs: Any) -> Any:
        return route(*args, **{**kwargs, "router_replay": top_k})

    def observed_sinkhorn(cost: torch.Tensor) -> torch.Tensor:
        scores_TE = balance(cost)
        own_TK = scores_TE.topk(get_args().moe_router_topk, dim=1).indices
        # Only the places of the highest scores are used.
        return scores_TE.scatter(1, top_k.choose(own_TK), float("inf"))

    def observed_quantiles(logits: torch.Tensor, topk: int, beta: Any, **kwargs: Any) -> Any:
        own_TK, quantiles = update(logits, topk, beta, **kwargs)
        return top_k.choose(own_TK), quantiles

    with (
        mock.patch.object(router, "topk_routing_with_score_function", observed),
        mock.patch.object(router, "sinkhorn", observed_sinkhorn),
        mock.patch.object(router, "qb_dual_update", observed_quantiles),
    ):
        yield top_k
