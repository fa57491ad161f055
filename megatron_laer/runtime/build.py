"""Construction of the coordinator from the settings, the process groups and the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_laer.choices import (
    Auto,
    Dispatch,
    OverlapScheduler,
    PlanMode,
    Recompute,
    TokenExchange,
)
from megatron_laer.config import FSEPConfig, flag_name
from megatron_laer.files.checks import quoted
from megatron_laer.life import Kind, Kinds, kinds_of
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.expected_gain import expected_gain
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.homes_file import ModelHomes, read_homes
from megatron_laer.planner.hops import Way
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.sharding_choice import choose_geometry
from megatron_laer.planner.token_exchange import (
    choose_token_exchange,
    with_token_exchange,
)
from megatron_laer.precision import Precision, recipe_of
from megatron_laer.runtime.comm import agreement
from megatron_laer.runtime.comm.collectives import TokenSizesExchange
from megatron_laer.runtime.comm.exchange import Exchange, wire_dtype
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.comm.streams import make_comm_stream
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.runtime.metrics_recorder import MetricsRecorder
from megatron_laer.runtime.pair_counts import PairCounts
from megatron_laer.runtime.planning.announced_layouts import AnnouncedLayouts
from megatron_laer.runtime.planning.layouts_in_force import LayoutsInForce
from megatron_laer.runtime.planning.pass_layouts import PassLayouts
from megatron_laer.runtime.scheduler import Scheduler
from megatron_laer.runtime.verifier import Verifier
from megatron_laer.runtime.weights.slots import ExchangeStreams
from megatron_laer.support.model import goes_through_nodes, slots_multiple
from megatron_laer.telemetry.log import say

logger = logging.getLogger(__name__)

# Layouts whose way of exchange is remembered: those in force, and some of microbatches.
_LAYOUTS = 1024

# Tokens per rank and microbatch assumed for own loops, which choose the batch size later.
_TOKENS = 8192

# Part of a card's name → the shipped cluster with the most similar devices.
_CLUSTERS = {"A100": "a100-4x8-ib800", "H100": "h100-8", "H200": "h200-8", "B200": "b200-8"}


def build_coordinator(
    config: FSEPConfig,
    groups: FSEPGroups,
    transformer_config: Any,
    *,
    tokens: int | None,
    seed: int,
    device: torch.device,
) -> Coordinator:
    """Build the coordinator of one rank; `tokens` per rank and microbatch are priced if given."""
    kinds = kinds_of_run(config, transformer_config)
    costs = replace(layer_costs(config, transformer_config, device), kinds=kinds)
    if tokens is not None:
        costs = in_model(config, costs, transformer_config)
    top_k, tokens = transformer_config.moe_router_topk, tokens or _TOKENS

    def priced(geometry: Geometry) -> CostModel:
        of = token_dispatch(config, costs, geometry, transformer_config, tokens)
        of_tokens = with_token_exchange(costs, of, geometry, top_k, tokens)
        return of_tokens.with_exchange(config.restore_algorithm, geometry)

    shape = groups.size, transformer_config.num_moe_experts, groups.node_size
    multiple = slots_multiple(transformer_config)
    choice, compared = choose_geometry(config, shape, multiple, top_k, priced)
    chosen = choice.costs
    by_node = chosen.tokens.dispatch == Dispatch.NODE
    exchange = TokenExchange.NODE if by_node else TokenExchange.RANK
    geometry = choice.geometry
    if groups.rank == groups.index == 0:
        # Printed like Megatron's own lines on derived values; its logging hides what only informs.
        if config.sharding == Auto.AUTO:
            why = " against ".join(map(str, compared)) or "nothing else fits"
            say(f"FSEP: --fsep-sharding auto is {geometry.sharding}: {why}")
        if config.token_exchange == Auto.AUTO:
            say(f"FSEP: --fsep-token-exchange auto is {exchange}")
        if (expected := expected_gain(config, geometry, chosen)) is not None:
            say(f"FSEP: {expected}")
    is_open = config.restore_algorithm == Auto.AUTO and not chosen.by_layout
    config = replace(
        config,
        sharding=geometry.sharding,
        capacity=geometry.capacity,
        node_size=groups.node_size,
        token_exchange=exchange,
        restore_algorithm=chosen.restore_algorithm if is_open else config.restore_algorithm,
    )
    overlaps = config.scheduler == OverlapScheduler.ON
    # Announced layouts, as forecast ones, are kept after the gate.
    at_gate = PlanMode.FORECAST if config.mode == PlanMode.ANNOUNCED else config.mode
    guard = Guard(at_gate, chosen, geometry, config.imbalance_tolerance, config.split)
    streams = ExchangeStreams(
        make_exchange(config, groups, chosen, geometry),
        parameters=make_comm_stream("parameters", device, overlaps=overlaps),
        gradients=make_comm_stream("gradients", device, overlaps=overlaps),
        most_kept_bytes=config.kept_gib * 2**30,
    )
    homes = _common_homes(config, groups, geometry.num_experts)
    layouts = LayoutsInForce(config, groups, geometry, chosen, seed, device, homes)
    pass_layouts = (
        AnnouncedLayouts(guard, layouts, groups, device)
        if config.mode == PlanMode.ANNOUNCED
        else PassLayouts(guard, layouts, groups, one_per_step=Kind.STEP in kinds)
    )
    sampled = -(-(config.sampled_sets or 0) // groups.size)
    return Coordinator(
        verifier=Verifier(
            config.verification, groups, streams, device, dispatch=chosen.tokens.dispatch
        ),
        config=config,
        groups=groups,
        device=device,
        seed=seed,
        kinds=kinds,
        guard=guard,
        streams=streams,
        layouts=layouts,
        pass_layouts=pass_layouts,
        scheduler=Scheduler(kinds, streams, pass_layouts),
        recorder=MetricsRecorder(guard, device, streams.parameters.times.clock),
        pairs=PairCounts(groups, device, geometry.num_experts, config.pairs_interval, sampled),
        token_sizes=TokenSizesExchange(groups, device) if by_node else None,
        needs_steps=config.follows_steps,
        priced={"top_k": top_k, "tokens_per_rank": tokens},
    )


def _common_homes(config: FSEPConfig, groups: FSEPGroups, num_experts: int) -> ModelHomes | None:
    """Read the homes; raise ValueError on every rank where they do not fit, or differ in the group.

    Collective over the group if they are given: initial values are exchanged by them before
    settings are compared (`Coordinator.start`).
    """
    if config.homes is None:
        return None
    homes, problem = None, None
    try:
        homes = read_homes(Path(config.homes))
        homes.check_fits(groups.size, num_experts)
    except (OSError, ValueError) as error:
        problem = f"{flag_name('homes')} {quoted(config.homes)}: {error}"
    content = problem or (homes and homes.digest) or ""
    problem = (
        agreement.difference({f"the content of {flag_name('homes')}": content}, groups) or problem
    )
    if problem is not None:
        raise ValueError(problem)
    return homes


def token_dispatch(
    config: FSEPConfig, costs: CostModel, geometry: Geometry, transformer_config: Any, tokens: int
) -> Dispatch:
    if transformer_config.moe_token_dispatcher_type == Dispatch.FLEX:
        return Dispatch.FLEX
    if config.token_exchange != Auto.AUTO:
        return Dispatch(config.token_exchange)
    if not goes_through_nodes(transformer_config):
        return Dispatch.RANK
    top_k = transformer_config.moe_router_topk
    return Dispatch(choose_token_exchange(costs, geometry, top_k, tokens))


def make_exchange(
    config: FSEPConfig, groups: FSEPGroups, costs: CostModel, geometry: Geometry
) -> Exchange:
    """Make the exchange of all layers: the one place where the way of a layout is chosen."""

    @lru_cache(maxsize=_LAYOUTS)
    def choose(placed: Placed) -> Way:
        return (costs if placed.quantised else costs.in_bf16).way_of(placed)

    return Exchange(groups, costs.ways(geometry), choose, wire_dtype(config))


def layer_costs(config: FSEPConfig, transformer_config: Any, device: torch.device) -> CostModel:
    cluster = load_cluster(config.cluster or default_cluster(device)).for_back_end(config.gemm)
    precision = _precision(config, transformer_config)
    if precision.is_quantised and cluster.gemm_fp8 is None:
        logger.warning(
            "FSEP: cluster %s has no speed of GEMMs in fp8; the planner takes that without fp8. "
            "Add gemm_fp8 to its file",
            cluster.name,
        )
        cluster = replace(cluster, gemm_fp8=cluster.gemm)
    return CostModel(
        cluster=cluster,
        hidden=transformer_config.hidden_size,
        ffn=transformer_config.moe_ffn_hidden_size,
        gated=transformer_config.gated_linear_unit,
        bytes_per_element=transformer_config.params_dtype.itemsize,
        recompute=_recompute(transformer_config),
        precision=precision,
    )


def in_model(config: FSEPConfig, costs: CostModel, transformer_config: Any) -> CostModel:
    """Return the prices of a layer whose model hides the host's work, or not all of it.

    CUDA graphs leave the host few launches, and a tolerance no imbalance.
    """
    model = transformer_config
    if model.cuda_graph_impl != "none" or config.imbalance_tolerance is not None:
        return costs
    twice = model.overlap_moe_expert_parallel_comm and model.pipeline_model_parallel_size == 1
    sharers = model.tensor_model_parallel_size * model.context_parallel_size
    return replace(costs, layers=model.num_layers * (1 + twice), sharers=sharers)


def _precision(config: FSEPConfig, transformer_config: Any) -> Precision:
    """Return the precision of experts that are quantised in some layer."""
    if not config.quantises_experts or not transformer_config.fp8:
        return Precision.PARAMETERS
    return Precision(recipe_of(transformer_config))


def kinds_of_run(config: FSEPConfig, transformer_config: Any) -> Kinds:
    """Return the kinds that all training passes of a run have."""
    delays = transformer_config.delay_wgrad_compute or getattr(
        transformer_config, "overlap_dispatch_backward_with_experts_wgrad", False
    )
    found = {
        Kind.PARTS: transformer_config.overlap_moe_expert_parallel_comm,
        Kind.DELAYED: delays,
        Kind.SYNCHRONISED: _synchronises(transformer_config),
    }
    return config.kinds | kinds_of(found)


def _synchronises(transformer_config: Any) -> bool:
    """Return whether Megatron waits for the whole device between a pipeline's operations.

    It would then wait for a restore of the next operation as well.
    """
    config = transformer_config
    waits: bool = config.batch_p2p_comm and config.batch_p2p_sync
    return waits and config.pipeline_model_parallel_size > 1


def _recompute(transformer_config: Any) -> Recompute:
    """Return the recomputation of all layers in prices, even if `block` only covers some."""
    granularity = transformer_config.recompute_granularity
    runs_again = granularity == "full" or (
        granularity == "selective" and "moe" in transformer_config.recompute_modules
    )
    return Recompute.FULL if runs_again else Recompute.NONE


def current_device() -> torch.device:
    """Return Megatron's device, which is the CPU where CUDA is replaced."""
    device = torch.cuda.current_device()
    return device if isinstance(device, torch.device) else torch.device("cuda", device)


def default_cluster(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu-gloo"
    name = torch.cuda.get_device_name()
    for part, cluster in _CLUSTERS.items():
        if part in name:
            return cluster
    logger.warning(
        "FSEP: no hardware constants for %s, taking those of %s; give a YAML file by "
        "--fsep-set cluster=FILE",
        name,
        _CLUSTERS["H100"],
    )
    return _CLUSTERS["H100"]
