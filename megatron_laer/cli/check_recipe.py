"""`check-recipe` says whether settings run with FSEP, and without which flags they would."""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_laer.cli.argument_types import path
from megatron_laer.files.checks import quoted, refuse_overwriting, refuse_unwritable
from megatron_laer.files.writing import write_output
from megatron_laer.files.yaml_text import read_yaml
from megatron_laer.integrations.bridge_config import judge_container, load_recipe
from megatron_laer.recipes.bridge import judge_recipe, read_recipes, recipe_of
from megatron_laer.recipes.flags import (
    check_patterns,
    flags_in_mapping,
    flags_in_text,
    script_flags,
    without,
)
from megatron_laer.recipes.proof import Proof
from megatron_laer.recipes.verdict import Judgement, Verdict, judge

# 2 is for what cannot be judged, as with every command.
STATUS = {
    Verdict.RUNS: 0,
    Verdict.REFUSED: 1,
    Verdict.SPEED_ONLY: 3,
    Verdict.PRECISION: 4,
    Verdict.SET_EP: 5,
}
_SAID = {
    Verdict.RUNS: "runs",
    Verdict.SPEED_ONLY: "runs without these speed-only flags: {drop}",
    Verdict.PRECISION: "runs in bf16, without these flags: {drop}",
    Verdict.SET_EP: "uses no expert parallelism, which FSEP needs",
    Verdict.REFUSED: "refused",
}
_PROVED = {
    Proof.CPU: "proved by parity rows on the CPU",
    Proof.REPLACEMENT: "proved by parity rows on the CPU, where replacements stand for what "
    "Megatron has for GPUs alone",
    Proof.GPU: "proved by a run on a GPU",
}

_EPILOG = """\
exit status: 0 runs, 3 runs without the speed-only flags that are named, 4 runs in bf16 and without
the flags that are named, 5 uses no expert parallelism, 1 refused, 2 cannot be judged; with
--bridge-csv 0 once all recipes are judged
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check-recipe` to `parser`; what follows `--` are Megatron's flags."""
    parser.usage = (
        "%(prog)s [FILE] [--bridge-recipe NAME] [--bridge-csv CSV [--json OUT]] [-- FLAGS]"
    )
    parser.description = (
        "Judges Megatron's flags, or recipes of Megatron-Bridge, by the table that training "
        "refuses settings by."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "file",
        nargs="?",
        type=path,
        metavar="FILE",
        help="YAML (.yaml, .yml) with flags or with a recipe's fields, else a command line",
    )
    parser.add_argument(
        "--bridge-recipe",
        metavar="NAME",
        help="a function of megatron.bridge.recipes, or MODULE:FUNCTION, where that is installed",
    )
    parser.add_argument(
        "--bridge-csv", type=path, metavar="CSV", help="a table of Megatron-Bridge's recipes"
    )
    parser.add_argument("--json", type=path, metavar="OUT", help="write the table's verdicts there")


def run(args: Namespace) -> int:
    """Run `check-recipe`."""
    given = [args.file, args.bridge_recipe, args.bridge_csv, args.flags or None]
    if sum(source is not None for source in given) != 1:
        raise ValueError("give one of FILE, --bridge-recipe NAME, --bridge-csv CSV and -- FLAGS")
    if args.json is not None and args.bridge_csv is None:
        raise ValueError(f"--json {quoted(args.json)}: only with --bridge-csv")
    if args.bridge_csv is not None:
        return _judge_table(args.bridge_csv, args.json)
    if args.bridge_recipe is not None:
        _replace_cuda_where_needed()
        return _say(judge_container(*load_recipe(args.bridge_recipe)))
    if args.file is None:
        return _judge_flags(script_flags(args.flags))
    if args.file.suffix not in (".yaml", ".yml"):
        return _judge_flags(flags_in_text(args.file))
    content = read_yaml(args.file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{args.file}: give `flag: value` lines, or a recipe's `field: value`")
    if "recipe" in content:
        return _say(judge_recipe(recipe_of(content, str(args.file))))
    return _judge_flags(flags_in_mapping(content, str(args.file)))


def _judge_table(table: Path, output: Path | None) -> int:
    if output is not None:
        refuse_unwritable(output, "--json")
        refuse_overwriting(output, [table], "--json")
    judged = [(row["recipe"], judge_recipe(row)) for row in read_recipes(table)]
    for recipe, judgement in judged:
        print(f"{judgement.verdict:<10}  {recipe}")
    counts = Counter(judgement.verdict for _, judgement in judged)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict))
    if output is not None:
        listed = [
            {
                "recipe": recipe,
                "verdict": judgement.verdict,
                "proved_by": judgement.proved_by,
                "because": judgement.because,
                "drop": judgement.drop,
            }
            for recipe, judgement in judged
        ]
        write_output(output, json.dumps(listed, indent=1) + "\n", "--json")
    return 0


def _judge_flags(words: list[str]) -> int:
    from megatron_laer.flags import config_from_args
    from megatron_laer.support import RefusedError, arguments

    settings = _parsed(words)
    config = config_from_args(settings)
    assert config is not None, "the mode is set"
    judgement = judge(settings, config.allow_unproven)
    kept = without(words, judgement.drop)
    if judgement.verdict is Verdict.PRECISION and not {"--bf16", "--fp16"} & set(kept):
        kept.append("--bf16")
    if judgement.verdict not in (Verdict.SET_EP, Verdict.REFUSED):
        try:  # once more, and now with the sizes that no row of the table knows
            arguments.check(_parsed(kept), config)
        except RefusedError as error:
            judgement = Judgement(Verdict.REFUSED, None, (str(error),))
    status = _say(judgement)
    if judgement.verdict in (Verdict.SPEED_ONLY, Verdict.PRECISION):
        print(shlex.join(kept))
    return status


def _parsed(words: list[str]) -> Namespace:
    """Parse flags as Megatron does, for a run in FSEP's mode.

    Raises:
        ValueError: a flag that neither Megatron nor FSEP has, or a value that does not fit.
    """
    from megatron_laer import flags
    from megatron_laer.config import ExpertParallelMode
    from megatron_laer.support import arguments

    check_patterns(words)
    with warnings.catch_warnings():
        # Megatron says at import what a run would miss here, and nothing is run.
        warnings.simplefilter("ignore")
        _replace_cuda_where_needed()
        from megatron.training.arguments import add_megatron_arguments

    parser: argparse.ArgumentParser = _Parser(allow_abbrev=False, add_help=False)
    parser = flags.add_arguments(add_megatron_arguments(parser))
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
            "file, and FSEP's flags have no effect beside it; give Megatron's flags"
        )
    settings.expert_parallel_mode = ExpertParallelMode.FSEP
    settings.world_size = settings.expert_model_parallel_size
    arguments.fill_in(settings, {})
    arguments.leave_out(settings)
    return settings


def _replace_cuda_where_needed() -> None:
    """Do so before Megatron is imported, which later is too late."""
    from megatron_laer.platform import cpu

    if cpu.needed():
        cpu.install()


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong instead of ending the process after the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _say(judgement: Judgement) -> int:
    said: Any = _SAID[judgement.verdict].format(drop=" ".join(judgement.drop))
    if judgement.proved_by:
        said += f"; {_PROVED[judgement.proved_by]}"
    elif judgement.verdict not in (Verdict.SET_EP, Verdict.REFUSED):
        said += "; nothing proves it yet"
    print(said + (", because" if judgement.because else ""))
    for reason in judgement.because:
        print(f"  {reason}")
    return STATUS[judgement.verdict]
