"""`flags` prints Megatron's flags for a model configuration, ready for a shell."""

from __future__ import annotations

import argparse
import re
import shlex

from megatron_laer.device import CPU_FLAGS
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.model_flags import model_flags

# Words that get no quotes, which `$(...)` would make a part of them. Brackets and stars are for
# Megatron's lists, such as [0]*3+[1]*58; no file has such a name.
_PLAIN = re.compile(r"[\w@%+=:,./\[\]*-]+", re.ASCII)


_EXAMPLES = """\
examples:
  %(prog)s mixtral-8x7b-e8k2
  %(prog)s my-model.yaml --cpu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser, "Prints Megatron's flags for a model configuration, ready for a shell.", _EXAMPLES
    )
    parser.add_argument("file", metavar="FILE", help="a YAML file, or a name in configs/models")
    parser.add_argument(
        "--cpu", action="store_true", help="add the flags that Megatron needs without a GPU"
    )


def run(args: argparse.Namespace) -> int:
    words = [*model_flags(args.file), *(CPU_FLAGS if args.cpu else ())]
    print(" ".join(word if _PLAIN.fullmatch(word) else shlex.quote(word) for word in words))
    return 0
