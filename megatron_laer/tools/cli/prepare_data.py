"""`prepare-data` makes a dataset that Megatron reads, and prints how to train on it."""

from __future__ import annotations

import argparse

from megatron_laer.files.checks import one_line, shell_words
from megatron_laer.tools.cli.argument_types import (
    add_force,
    option,
)
from megatron_laer.tools.cli.outputs import refuse_replacing
from megatron_laer.tools.cli.program import describe
from megatron_laer.tools.data.dataset import is_dataset, prepare_data, targets_of
from megatron_laer.tools.data.text_files import default_text_sources

_EXAMPLES = """\
examples:
  %(prog)s --python-sources --output data/text
  %(prog)s --input a.txt b.txt --tokenizer Qwen/Qwen3-30B-A3B --output data/text
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Makes a dataset that Megatron reads from files of text, and prints the flags to train on "
        "it.",
        _EXAMPLES,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    option(source, "--input FILE", "files of text, each a document", nargs="+")
    text = "use the source of Python's standard library, for a first try without any data"
    source.add_argument("--python-sources", action="store_true", help=text)
    option(parser, "--output PREFIX", "write PREFIX.bin and PREFIX.idx", required=True)
    text = "bytes (257 ids, no vocabulary) or a Hugging Face tokenizer by name; default:"
    option(parser, "--tokenizer bytes|NAME", f"{text} %(default)s", default="bytes")
    add_force(parser, "files that are no dataset of Megatron's")


def run(args: argparse.Namespace) -> int:
    inputs = default_text_sources() if args.python_sources else args.input
    for target in targets_of(args.output):
        refuse_replacing(
            target, "--output", force=args.force, may_replace=lambda _: is_dataset(args.output)
        )
    written = prepare_data(inputs, args.output, args.tokenizer)
    print(f"{one_line(written.prefix)}: {written.documents} documents, {written.tokens} tokens")
    print(f"train with: {shell_words(written.flags)}")
    return 0
