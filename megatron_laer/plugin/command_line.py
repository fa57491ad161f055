"""Megatron's command line: FSEP's flags, and what follows from them."""

from __future__ import annotations

import functools
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_laer import config as settings
from megatron_laer import support
from megatron_laer.platform import cpu
from megatron_laer.platform.versions import check_version
from megatron_laer.plugin.metrics import install_metrics
from megatron_laer.plugin.patching import Patch, apply, undo
from megatron_laer.plugin.switch import disable, enable

logger = logging.getLogger(__name__)


def install() -> None:
    """Teach Megatron's command line `--expert-parallel-mode`; idempotent.

    FSEP itself is turned on when the arguments are validated and ask for it.
    """
    check_version()
    for patch in ARGUMENT_PATCHES:
        apply(patch)


def uninstall() -> None:
    """Undo `install` and `enable`."""
    disable()
    for patch in ARGUMENT_PATCHES:
        undo(patch)


def _with_fsep_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        # With --yaml-cfg Megatron throws the command line away, ours included.
        words = [word.split("=")[0] for word in sys.argv]
        ours = [word for word in words if word.startswith(("--fsep-", "--expert-parallel-mode"))]
        if ours and "--yaml-cfg" in words:
            raise ValueError(
                f"{', '.join(ours)} has no effect with --yaml-cfg, which replaces the command "
                "line; give Megatron's settings as flags"
            )
        return settings.add_arguments(original(parser))

    return add_megatron_arguments


def _with_fsep_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Namespace, *rest: Any, **kwargs: Any) -> Any:
        config = settings.config_from_args(args)
        if config is None:
            return original(args, *rest, **kwargs)
        if getattr(args, "deterministic_mode", False):
            if settings.given_flags(args).get("late_plan") == "keep":
                raise ValueError(
                    "--fsep-late-plan keep: --deterministic-mode waits for plans; leave one out"
                )
            config = settings.deterministic(config)
        support.check(args, config)
        # Megatron demands that experts divide over ranks, which slots do not need. It reads the
        # number for nothing else before the model is built.
        experts, ranks = args.num_experts, args.expert_model_parallel_size
        args.num_experts = -(-experts // ranks) * ranks
        try:
            result = original(args, *rest, **kwargs)
        finally:
            args.num_experts = experts
        support.check(args, config)  # again, since Megatron rewrites deprecated flags
        if args.rank == 0:
            on_cuda = not cpu.installed()
            for warning in support.warnings(args, config, os.environ, on_cuda=on_cuda):
                logger.warning("FSEP: %s", warning)
        enable(config, seed=args.seed)
        install_metrics(args)
        return result

    return validate_args


ARGUMENT_PATCHES = (
    Patch(
        "megatron.training.arguments",
        "add_megatron_arguments",
        _with_fsep_arguments,
        "adds the FSEP flags",
    ),
    Patch(
        "megatron.training.arguments",
        "validate_args",
        _with_fsep_validation,
        "refuses what FSEP cannot run with, and turns FSEP on",
    ),
)
