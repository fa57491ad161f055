"""Token dispatcher that sends a hidden state once per node, and there once per rank.

Rows cross nodes in `token_dispatch`, as in Megatron's All-to-All. `dispatch_postprocess` forwards
them inside the node, as Megatron's exchange of tensor parallelism. So the next layer's restore may
start as soon as links between nodes are free. Outputs return the same way, summed in each step.
Where a node has one rank, or all of them, there is one exchange, with a row per rank.

Legend: T tokens, E experts, P pairs sent, R pairs received, H hidden. U rows arrived, Y rows of the
first stage, X rows sent in it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_laer.layer.dispatch.permutation import reorder
from megatron_laer.layer.dispatch.row_map import RowMap
from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching, rows_by_node
from megatron_laer.layer.dispatch.token_routes import (
    Arrivals,
    arrivals,
    pair_routes,
    second_stage,
    token_order,
)
from megatron_laer.planner.token_rows import TokenRows
from megatron_laer.runtime.comm.collectives import TokenSizesExchange
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group
from megatron_laer.runtime.comm.streams import used_here
from megatron_laer.telemetry.activities import Activity, Kind

# In which outputs are summed up: on the experts' rank, in its node and on the token's rank.
_HOPS = 3


class _FirstStage(MoEAlltoAllTokenDispatcher):
    """Exchange of rows in place of Megatron's rows per pair."""

    _groups: FSEPGroups
    _rows: TokenRows
    # Each pair is sent with its row's number, and each row with its local ranks as bits.
    _row_of_pairs: torch.Tensor | None
    _bits: torch.Tensor | None

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        """Send rows, [X, H], and per-pair data, [P]; return [Y, H] and [R]."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        tokens = self._exchange_first(tokens)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(tokens)
        assert self._row_of_pairs is not None
        # Combined 1F1B exchanges on a stream of its own, and holds tokens and probabilities alone.
        probs, self._row_of_pairs = (
            exchange(self._groups.tokens, of_pairs, self.output_splits, self.input_splits)
            for of_pairs in (probs, used_here(self._row_of_pairs))
        )
        if self._bits is not None:
            self._bits = self._exchange_first(used_here(self._bits))
        return tokens, probs

    def token_combine(self, tokens: torch.Tensor) -> torch.Tensor:
        """Send rows back, [Y, H] to [X, H]."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        rows = self._rows
        tokens = exchange(self._first_group, tokens, rows.first_sent, rows.first_received)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(tokens)
            self.shared_experts.post_forward_comm()
        return tokens

    def _exchange_first(self, sent: torch.Tensor) -> torch.Tensor:
        rows = self._rows
        return exchange(self._first_group, sent, rows.first_received, rows.first_sent)

    @property
    def _first_group(self) -> Group:
        return self._groups.tokens_inter_node or self._groups.tokens


class NodeTokenDispatcher(SlotDispatching, _FirstStage):
    """Dispatcher to S slots, of which C are local; its config has S as the number of experts."""

    def __init__(
        self, *args: Any, groups: FSEPGroups, sizes: TokenSizesExchange, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._groups = groups
        self._sizes = sizes
        self._first: RowMap | None = None
        self._second: RowMap | None = None
        self._arrivals: Arrivals | None = None
        # Arrived rows and the experts' input copied from them, until the experts have used it.
        self._experts_input: tuple[torch.Tensor, torch.Tensor] | None = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        """Sort tokens [..., H] and probabilities [T, E] for sending, to [X, H] and [P]."""
        plan, groups = self._current.plan, self._groups
        quotas, layout = plan.quotas, plan.layout
        routing_map = self._routed(routing_map)
        self._verify_sent(hidden_states, routing_map, probs)
        slot_P = token_order(routing_map, quotas)
        routes = pair_routes(
            routing_map, slot_P, layout.num_ranks, layout.capacity, groups.node_size
        )
        if plan.first_pass.token_rows is None:
            plan.first_pass.token_rows = self._sizes.start(routes.sizes_Z)()
        rows = self._rows = plan.first_pass.token_rows
        self.input_splits, self.output_splits = quotas.input_splits_N, quotas.output_splits_N
        self.hidden_shape = hidden_states.shape
        self._row_of_pairs = routes.row_P
        self._first, self._bits = routes.first_stage(sum(rows.first_sent))
        tokens = self._first.spread(hidden_states.view(-1, self.hidden_shape[-1]))
        return tokens, probs.reshape(-1).index_select(0, routes.pair_P)

    def dispatch_postprocess(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        """Forward rows [Y, H] inside the node, and copy each pair its row.

        Returns:
            Tokens by pairs, sorted by slot; tokens of each local slot, int64 [C]; probabilities by
            pairs.
        """
        rows, quotas = self._rows, self._current.plan.quotas
        if self._bits is not None:
            sent = rows.second_sent
            self._second = second_stage(used_here(self._bits), len(sent), sum(sent))
            self._bits = None
            tokens = self._second.spread(tokens)
            tokens = self._inside_node(Kind.DISPATCH, tokens, rows.second_received, sent)
        assert self._row_of_pairs is not None
        came = self._arrivals = arrivals(used_here(self._row_of_pairs), quotas, rows)
        self._row_of_pairs = None
        experts_RH = came.rows.spread(tokens)
        self._experts_input = tokens, experts_RH
        probs = reorder(probs, came.arrived_R, came.sorted_R)
        return experts_RH, torch.tensor(quotas.tokens_C), probs

    def rows_sent(self, rank: int, node_size: int) -> tuple[int, int] | None:
        return rows_through_nodes(self._rows, rank, node_size)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum the experts' outputs, [R, H], by row, and these inside the node, to [Y, H]."""
        assert self._arrivals is not None and self._experts_input is not None
        rows = self._rows
        (rows_UH, experts_RH), self._experts_input = self._experts_input, None
        summed = self._arrivals.rows.collect(hidden_states)
        if not self.config.overlap_moe_expert_parallel_comm:  # which frees arrived rows
            self._arrivals.rows.free_until_backward(experts_RH, rows_UH, hidden_states)
        self._arrivals = None
        if self._second is not None:
            summed = self._inside_node(Kind.COMBINE, summed, rows.second_sent, rows.second_received)
            summed = self._second.collect(summed)
            self._second = None
        return summed

    def combine_postprocess(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self._first is not None
        output = self._first.collect(tokens).view(self.hidden_shape)
        self._first = None
        return self._finish(output, _HOPS)

    def _inside_node(
        self, kind: Kind, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> torch.Tensor:
        layer, group = self._current.layer_name, self._groups.tokens_intra_node
        (received,) = self._timed(
            lambda sent: (exchange(group, sent, received_sizes, sent_sizes),),
            (sent,),
            (
                Activity(kind, layer, inside_node=True),
                Activity(Kind.EXPERTS, layer),
                Activity(Kind.EXPERTS, layer, backward=True),
            ),
        )
        return received


def rows_through_nodes(rows: TokenRows, rank: int, node_size: int) -> tuple[int, int]:
    if not rows.has_two_stages:
        return rows_by_node(rows.first_sent, rank, node_size)
    node, local_rank = divmod(rank, node_size)
    first_M, second_G = rows.first_sent, rows.second_sent
    return sum(second_G) - second_G[local_rank], sum(first_M) - first_M[node]


def exchange(
    group: Group | None, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
) -> torch.Tensor:
    """Exchange rows, in autograd, on the group's own high-priority stream."""
    received: torch.Tensor = all_to_all(
        group, sent, received_sizes, sent_sizes, use_nccl_stream=True
    )
    return received
