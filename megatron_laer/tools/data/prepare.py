"""`prepare_data` checks all that can be checked, then writes document after document."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from megatron_laer.files.checks import open_input, quoted
from megatron_laer.tools.data.documents import DEFAULT_JSON_KEY, FORMATS, documents, format_of
from megatron_laer.tools.data.sources import as_list, find_sources
from megatron_laer.tools.data.tokenizers import (
    Ids,
    Tokenizer,
    check_length,
    load_tokenizer,
    readable,
)
from megatron_laer.tools.data.writing import check_prefix, new_dataset


@dataclass(frozen=True)
class PreparedData:
    """Tells what `prepare_data` wrote.

    Attributes:
        prefix: of the dataset's two files.
        documents: how many.
        tokens: how many, the documents' ends among them.
        flags: Megatron's, for training on the dataset.
        left_out: a sentence for each kind of thing that the input has and the dataset has not.
    """

    prefix: Path
    documents: int
    tokens: int
    flags: tuple[str, ...]
    left_out: tuple[str, ...]


def prepare_data(
    inputs: Iterable[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: str = "bytes",
    progress: bool = True,
    *,
    text_format: str | None = None,
    json_key: str | None = None,
    follow_links: bool = False,
) -> PreparedData:
    """Write `output_prefix`.bin and .idx, with one document per file of text or line of JSONL.

    A dataset that is there already is replaced only when the new one is complete, and with it what
    Megatron has cached beside it; a folder given to Megatron as --data-cache-path is the user's to
    clear. However the call ends, it leaves no temporary file; what a killed process has left for
    this prefix, the next call removes.

    Args:
        inputs: files, and directories, which are walked in sorted order, without hidden and empty
            files.
        output_prefix: outside the inputs; missing directories are made.
        tokenizer: `bytes`, or a directory that holds a Hugging Face tokenizer; its end-of-sequence
            token ends a document.
        progress: whether to draw a bar on stderr, if that is a terminal.
        text_format: `text`, `jsonl`, or None for what each file's ending tells.
        json_key: of the text in a line of JSONL; None is `text`.
        follow_links: whether to read what symbolic links inside directories lead to.

    Raises:
        ValueError: the input cannot be used, or the output not be written; the message quotes what
            was passed and says what would work.
        writing.InUseError: another run is writing a dataset with this prefix.
        ImportError: the tokenizer needs a package that is missing.
        OSError: writing failed, such as on a full disk.
    """
    inputs = as_list(inputs)
    sources = find_sources(inputs, follow_links)
    prefix = check_prefix(output_prefix, inputs, sources.files)
    formats = _formats(sources.files, text_format, json_key)
    encoder = load_tokenizer(tokenizer)
    _check_lengths(sources.files, formats, encoder)

    key = DEFAULT_JSON_KEY if json_key is None else json_key
    empty = 0
    with (
        new_dataset(prefix, encoder.vocab_size) as dataset,
        _bar(sources.files, progress) as bar,
    ):
        for path, file_format in zip(sources.files, formats, strict=True):
            with _opened(path) as file:
                for document in documents(file, path, file_format, key, encoder):
                    if document is None:
                        empty += 1
                    else:
                        dataset.add(_followed(document, file, bar))
        if not dataset.documents:
            raise ValueError(
                "no input holds any text: the lines of JSONL are blank, or their texts are empty"
            )
    left_out = [*sources.left_out()]
    if empty:
        left_out.append(f"left out documents without text: {empty}")
    return PreparedData(
        prefix,
        dataset.documents,
        dataset.tokens,
        ("--data-path", str(prefix), *encoder.flags),
        tuple(left_out),
    )


def _formats(files: Sequence[Path], text_format: str | None, json_key: str | None) -> list[str]:
    if text_format not in (None, *FORMATS):
        raise ValueError(f"format {quoted(text_format)} is unknown; known are {', '.join(FORMATS)}")
    formats = [text_format or format_of(path) for path in files]
    if json_key is not None and "jsonl" not in formats:
        raise ValueError(
            f"--json-key {quoted(json_key)} has no effect, since no input has the ending of JSONL; "
            "add --format jsonl, or leave it out"
        )
    return formats


def _check_lengths(files: Sequence[Path], formats: Sequence[str], encoder: Tokenizer) -> None:
    for path, text_format in zip(files, formats, strict=True):
        if text_format == "text":
            check_length(path, _size(path), encoder.max_file_bytes)


def _size(path: Path) -> int:
    with readable(path):
        return path.stat().st_size


def _bar(files: Iterable[Path], progress: bool) -> tqdm:
    return tqdm(
        total=sum(map(_size, files)),
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        # None: where stderr is a terminal.
        disable=None if progress else True,
    )


def _opened(path: Path) -> BinaryIO:
    with readable(path):
        return open_input(path)


def _followed(pieces: Iterable[Ids], file: BinaryIO, bar: tqdm) -> Iterator[Ids]:
    """Yield the pieces, and move the bar by as much of the file as each of them took."""
    before = file.tell()
    for piece in pieces:
        yield piece
        bar.update(file.tell() - before)
        before = file.tell()
