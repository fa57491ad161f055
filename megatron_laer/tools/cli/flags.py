"""`flags` prints Megatron's flags for a model configuration, ready for a shell."""

from __future__ import annotations

import argparse
import re
import shlex

from megatron_laer.device import CPU_FLAGS
from megatron_laer.tools.model_flags import model_flags

# Words that get no quotes, which `$(...)` would make a part of them. Brackets and stars are for
# Megatron's lists, such as [0]*3+[1]*58; no file has such a name.
_PLAIN = re.compile(r"[\w@%+=:,./\[\]*-]+", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a YAML file, or a name in configs/models")
    parser.add_argument(
        "--cpu", action="store_true", help="add the flags that Megatron needs without a GPU"
    )


def run(args: argparse.Namespace) -> int:
    words = [*model_flags(args.file), *(CPU_FLAGS if args.cpu else ())]
    print(" ".join(word if _PLAIN.fullmatch(word) else shlex.quote(word) for word in words))
    return 0
