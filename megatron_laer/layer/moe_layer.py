"""MoE layer of Megatron with its experts in slots.

Router, losses, shared experts and the token All-to-All stay Megatron's. Only steps of `MoELayer`
are overridden, never `forward`, which Megatron's combined 1F1B schedule bypasses.

CUDA graphs of a part of the layer end at this rank's counts: `_count` is the last captured step.

Legend: N ranks, E experts, C slots per rank, S = N·C slots, T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    get_default_pg_collection,
    maybe_skip_or_early_return_by_cudagraph,
)

from megatron_laer import session
from megatron_laer.config import settings_in_force, write_in_force
from megatron_laer.layer import slot_configs
from megatron_laer.layer.dispatch.choice import make_dispatcher
from megatron_laer.layer.dispatch.first_launches import launch_dispatch_kernels
from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatch
from megatron_laer.layer.experts.home_moves import number_by_expert
from megatron_laer.layer.experts.homes import HomeExperts
from megatron_laer.layer.experts.module import FSEPExperts
from megatron_laer.layer.experts.restored_compute import RestoredCompute
from megatron_laer.layer.slot_submodules import activation_builder, slot_submodules
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.support import model as model_support
from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.ranges import named_range
from megatron_laer.verify.tokens import PassTokens

_is_for_mtp = ContextVar("is_for_mtp", default=False)


@contextlib.contextmanager
def for_multi_token_prediction() -> Iterator[None]:
    """Mark layers built in this block as MTP layers, which Megatron's hybrid models do not do."""
    token = _is_for_mtp.set(True)
    try:
        yield
    finally:
        _is_for_mtp.reset(token)


