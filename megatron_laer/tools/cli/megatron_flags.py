"""Megatron's flags of a run, parsed by Megatron's parser and ours."""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from argparse import Namespace
from contextlib import nullcontext

from megatron_laer.files.checks import quoted
from megatron_laer.tools.cli.argument_types import MOST_RANKS
from megatron_laer.tools.cli.program import RaisingParser
from megatron_laer.tools.cli.progress import working
from megatron_laer.tools.model_flags import MOST_OF_MODEL
from megatron_laer.tools.recipes.command_lines import (
    NOT_EXPANDED,
    check_patterns,
    check_variables,
    has_variable,
)

# Maxima of a run's sizes, which are at least 1.
_MOST_OF_RUN = {
    **dict.fromkeys(
        (
            *("--pipeline-model-parallel-size", "--tensor-model-parallel-size"),
            *("--context-parallel-size", "--expert-model-parallel-size", "--micro-batch-size"),
            "--expert-tensor-parallel-size",
        ),
        MOST_RANKS,
    ),
    "--global-batch-size": 2**24,
    "--num-virtual-stages-per-pipeline-rank": MOST_OF_MODEL["--num-layers"],
    "--num-layers-per-virtual-pipeline-stage": MOST_OF_MODEL["--num-layers"],
}
# Limit of all other integers, beyond which neither NumPy nor torch has them.
_MOST = 2**63 - 1


def parsed(words: list[str], ranks: int | None = None) -> Namespace:
    """Return the settings of a run with FSEP on `ranks` ranks, by default one group's.

    Raises ValueError for words that are no flags, and for integers beyond all bounds.
    """
    from megatron_laer import fsep_flags
    from megatron_laer.choices import ExpertParallelMode
    from megatron_laer.support import arguments

    check_patterns(words)
    check_variables(words)
    fsep_flags.check_known(words)
    is_here = "megatron.training.arguments" in sys.modules
    # Megatron warns at import about parts that a run would need, and nothing is run.
    with (
        nullcontext() if is_here else working("importing Megatron"),
        warnings.catch_warnings(action="ignore"),
    ):
        replace_cuda_where_needed()
        from megatron.training.arguments import add_megatron_arguments

    parser = fsep_flags.add_arguments(add_megatron_arguments(RaisingParser()))
    parser.set_defaults(**dict.fromkeys(arguments.FILLED_IN))
    try:
        settings, unknown = parser.parse_known_args(words)
    except ValueError as error:
        if not has_variable(str(error)):
            raise
        raise ValueError(f"{error}; {NOT_EXPANDED}") from error
    if unknown:
        check_variables(unknown)
        raise ValueError(
            f"{quoted(shlex.join(unknown))}: neither Megatron nor FSEP has such flags; leave out "
            "what is a script's own, and write the others as they are in full"
        )
    if settings.yaml_cfg is not None:
        raise ValueError(
            f"--yaml-cfg {quoted(settings.yaml_cfg)}: Megatron's settings would all come from that "
            "file, and FSEP's flags have no effect with it; give Megatron's flags"
        )
    _check_bounds(settings)
    settings.expert_parallel_mode = ExpertParallelMode.FSEP
    settings.world_size = ranks or settings.expert_model_parallel_size
    settings.gives_dispatcher = settings.moe_token_dispatcher_type is not None
    arguments.fill_in(settings, {})
    arguments.leave_out(settings)
    return settings


def _check_bounds(settings: Namespace) -> None:
    """Refuse integers that no run has, before any work whose time or memory grows with them."""
    for name, value in vars(settings).items():
        if name.startswith("fsep_"):  # whose bounds are those of FSEPConfig
            continue
        flag = f"--{name.replace('_', '-')}"
        least = 1 if flag in _MOST_OF_RUN else 0 if flag in MOST_OF_MODEL else -_MOST
        most = _MOST_OF_RUN.get(flag, MOST_OF_MODEL.get(flag, _MOST))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not least <= number <= most:
                raise ValueError(f"{flag} {quoted(number)} is no integer in {least}..{most}")


def ranks_problem(settings: Namespace, ranks: int) -> str | None:
    """Return why Megatron makes no process groups of these ranks; see its parallel_state."""
    for names in (
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        (
            *("expert_tensor_parallel_size", "pipeline_model_parallel_size"),
            "expert_model_parallel_size",
        ),
    ):
        sizes = {name: getattr(settings, name, None) or 1 for name in names}
        if ranks % math.prod(sizes.values()):
            given = [f"--{name.replace('_', '-')} {n}" for name, n in sizes.items() if n > 1]
            return (
                f"{' '.join(given)}: {ranks} ranks are no multiple of {math.prod(sizes.values())}; "
                "give other sizes, or another number of ranks"
            )
    return None


def replace_cuda_where_needed() -> None:
    from megatron_laer import device

    if device.cpu_needed():
        device.install_cpu()
