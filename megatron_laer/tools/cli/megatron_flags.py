"""Megatron's flags of a run, parsed by Megatron's parser and ours."""

from __future__ import annotations

import shlex
import sys
import warnings
from argparse import Namespace

from megatron_laer.files.checks import quoted
from megatron_laer.tools.cli.program import RaisingParser
from megatron_laer.tools.recipes.command_lines import check_patterns


def parsed(words: list[str], ranks: int | None = None) -> Namespace:
    """Return the settings of a run with FSEP on `ranks` ranks, by default one group's.

    Raises ValueError for words that are no flags.
    """
    from megatron_laer import fsep_flags
    from megatron_laer.choices import ExpertParallelMode
    from megatron_laer.support import arguments

    check_patterns(words)
    fsep_flags.check_known(words)
    if "megatron.training.arguments" not in sys.modules:
        say_wait("Megatron")
    # Megatron warns at import about parts that a run would need, and nothing is run.
    with warnings.catch_warnings(action="ignore"):
        replace_cuda_where_needed()
        from megatron.training.arguments import add_megatron_arguments

    parser = fsep_flags.add_arguments(add_megatron_arguments(RaisingParser()))
    parser.set_defaults(**dict.fromkeys(arguments.FILLED_IN))
    settings, unknown = parser.parse_known_args(words)
    if unknown:
        raise ValueError(
            f"{quoted(shlex.join(unknown))}: neither Megatron nor FSEP has such flags; leave out "
            "what is a script's own, and write the others as they are in full"
        )
    if settings.yaml_cfg is not None:
        raise ValueError(
            f"--yaml-cfg {quoted(settings.yaml_cfg)}: Megatron's settings would all come from that "
            "file, and FSEP's flags have no effect with it; give Megatron's flags"
        )
    settings.expert_parallel_mode = ExpertParallelMode.FSEP
    settings.world_size = ranks or settings.expert_model_parallel_size
    arguments.fill_in(settings, {})
    arguments.leave_out(settings)
    return settings


def replace_cuda_where_needed() -> None:
    from megatron_laer import device

    if device.cpu_needed():
        device.install_cpu()


def say_wait(imported: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"importing {imported}, which takes some seconds", file=sys.stderr, flush=True)
