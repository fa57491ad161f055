"""`prepare-data` makes a dataset that Megatron reads, and prints how to train on it."""

from __future__ import annotations

import argparse
import sys

from megatron_laer.files.checks import one_line, shell_words
from megatron_laer.tools.cli.argument_types import option
from megatron_laer.tools.data.dataset import prepare_data
from megatron_laer.tools.data.documents import FORMATS
from megatron_laer.tools.data.text_files import default_text_sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    option(source, "--input PATH", "files of text or JSONL, and folders of them", nargs="+")
    text = "use the source of Python's standard library, for a first try without any data"
    source.add_argument("--python-sources", action="store_true", help=text)
    option(parser, "--output PREFIX", "write PREFIX.bin and PREFIX.idx", required=True)
    text = "bytes (257 ids, no vocabulary) or a directory with a Hugging Face tokenizer; default:"
    option(parser, "--tokenizer bytes|DIR", f"{text} %(default)s", default="bytes")
    text = (
        "text: each file is a document; jsonl: each line is a JSON object with a document; "
        "default: jsonl for files that end in .jsonl, .ndjson or .json, text for others"
    )
    option(parser, "--format", text, choices=FORMATS)
    option(parser, "--json-key KEY", "of the text in a line of JSONL; default: text")
    text = "read what symbolic links inside folders lead to; default: they are left out"
    parser.add_argument("--follow-links", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    if args.python_sources and args.follow_links:
        raise ValueError("--follow-links is for the folders of --input; leave it out")
    written = prepare_data(
        default_text_sources() if args.python_sources else args.input,
        args.output,
        args.tokenizer,
        text_format=args.format,
        json_key=args.json_key,
        follow_links=args.follow_links,
    )
    print(f"{one_line(written.prefix)}: {written.documents} documents, {written.tokens} tokens")
    print(f"train with: {shell_words(written.flags)}")
    for sentence in written.left_out:
        print(sentence, file=sys.stderr)
    return 0
