"""`check-recipe` judges whether settings run with FSEP, and without which flags they would."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from argparse import Namespace
from dataclasses import replace

from megatron_laer.files.checks import one_line
from megatron_laer.tools.cli.argument_types import MOST_RANKS, between, option, path
from megatron_laer.tools.cli.megatron_flags import (
    parsed,
    ranks_problem,
    replace_cuda_where_needed,
)
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.cli.progress import working
from megatron_laer.tools.recipes.command_lines import flags_in_file, script_flags, without
from megatron_laer.tools.recipes.containers import judge_container, load_recipe
from megatron_laer.tools.recipes.verdict import Judgement, Verdict, judge

# Exit status by verdict; 2 is for settings that cannot be judged, as with every command.
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
_LOST = {
    Verdict.SPEED_ONLY: "their speed-up is lost, and no figure weighs it",
    Verdict.PRECISION: "the speed-up of fp8 or fp4 and of these is lost, and no figure weighs it",
}

_EPILOG = """\
examples:
  %(prog)s --ranks 64 -- $(python -m megatron_laer flags qwen3-30b-a3b) \\
      --expert-model-parallel-size 8
  %(prog)s flags.txt
  %(prog)s --bridge-recipe qwen3_30b_a3b_pretrain_config

exit status: 0 runs, 3 runs without the speed-only flags that are named, 4 runs in bf16 and without
the flags that are named, 5 uses no expert parallelism, 1 refused, 2 cannot be judged
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [FILE] [--bridge-recipe NAME] [[--ranks N] -- FLAGS]"
    describe(
        parser,
        "Judges Megatron's flags, or a recipe of Megatron-Bridge, by the table that training "
        "refuses settings by.",
        _EPILOG,
    )
    text = "YAML with flags (.yaml, .yml), else a command line"
    parser.add_argument("file", nargs="?", type=path, metavar="FILE", help=text)
    text = "a function of megatron.bridge.recipes, or MODULE:FUNCTION of your own, which is called"
    option(parser, "--bridge-recipe NAME", text)
    text = "ranks that the flags are for; default: --expert-model-parallel-size"
    option(parser, "--ranks N", text, between(1, MOST_RANKS))


def run(args: Namespace) -> int:
    given = [args.file, args.bridge_recipe, args.flags or None]
    if sum(source is not None for source in given) != 1:
        raise ValueError("give one of FILE, --bridge-recipe NAME and -- FLAGS")
    if args.ranks is not None and not args.flags:
        raise ValueError(f"--ranks {args.ranks}: no effect without -- FLAGS; leave it out")
    if args.bridge_recipe is not None:
        return say(_judge_function(args.bridge_recipe))
    if args.file is None:
        return _judge_flags(script_flags(args.flags), args.ranks)
    return _judge_flags(flags_in_file(args.file))


def _judge_function(name: str) -> Judgement:
    """Judge the container that a function of Megatron-Bridge returns.

    Output of its imports goes to stderr only on success: it would bury the one line of an error.
    """
    said = io.StringIO()
    with (
        working("importing Megatron-Bridge"),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        replace_cuda_where_needed()
        judgement = judge_container(*load_recipe(name))
    sys.stderr.write(said.getvalue())
    return judgement


def _judge_flags(words: list[str], ranks: int | None = None) -> int:
    from megatron_laer.fsep_flags import config_from_args
    from megatron_laer.planner.strategies import check_planner
    from megatron_laer.support import arguments

    settings = parsed(words, ranks)
    from megatron_laer.plugin.switch import check_files  # imports Megatron, for which CUDA is set

    try:
        config = config_from_args(settings)
        assert config is not None, "the mode is set"
        check_planner(config.planner)
        check_files(config)
        config, _ = arguments.with_needed_sharding(settings, config)
    except ValueError as error:
        allowed = settings.fsep_allow_unproven or ()
        return say(judge(settings, allowed, also_refused=[str(error)]))
    settings.fsep_sharding = config.sharding
    own = arguments.own_problems(settings, config)
    if ranks is not None and (problem := ranks_problem(settings, ranks)):
        own.append(problem)
    judgement = judge(settings, config.allow_unproven, also_refused=own)
    # A recipe of fp8 has no effect without it.
    idle = ["--fp8-recipe"] if "--fp8-format" in judgement.drop else []
    kept = without(words, [*judgement.drop, *idle])
    if judgement.verdict is Verdict.PRECISION and not {"--bf16", "--fp16"} & set(kept):
        kept.append("--bf16")
    if judgement.runs:
        _check_complete(settings)
        try:  # once more, with the words of `allow`
            words_given = (*config.allow_unproven, *judgement.allow)
            config = replace(config, allow_unproven=words_given)
            found = arguments.problems(parsed(kept, ranks), config)
        except ValueError as error:
            found = [str(error)]
        if found:
            judgement = Judgement(Verdict.REFUSED, None, tuple(found))
    status = say(judgement)
    if judgement.verdict in (Verdict.SPEED_ONLY, Verdict.PRECISION):
        allowing = ["--fsep-allow-unproven", *config.allow_unproven] if judgement.allow else []
        _print(shlex.join([*kept, *allowing]))
    return status


def _check_complete(settings: Namespace) -> None:
    """Refuse flags that Megatron makes no model of, and that nothing else is wrong with."""
    if settings.use_checkpoint_args:
        return
    given = {
        "--num-layers": settings.num_layers
        or settings.encoder_num_layers
        or settings.hybrid_layer_pattern,
        "--hidden-size": settings.hidden_size,
        "--num-attention-heads": settings.num_attention_heads,
    }
    if lacking := [flag for flag, value in given.items() if not value]:
        raise ValueError(
            f"without {', '.join(lacking)} the flags have no model and cannot be judged; add them"
        )


def say(judgement: Judgement) -> int:
    """Print a judgement with its reasons, and return the exit status."""
    said = _SAID[judgement.verdict].format(drop=" ".join(judgement.drop))
    if judgement.allow:
        said += f", with --fsep-allow-unproven {' '.join(judgement.allow)}, which no card has shown"
    if judgement.verdict in _LOST:
        said += f"; {_LOST[judgement.verdict]}"
    if judgement.runs:
        said += f"; {judgement.proof or 'nothing proves it yet'}"
    _print(said + (", because" if judgement.because else ""))
    for reason in judgement.because:
        _print(f"  {reason}")
    return STATUS[judgement.verdict]


def _print(text: str) -> None:
    print(one_line(text, longest=len(text)))
