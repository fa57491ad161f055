"""FSEP's flags in Megatron's command line; its validation turns FSEP on."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_laer import fsep_flags
from megatron_laer.choices import Auto, ExpertParallelMode
from megatron_laer.config import FSEPConfig, deterministic
from megatron_laer.device import cpu_installed
from megatron_laer.files.checks import quoted, read_text
from megatron_laer.layer.experts.gemm import check_gemm
from megatron_laer.megatron_version import check_version
from megatron_laer.planner.sharding_choice import shardings
from megatron_laer.plugin.checkpoints import sharding_of_checkpoint
from megatron_laer.plugin.install_tracker import install_metrics
from megatron_laer.plugin.optimizers import check_installed
from megatron_laer.plugin.patching import apply, around, undo
from megatron_laer.plugin.switch import disable, enable
from megatron_laer.runtime.comm import launcher
from megatron_laer.support import RefusedError, arguments
from megatron_laer.telemetry.log import say

logger = logging.getLogger(__name__)


def install() -> None:
    """Add FSEP's flags to Megatron's command line; a second call does nothing.

    FSEP is turned on when arguments that ask for it are validated.
    """
    check_version()
    for patch in ARGUMENT_PATCHES:
        apply(patch)


def uninstall() -> None:
    disable()
    for patch in ARGUMENT_PATCHES:
        undo(patch)


@around("megatron.training.arguments", "add_megatron_arguments", "adds the FSEP flags")
def _add_arguments(original: Any, parser: Any) -> Any:
    mode, yaml_cfg = _asked_for()
    with _refusing():
        if yaml_cfg is not None:
            _refuse_yaml(yaml_cfg)
        fsep_flags.check_known(sys.argv)
        if mode == ExpertParallelMode.FSEP:
            # Megatron reads these variables while it adds its arguments and parses.
            launcher.check_ranks(os.environ)
    parser = fsep_flags.add_arguments(original(parser))
    if mode == ExpertParallelMode.FSEP:
        # None marks a flag as not given, so that Megatron uses a checkpoint's argument. The
        # validation fills in the rest.
        parser.set_defaults(**dict.fromkeys(arguments.FILLED_IN))
    return parser


def _asked_for() -> tuple[str | None, str | None]:
    """Read `--expert-parallel-mode` and `--yaml-cfg` from the command line, as Megatron will."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--expert-parallel-mode", nargs="?")
    parser.add_argument("--yaml-cfg", nargs="?")
    args, _ = parser.parse_known_args()
    return args.expert_parallel_mode, args.yaml_cfg


def _refuse_yaml(path: str) -> None:
    """Refuse FSEP's settings in or next to Megatron's YAML file, where they have no effect."""
    # The file replaces the command line, including FSEP's flags.
    words = [word.split("=")[0] for word in sys.argv]
    ours = [word for word in words if word.startswith(("--fsep-", "--expert-parallel-mode"))]
    if ours:
        raise ValueError(
            f"{', '.join(ours)} has no effect with --yaml-cfg, which replaces the command line; "
            "give Megatron's settings as flags"
        )
    try:
        text = read_text(Path(path))
    except (OSError, ValueError):
        return  # Megatron reports that error
    keys = re.findall(r"^\s*(expert_parallel_mode|fsep_\w+)\s*:", text, re.MULTILINE)
    if keys:
        raise ValueError(
            f"--yaml-cfg {quoted(path)}: {', '.join(keys)} has no effect there; give Megatron's "
            "settings and FSEP's as flags"
        )


@around(
    "megatron.training.arguments",
    "validate_args",
    "refuses what FSEP cannot run with, and turns FSEP on",
    also=(
        "args.num_experts: rounded up to a multiple of the ranks while Megatron validates",
        "args: FSEP's needs filled in, no-ops left out, as said in lines at start",
    ),
)
def _validate(original: Any, args: Namespace, *rest: Any, **kwargs: Any) -> Any:
    with _refusing():
        _refuse_without_gpu(args)
        config = fsep_flags.config_from_args(args)
        if config is not None:
            config, said = _checked(args, config, rest[0] if rest else kwargs.get("defaults"))
    if config is None:
        return original(args, *rest, **kwargs)
    # Megatron requires that experts divide over ranks; slots do not. Before the model is built it
    # uses the number for nothing else.
    experts, ranks = args.num_experts, args.expert_model_parallel_size
    args.num_experts = -(-experts // ranks) * ranks
    try:
        result = original(args, *rest, **kwargs)
    finally:
        args.num_experts = experts
    arguments.check(args, config)  # again, since Megatron rewrites deprecated flags
    if args.rank == 0:
        for line in said:
            # Printed like Megatron's own lines on derived values, before logging has a level.
            say(line)
        on_cuda = not cpu_installed()
        for warning in arguments.warnings(config, os.environ, on_cuda=on_cuda):
            logger.warning("FSEP: %s", warning)
    with _refusing():
        # Megatron has derived the dtype at this point.
        device = torch.device("cpu" if cpu_installed() else "cuda")
        check_gemm(config.gemm, device, args.params_dtype)
        check_installed(args.optimizer)
        enable(config, seed=args.seed)
    install_metrics(args.log_interval, args.num_layers, args.mtp_num_layers or 0)
    return result


def _refuse_without_gpu(args: Namespace) -> None:
    """Refuse flags for GPUs on a machine without one, with one message per machine.

    A launcher ends the other ranks as soon as the first has said it.
    """
    if cpu_installed() and args.distributed_backend == "nccl":
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_ONE_SPEAKS_S)
        raise ValueError(
            "this machine has no GPU that torch can use, and these flags need one; to train on the "
            "CPU, take the flags of `python -m megatron_laer flags tiny-moe --cpu`"
        )


_ONE_SPEAKS_S = 30.0


def _checked(
    args: Namespace, config: FSEPConfig, script_defaults: Mapping[str, object] | None
) -> tuple[FSEPConfig, list[str]]:
    """Check and complete arguments; return the config in force, and lines about changes."""
    if getattr(args, "deterministic_mode", False):
        config = deterministic(config)
    filled = arguments.fill_in(args, script_defaults or {})
    arguments.check(args, config)
    given, (config, why) = config, arguments.with_needed_sharding(args, config)
    resumed = None
    if len(shardings(config, args.expert_model_parallel_size, args.num_experts)) > 1:
        resumed = sharding_of_checkpoint(args)
        config = replace(config, sharding=resumed or config.sharding)
    if config.sharding != Auto.AUTO:
        args.fsep_sharding = config.sharding.value
    left_out = arguments.leave_out(args)
    said = []
    if config.node_size is None:
        told = launcher.told_ranks_per_node(os.environ, args.world_size)
        if told is not None and told[1] == args.world_size:
            # No error, since one script may serve one node and many.
            of_one_node = replace(config, node_size=args.expert_model_parallel_size)
            said += [f"FSEP: {text}" for text in arguments.problems(args, of_one_node)]
    if filled:
        said.append(f"FSEP takes {' '.join(filled)}, which it needs")
    if config != given:
        if resumed is not None:
            why = f"the checkpoint in --load {quoted(args.load)} has it"
        said.append(f"FSEP takes --fsep-sharding {config.sharding}: {why.split('; ')[0]}")
    if left_out:
        said.append(f"FSEP leaves out {' '.join(left_out)}, which has no effect without fp8")
    return config, said


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Raise user errors as `RefusedError`, which launchers do not retry."""
    try:
        yield
    except ValueError as error:
        raise RefusedError(str(error)) from error


ARGUMENT_PATCHES = (_add_arguments, _validate)
