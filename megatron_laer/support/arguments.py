"""Checks of Megatron's parsed arguments before anything runs, and the defaults that FSEP needs.

`model` checks a TransformerConfig. Nothing of Megatron is touched: `args` is its namespace.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_laer.choices import OverlapScheduler, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.environment import CONNECTIONS, has_one_queue
from megatron_laer.files.checks import numbered, problem_of
from megatron_laer.planner.geometry import Geometry, check_node_size, resolve_geometry
from megatron_laer.planner.homes_file import read_homes
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.rules import (
    REFUSALS,
    RULES,
    idle_words,
    problems_by,
    settings_with,
    sharding_for,
)
from megatron_laer.support import RefusedError, triton_needs
from megatron_laer.support.model import slots_multiple

_DEEPEP_TOP_K = 32

# Arguments that FSEP sets if they are not given, with their values.
FILLED_IN = {row.argument: row.accepted[0] for row in REFUSALS if row.is_filled_in}

# Arguments for fp8 and fp4 alone: Megatron refuses them without, and FSEP with these formats.
_LEFT_OUT = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")


def fill_in(args: Namespace, script_defaults: Mapping[str, object]) -> list[str]:
    """Set the values that FSEP needs where an argument is None, and return those flags.

    `script_defaults` are a Megatron script's own; they apply first, and are not returned.
    """
    filled = []
    for name, needed in FILLED_IN.items():
        if getattr(args, name) is None:
            setattr(args, name, script_defaults.get(name, needed))
            if name not in script_defaults:
                filled.append(f"--{name.replace('_', '-')} {needed}")
    return filled


def leave_out(args: Namespace) -> list[str]:
    """Turn off flags that have no effect but would keep Megatron from running; return them."""
    given = [name for name in _LEFT_OUT if getattr(args, name, None)]
    for name in given:
        setattr(args, name, False)
    return [f"--{name.replace('_', '-')}" for name in given]


def check(args: Namespace, config: FSEPConfig) -> None:
    """Refuse all settings that FSEP cannot run with, in one message."""
    if found := problems(args, config):
        raise RefusedError(f"--expert-parallel-mode fsep cannot run: {numbered(found)}")


def problems(args: Namespace, config: FSEPConfig) -> list[str]:
    """Return the settings that FSEP cannot run with, with reasons and remedies."""
    try:
        config, _ = with_needed_sharding(args, config)
    except ValueError as error:
        return [str(error)]
    return problems_by(REFUSALS, settings_with(args, config)) + own_problems(args, config)


def own_problems(args: Namespace, config: FSEPConfig) -> list[str]:
    """Return the problems that are more than a setting of Megatron; `auto` was replaced."""
    settings = settings_with(args, config)
    found = idle_words(settings) + problems_by(RULES[len(REFUSALS) :], settings)
    has_shape = (args.num_experts or 0) > 0 and args.expert_model_parallel_size > 1
    return found + (_shape_problems(args, config) if has_shape else [])


def with_needed_sharding(args: Any, config: FSEPConfig) -> tuple[FSEPConfig, str]:
    """Return the config with the sharding that the arguments need, and why; see `sharding_for`."""
    given = getattr(args, "fsep_sharding", config.sharding)  # before `FSEPConfig` replaced `auto`
    sharding, why = sharding_for(settings_with(args, config, fsep_sharding=given))
    return replace(config, sharding=sharding), why


def warnings(config: FSEPConfig, environment: Mapping[str, str], *, on_cuda: bool) -> list[str]:
    """Return the settings with which FSEP runs slowly, or may stop at its first step."""
    found = []
    if on_cuda and config.scheduler == OverlapScheduler.ON and has_one_queue(environment):
        found.append(
            f"{CONNECTIONS}=1: kernels of all streams start in the order of their launch, so "
            "copies and sums of exchanges do not overlap with compute, nor does a second stage "
            "(docs/internals/architecture.md, Overlap); unset it, or set it to 32, unless "
            "--tensor-model-parallel-size or --context-parallel-size above 1 needs it (before "
            "Blackwell)"
        )
    if on_cuda and not triton_needs.is_installed():
        found.append(triton_needs.NO_TRITON)
    elif on_cuda and (problem := triton_needs.problem(environment)) is not None:
        found.append(f"{problem}; without one, the first step fails unless the kernels are cached")
    return found


def _shape_problems(args: Namespace, config: FSEPConfig) -> list[str]:
    problems = []
    ranks, experts = args.expert_model_parallel_size, args.num_experts
    if experts > MAX_EXPERTS:
        return [f"--num-experts {experts}: must be at most {MAX_EXPERTS}"]
    if ranks > args.world_size:
        return [
            f"--expert-model-parallel-size {ranks}: must be at most the number of ranks, "
            f"{args.world_size} (WORLD_SIZE)"
        ]
    # A recipe that says nothing has Megatron's default.
    pattern = getattr(args, "moe_layer_freq", 1)
    if isinstance(pattern, list) and not any(pattern):
        problems.append(
            f"--moe-layer-freq {pattern}: no layer has experts; give one a 1, or leave out "
            "--expert-parallel-mode fsep"
        )
    if not 1 <= args.moe_router_topk <= experts:
        problems.append(
            f"--moe-router-topk {args.moe_router_topk}: must be 1 to --num-experts, {experts}"
        )
    # What `auto` takes is not known yet, and any number of slots for it fits rows.
    at_home = config.sharding == Sharding.EXPERTS
    try:
        geometry = resolve_geometry(
            experts,
            ranks,
            config.capacity,
            1,  # nodes are not known yet
            sharding=Sharding.EXPERTS if at_home else Sharding.ROWS,
            multiple=slots_multiple(args),
            flags=("--fsep-capacity", "--fsep-node-size"),
        )
        problems += buffer_problems(args, geometry)
    except ValueError as error:
        problems.append(str(error))
    if config.homes is not None:
        try:
            read_homes(Path(config.homes)).check_fits(ranks, experts)
        except (ValueError, OSError) as error:
            problems.append(problem_of("--fsep-homes", config.homes, error))
    try:
        check_node_size(ranks, config.node_size or 1, "--fsep-node-size")
    except ValueError as error:
        problems.append(str(error))
    return problems


def buffer_problems(args: Namespace, geometry: Geometry) -> list[str]:
    """Return problems of the flex dispatcher's buffers, which its kernels assert on a GPU."""
    if args.moe_token_dispatcher_type != "flex":
        return []
    problems, ranks = [], args.expert_model_parallel_size
    capacity, backend = geometry.capacity, args.moe_flex_dispatcher_backend
    fewest = geometry.home_slots + 1 if geometry.home_slots else -(-args.num_experts // ranks)
    flags = f"--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend {backend}"
    instead = "give --moe-token-dispatcher-type alltoall"
    if backend == "deepep":
        most_slots = 128 if ranks <= 8 else 64  # inside a node, and between nodes
        if args.moe_router_topk > _DEEPEP_TOP_K:
            problems.append(
                f"{flags} --moe-router-topk {args.moe_router_topk}: DeepEP sends a token to at "
                f"most {_DEEPEP_TOP_K} experts; {instead}"
            )
        if capacity > most_slots:
            fewer = f"give --fsep-capacity {fewest} to {most_slots}, or "
            problems.append(
                f"{flags} with {capacity} slots per rank: DeepEP takes at most {most_slots} on "
                f"{ranks} ranks; {fewer if fewest <= most_slots else ''}{instead}"
            )
    multiple = slots_multiple(args)
    if capacity * ranks % multiple:
        fitting = [c for c in range(fewest, args.num_experts + 1) if not c * ranks % multiple]
        larger = [c for c in fitting if c > capacity]
        better = f"give --fsep-capacity {min(larger or fitting)}, or " if fitting else ""
        problems.append(
            f"{flags} with {capacity} slots on each of {ranks} ranks: HybridEP needs a multiple of "
            f"{multiple} in all; {better}{instead}"
        )
    return problems
