"""Flags of a Slurm job, checked for its batch script before its nodes do any work.

    python -m megatron_laer.tools.cli.slurm_job NODES GPUS FLAGS

prints assignments of bash or, with status 2, one line on a wrong setting. The settings are the
script's variables. Sizes and FSEP's flags are checked as in training. All other flags are left to
Megatron, whose import would take longer than the rest of the script.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_laer.config import ExpertParallelMode
from megatron_laer.files.checks import one_line, quoted, refuse_unusable_folder
from megatron_laer.fsep_flags import add_arguments, config_from_args
from megatron_laer.support import arguments
from megatron_laer.support.table import REFUSALS
from megatron_laer.tools.cli.program import RaisingParser
from megatron_laer.tools.model_flags import model_flags
from megatron_laer.tools.recipes.command_lines import without

_BOTH = "both"
_TRAINING = (
    "--micro-batch-size 1 --global-batch-size 128 --train-iters 1000 "
    "--lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.1 "
    "--adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--split 99,1,0 --eval-interval 500 --eval-iters 10 --log-interval 1"
).split()
_FOLDERS = ("CHECKPOINT", "LOG_DIR")
# Megatron's sizes of parallelism, with their defaults.
_SIZES = {
    "--expert-model-parallel-size": 1,
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--expert-tensor-parallel-size": None,
}
# Variables of the script, by the flag that they set.
_SET_BY = {"--expert-model-parallel-size": "EP_SIZE", "--fsep-capacity": "CAPACITY"}


def job_settings(
    user: Sequence[str], ranks: int, settings: Mapping[str, str]
) -> dict[str, str | list[str]]:
    """Return the variables of the batch script that follow from its `settings`.

    `user` has the flags after `--`, which take precedence.
    """
    settings = {name: value for name, value in settings.items() if value}
    mode = settings.get("MODE", ExpertParallelMode.FSEP)
    _check_user_flags(user, settings)
    training = [
        *model_flags(settings["MODEL"]),
        *_tokenizer_flags(settings.get("TOKENIZER")),
        *("--data-path", settings["DATA_PREFIX"], *_TRAINING),
        *("--expert-model-parallel-size", settings.get("EP_SIZE", str(ranks))),
        *("--expert-tensor-parallel-size", "1"),
    ]
    if "DATA_CACHE" in settings:
        training += ["--data-cache-path", settings["DATA_CACHE"]]
    user = [*(("--fsep-capacity", c) if (c := settings.get("CAPACITY")) else ()), *user]
    args = check([*training, *user], ranks, mode, settings)
    steps = last_value("--train-iters", [*training, *user])
    if not (steps.isascii() and steps.isdigit() and len(steps) <= 12):
        raise ValueError(f"--train-iters {steps} is no number of steps")
    # With one connection, kernels of all streams run in the order of their launch, so FSEP's
    # exchanges are not hidden. Megatron requires one with tensor or context parallelism.
    fsep_flags = {word.partition("=")[0] for word in user if word.startswith("--fsep-")}
    in_order = max(args.tensor_model_parallel_size, args.context_parallel_size) > 1
    return {
        "training_flags": training,
        "user_flags_fsep": user,
        # The plugin refuses FSEP's flags without its mode; with `both`, only one run has them.
        "user_flags_standard": without(user, fsep_flags) if mode == _BOTH else user,
        "steps": steps,
        "connections": "1" if in_order else "32",
        "exit_signal": last_value("--exit-signal", user),
    }


def last_value(flag: str, words: Sequence[str]) -> str:
    """Return the last value of a flag, the effective one; "" without one."""
    value = ""
    for place, word in enumerate(words):
        if word.startswith(f"{flag}="):
            value = word.partition("=")[2]
        elif word == flag and place + 1 < len(words):
            value = words[place + 1]
    return value


def _check_user_flags(user: Sequence[str], settings: Mapping[str, str]) -> None:
    if user and not user[0].startswith("--"):
        raise ValueError(
            f"'{user[0]}' is no flag of Megatron's; give flags, as in --train-iters 10"
        )
    if last_value("--train-samples", user):
        raise ValueError("--train-samples: a run here is counted in steps; give --train-iters")
    checkpoint, restarts = settings.get("CHECKPOINT"), settings.get("MAX_RESTARTS", "0")
    if checkpoint is None and restarts != "0":
        raise ValueError(
            f"MAX_RESTARTS={restarts} would begin at step 0 again; set CHECKPOINT as well"
        )
    for flag in (word.partition("=")[0] for word in user):
        if checkpoint is not None and flag in ("--save", "--load"):
            raise ValueError(
                f"CHECKPOINT={checkpoint} sets --save and --load; leave {flag} out (to begin from "
                "another run's weights: --pretrained-checkpoint)"
            )


def _tokenizer_flags(tokenizer: str | None) -> tuple[str, ...]:
    if tokenizer is None:
        return ()
    if tokenizer == "bytes":
        return ("--tokenizer-type", "NullTokenizer", "--vocab-size", "257")
    return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)


def check(words: Sequence[str], ranks: int, mode: str, settings: Mapping[str, str]) -> Namespace:
    """Refuse a job that cannot run; return the checked flags."""
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
    return args


def _parsed(words: Sequence[str]) -> Namespace:
    parser = RaisingParser()
    add_arguments(parser)
    for flag, default in _SIZES.items():
        parser.add_argument(flag, type=_size, default=default)
    parser.add_argument("--num-experts", type=_size)
    parser.add_argument("--moe-router-topk", type=_size, default=2)
    parser.add_argument("--moe-token-dispatcher-type", default=None)
    parser.add_argument("--moe-flex-dispatcher-backend", default="deepep")
    parser.add_argument("--moe-permute-fusion", action="store_true")
    # Flags that are refused without `--fsep-allow-unproven`.
    for row in REFUSALS:
        if row.unproven:
            parser.add_argument(row.flag, dest=row.argument, default=row.accepted[0])
    return parser.parse_known_args(words)[0]


def _size(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no integer in 1..999999999")
    return number


def _check_stock(args: Namespace) -> None:
    ranks, experts = args.expert_model_parallel_size, args.num_experts
    if ranks > 1 and (experts is None or experts % ranks):
        raise ValueError(
            f"--num-experts {experts} on --expert-model-parallel-size {ranks}: without FSEP the "
            "experts must divide evenly; give a divisor of their number"
        )


def _check_division(args: Namespace) -> None:
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
    # Any form, such as tokenizer.json, tokenizer.model or vocab.json.
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
    """Print the script's variables; return 2 after one line for a job that cannot run."""
    nodes, gpus, *user = words
    try:
        found = job_settings(user, int(nodes) * int(gpus), os.environ)
    except (ValueError, OSError) as error:
        text = str(error)
        by = [f"{name} sets {flag}" for flag, name in _SET_BY.items() if flag in text]
        text = f"pretrain.sbatch: {text}{f' ({", ".join(by)})' if by else ''}"
        print(one_line(text, longest=len(text)), file=sys.stderr)
        return 2
    for name, value in found.items():
        quoted_value = shlex.join([value] if isinstance(value, str) else value)
        print(f"{name}={quoted_value if isinstance(value, str) else f'({quoted_value})'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
