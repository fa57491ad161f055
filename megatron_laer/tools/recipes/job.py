"""The batch script for Slurm asks here whether a job can run, before its nodes do any work.

    python -m megatron_laer.tools.recipes.job MODEL RANKS MODE NAME=VALUE ... -- FLAGS

prints the model's flags, one word a line; or, with status 2, one line on a setting that cannot be.
Sizes and FSEP's flags are checked as training checks them. All other flags are left to Megatron,
whose import would take longer than the rest of the script.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_laer.config import ExpertParallelMode
from megatron_laer.files.checks import quoted, refuse_unusable_folder
from megatron_laer.flags import add_arguments, config_from_args
from megatron_laer.support import arguments
from megatron_laer.support.table import REFUSALS
from megatron_laer.tools.model_flags import model_flags

_BOTH = "both"
_FOLDERS = ("CHECKPOINT", "LOG_DIR")
# Megatron's sizes of parallelism, with their default.
_SIZES = {
    "--expert-model-parallel-size": 1,
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--expert-tensor-parallel-size": None,
}
# Variables of the script, by the flag that they set.
_SET_BY = {"--expert-model-parallel-size": "EP_SIZE", "--fsep-capacity": "CAPACITY"}


def check(words: Sequence[str], ranks: int, mode: str, settings: Mapping[str, str]) -> None:
    """Refuse a job that cannot run.

    Args:
        words: Megatron's flags, the model's among them.
        mode: of expert parallelism, or `both`.
        settings: TOKENIZER, CHECKPOINT and LOG_DIR, where they are set.

    Raises:
        ValueError: a setting that cannot be, in terms of flags or of the script's variables.
    """
    mode_in_check = ExpertParallelMode.FSEP if mode == _BOTH else mode
    args = _parsed(["--expert-parallel-mode", mode_in_check, *words])
    args.world_size = ranks
    config = config_from_args(args)
    if config is not None:
        arguments.fill_in(args, {})
        arguments.check(args, config)
    if config is None or mode == _BOTH:
        _check_stock(args)
    _check_division(args)
    for name in _FOLDERS:
        if name in settings:
            refuse_unusable_folder(settings[name], name)
    if settings.get("TOKENIZER", "bytes") != "bytes":
        _check_tokenizer(settings["TOKENIZER"])


def _parsed(words: Sequence[str]) -> Namespace:
    parser = _Parser(allow_abbrev=False, add_help=False)
    add_arguments(parser)
    for flag, default in _SIZES.items():
        parser.add_argument(flag, type=_size, default=default)
    parser.add_argument("--num-experts", type=_size)
    parser.add_argument("--moe-router-topk", type=_size, default=2)
    parser.add_argument("--moe-token-dispatcher-type", default=None)
    parser.add_argument("--moe-flex-dispatcher-backend", default="deepep")
    parser.add_argument("--moe-permute-fusion", action="store_true")
    # What `--fsep-allow-unproven` allows, and is refused without.
    for row in REFUSALS:
        if row.unproven:
            parser.add_argument(row.flag, dest=row.argument, default=row.accepted[0])
    return parser.parse_known_args(words)[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _size(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no integer in 1..999999999")
    return number


def _check_stock(args: Namespace) -> None:
    """Refuse a number of experts that stock Megatron cannot divide over ranks."""
    ranks, experts = args.expert_model_parallel_size, args.num_experts
    if ranks > 1 and (experts is None or experts % ranks):
        raise ValueError(
            f"--num-experts {experts} on --expert-model-parallel-size {ranks}: without FSEP the "
            "experts must divide evenly; give a divisor of their number"
        )


def _check_division(args: Namespace) -> None:
    """Refuse groups of ranks that do not divide the job's, as Megatron does on every rank."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    expert_tensor = args.expert_tensor_parallel_size or tensor
    dense = tensor * pipeline * args.context_parallel_size
    expert = expert_tensor * pipeline * args.expert_model_parallel_size
    if args.world_size % dense:
        raise ValueError(
            f"tensor × pipeline × context parallelism is {dense}, which does not divide the "
            f"{args.world_size} ranks; give sizes whose product does"
        )
    if args.world_size % expert:
        raise ValueError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: with tensor "
            f"parallelism of experts and pipeline parallelism it makes {expert}, which does not "
            f"divide the {args.world_size} ranks; give one that does"
        )


def _check_tokenizer(folder: str) -> None:
    # Any of the forms that there are: tokenizer.json, tokenizer.model, vocab.json.
    files = (file for name in ("tokenizer*", "vocab*") for file in Path(folder).glob(name))
    if not Path(folder).is_dir() or next(files, None) is None:
        raise ValueError(
            f"TOKENIZER={quoted(folder)} is no folder with a Hugging Face tokenizer; give one, or "
            "bytes"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"TOKENIZER={quoted(folder)} needs the package transformers; give "
            f"{shlex.quote(sys.executable)} -m pip install transformers, or TOKENIZER=bytes"
        )


def main(words: Sequence[str]) -> int:
    """Print the model's flags; 2 and one line for a job that cannot run."""
    model, ranks, mode, *rest = words
    at = rest.index("--")
    pairs, flags_of_job = rest[:at], rest[at + 1 :]
    settings = dict(pair.split("=", 1) for pair in pairs)
    try:
        flags = model_flags(model)
        check([*flags, *flags_of_job], int(ranks), mode, settings)
    except (ValueError, OSError) as error:
        text = str(error)
        by = [f"{name} sets {flag}" for flag, name in _SET_BY.items() if flag in text]
        print(f"pretrain.sbatch: {text}{f' ({", ".join(by)})' if by else ''}", file=sys.stderr)
        return 2
    print("\n".join(flags))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