class FSEPMoELayer(MoELayer):
    """Megatron's MoE layer with C local slots in place of experts, filled according to the layout.

    Args:
        layer_number: in the whole model, from 1; optional where Megatron's transformer layer builds
            and numbers this layer.
    """

    def __init__(
        self,
        config: Any,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        assert submodules is not None
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        coordinator = _coordinator_for(config, pg_collection)
        slot_config = slot_configs.of_dispatch(config, coordinator.geometry.num_slots)
        super().__init__(
            config=slot_config,
            submodules=slot_submodules(config, submodules, coordinator, pg_collection),
            layer_number=layer_number,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        self.config = config
        self.submodules = submodules
        self._home_experts: HomeExperts | None = None
        self._expert_group = pg_collection.expt_tp
        self._built_experts = (self.experts,)  # no second name for the module
        self.token_dispatcher = make_dispatcher(
            slot_config,
            self.local_expert_indices,
            pg_collection,
            coordinator.groups,
            coordinator.token_sizes,
        )
        if self.shared_experts is not None and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        # Megatron's own name what is planned here.
        self.token_dispatcher.cudagraph_attrs = ["routing_map_TE", "counts_E"]
        self._coordinator = coordinator
        self._is_mtp = is_mtp_layer or _is_for_mtp.get()
        self._state: LayerState | None = None
        self._plan: MicrobatchPlan | None = None
        self._verified: PassTokens | None = None
        self._home_E: torch.Tensor | None = None
        self._input_is_freed = False
        self._shared_input: torch.Tensor | None = None
        self._shared_output: torch.Tensor | None = None
        if layer_number is not None:
            self._register(layer_number)

    @property
    def _slot_experts(self) -> FSEPExperts | HomeExperts:
        experts: FSEPExperts = self.experts
        return self._home_experts or experts

    @property
    def state(self) -> LayerState:
        if self._state is None:
            raise ValueError(_NO_NUMBER)
        return self._state

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        if self._state is None:
            self._register(layer_number)

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Defer the shared experts until the counts exchange has started, after the router."""
        # A CUDA graph of the router contains the shared experts, as a part of a combined schedule.
        in_parts = self.config.overlap_moe_expert_parallel_comm
        if in_parts or self._is_graphed(CudaGraphModule.moe_router):
            output: torch.Tensor | None = super().shared_experts_compute(hidden_states)
            return output
        if self.use_shared_expert and not self.shared_expert_overlap:
            # This node is older than the router's, so their gradient is added last, as in stock.
            self._shared_input = hidden_states.view_as(hidden_states)
        return None

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor | None
    ) -> Any:
        """Count and plan this microbatch's tokens; None stands for the map of a replayed graph."""
        return self._plan_and_sort(*self._count(hidden_states, probs, routing_map))

    @maybe_skip_or_early_return_by_cudagraph("preprocess")  # type: ignore[untyped-decorator]
    def _count(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count this rank's tokens, where Megatron ends a graph and goes on after its replay."""
        home_E = self._home_E
        if home_E is not None:  # from here on, experts are home positions
            probs, routing_map = probs.index_select(1, home_E), routing_map.index_select(1, home_E)
        self.token_dispatcher.count(routing_map)
        if self._is_graphed(CudaGraphModule.moe_preprocess) and self._recomputes_norm:
            # Megatron frees the norm's output in the graph, but this is the graph's output.
            hidden_states = hidden_states.clone()
        return hidden_states, probs

    def _plan_and_sort(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        """Plan this microbatch; the shared experts' compute hides the exchange of counts."""
        self.cudagraph_tensor_store.clear()  # a replayed graph's outputs end here
        routing_map_TE, counts_E = self.token_dispatcher.take_counted()
        finish_plan = self._coordinator.start_pass(
            self.state,
            routing_map_TE,
            counts_E,
            training=self.training,
            # In a checkpointed layer, autograd sees its inputs only.
            has_rerun=hidden_states.requires_grad or not self.moe_layer_recompute,
        )
        if self._shared_input is not None:
            shared_input, self._shared_input = self._shared_input, None
            self._shared_output = super().shared_experts_compute(shared_input)
        self.token_dispatcher.start_shared_experts(hidden_states)
        self.token_dispatcher.launch_ahead(routing_map_TE)
        plan = self._plan = finish_plan()
        name, step_times = self.state.name, self._coordinator.recorder.times
        verified = self._verified = self._coordinator.verifier.tokens(name, plan)
        self.token_dispatcher.begin(SlotDispatch(plan, name, step_times, verified))
        tokens, probs = super().preprocess(hidden_states, probs, routing_map_TE)
        return plan.restored.gate(tokens, reruns=plan.backward_follows), probs

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        """Exchange tokens, whose gradients let those of the weights go."""
        assert self._plan is not None, "dispatch before preprocess"
        hidden_states = self._plan.restored.dispatch(hidden_states)
        dispatched = super().dispatch(hidden_states, probs)
        groups = self._coordinator.groups
        rows = self.token_dispatcher.rows_sent(groups.rank, groups.node_size)
        if rows is not None:
            row_bytes = hidden_states.shape[-1] * hidden_states.element_size()
            self.state.statistics.add_sent(rows[0], rows[1], row_bytes)
        return dispatched

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Sort the received tokens by slot and compute the restored experts.

        Tokens have crossed nodes, so that the next layer's restore may start. It does so here,
        since Megatron may have exchanged them on a stream of their own.
        """
        self._coordinator.scheduler.tokens_arrived(self.state, self.training)
        # `backward_dw` may run on a stream of its own, during the dispatch's backward.
        if getattr(self.config, "overlap_dispatch_backward_with_experts_wgrad", False):
            from megatron.core.transformer.moe.moe_layer import _RecordExpertDgradCompletion

            hidden_states = _RecordExpertDgradCompletion.apply(
                self._delayed_wgrad_event, hidden_states
            )
        input_TH, _, probs_T = self.token_dispatcher.dispatch_postprocess(hidden_states, probs)
        if self._input_is_freed and input_TH.data_ptr() == hidden_states.data_ptr():
            input_TH = input_TH.clone()
        plan, self._plan = self._plan, None
        assert plan is not None, "routed_experts_compute before preprocess"
        # A call, not a method: Megatron waits for updated parameters in a module's pre-hook.
        activity = Activity(Kind.EXPERTS, self.state.name)
        verified, self._verified = self._verified, None
        if verified is not None:
            verified.received(input_TH, probs_T)
        with named_range(activity):
            output_TH = self._slot_experts(input_TH, probs_T, plan)
        if verified is not None:
            verified.computed(output_TH)
        return self.token_dispatcher.combine_preprocess(output_TH), None

    def postprocess(
        self, output: torch.Tensor, shared_expert_output: torch.Tensor | None
    ) -> torch.Tensor:
        if self._shared_output is not None:
            shared_expert_output, self._shared_output = self._shared_output, None
        summed: torch.Tensor = super().postprocess(output, shared_expert_output)
        return summed

    def backward_dw(self, routed_experts: bool = True, shared_experts: bool = False) -> None:
        """Compute delayed weight gradients, those of replicas after the home experts'."""
        super().backward_dw(routed_experts, shared_experts)
        if routed_experts and self.state.delayed:
            self.state.delayed.popleft()()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the layer as stock saves it, each expert under its own number."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._home_E is not None:
            number_by_expert(state, f"{prefix}experts.", len(sharded_offsets), self.state.home)
        return state

    def what_changed(self) -> str | None:
        experts, (built,) = self.experts, self._built_experts
        slot_experts = self._home_experts or built
        if experts is built:
            return slot_experts.what_changed()
        reason = slot_experts.built_parts.reason
        return f"its experts were replaced by {type(experts).__name__}: {reason}"

    def launch_kernels(self) -> None:
        share, coordinator = self._slot_experts.share, self._coordinator
        launch_dispatch_kernels(
            coordinator.geometry.num_slots,
            coordinator.geometry.num_experts,
            share.sizes[0][1],
            share.parameters[0].dtype,
            coordinator.device,
        )

    def _is_graphed(self, module: Any) -> bool:
        config = self.config
        return config.cuda_graph_impl != "none" and module in config.cuda_graph_modules

    @property
    def _recomputes_norm(self) -> bool:
        config = self.config
        is_selective = config.recompute_granularity == "selective"
        return is_selective and "layernorm" in config.recompute_modules

    def _register(self, layer_number: int) -> None:
        coordinator = self._coordinator
        quantised = slot_configs.is_quantised(
            self.config, coordinator.config, layer_number, is_mtp=self._is_mtp
        )
        # Megatron's combined schedule frees the arrived tokens of every layer of an fp8 model.
        frees = self.config.overlap_moe_expert_parallel_comm and self.config.fp8 is not None
        self._input_is_freed = frees and not quantised
        if home_slots := coordinator.geometry.home_slots:
            compute = RestoredCompute(
                self.config,
                tp_group=self._expert_group,
                device=coordinator.device,
                gemm=coordinator.config.gemm,
                activation_builder=activation_builder(self.submodules),
                quantised=quantised,
            )
            self._home_experts = HomeExperts(self.experts, home_slots, compute)
        slot_experts = self._slot_experts
        repeats = self._is_mtp and self.config.mtp_use_repeated_layer
        self._state = coordinator.register_layer(
            layer_number,
            self._is_mtp,
            find_share=lambda: slot_experts.share,
            adapters=lambda: slot_experts.adapters,
            passes=self.config.mtp_num_layers if repeats else 1,
            what_changed=self.what_changed,
            on_step_end=self.token_dispatcher.end_step,
            launch_kernels=self.launch_kernels,
            quantised=quantised,
        )
        slot_experts.initialise(self._state.name, coordinator.seed)
        home = self._state.home
        if not home.is_stock:
            self._home_E = torch.from_numpy(home.expert_E).to(coordinator.device)
            assert self._home_experts is not None, "homes are given without experts at home"
            self._home_experts.move(home, coordinator.groups, coordinator.device)


_NO_NUMBER = (
    "layer_number=None: the experts' weights and the layer's plans go by its number; pass "
    "layer_number=, counted over the whole model from 1, or build the layer through Megatron's "
    "TransformerLayer"
)


def _coordinator_for(config: Any, pg_collection: Any) -> Coordinator:
    current = session.current()
    assert current is not None, "an FSEP layer was built while FSEP is off"
    given = current.config
    model_support.check(config, given)
    groups = current.groups
    assert dist.get_process_group_ranks(pg_collection.ep) == list(groups.ranks), (
        "the model's expert-parallel group is not the one that FSEP was set up for"
    )
    pg_collection.fsep = groups.tokens  # also where a caller has made the collection
    args = _arguments()
    seed = None if args is None else int(args.seed)
    tokens = None if args is None else _tokens(args, config)
    coordinator = current.coordinator_for(config, seed, tokens)
    if args is not None:
        write_in_force(args, settings_in_force(coordinator.config))
    return coordinator


def _arguments() -> Any:
    """Return the command line's arguments; None in an own loop without them."""
    from megatron.training import global_vars

    return None if global_vars._GLOBAL_ARGS is None else global_vars.get_args()


def _tokens(args: Any, config: Any) -> int:
    """Return the tokens per rank and microbatch.

    Tensor parallelism splits sequences too: MoE layers train with sequence parallelism only.
    """
    ranks = config.context_parallel_size * config.tensor_model_parallel_size
    tokens: int = args.micro_batch_size * args.seq_length // ranks
    return max(tokens, 1)
