"""Tokenizers that return the ids of a file, in pieces of limited size where they can.

The tokenizer `bytes` needs no vocabulary: ids 0 to 255 are the bytes of the file, 256 ends a
document. `BYTES_TOKENIZER_FLAGS` are its training flags: Megatron's NullTokenizer uses its last id,
vocabulary size - 1, as the end of a document.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_laer.files.checks import naming, quoted

Ids = npt.NDArray[np.integer]

BYTES_TOKENIZER_FLAGS: tuple[str, ...] = (
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "257",
)
"""Megatron's flags for a dataset written with the tokenizer `bytes`."""

MAX_DOCUMENT_TOKENS = 2**31 - 1
"""Megatron's index holds lengths in 32 bits."""

_MAX_TEXT_BYTES = 2**26
"""Longest file for a Hugging Face tokenizer, which takes some thirty times as much memory."""

_PIECE_BYTES = 2**20
_END_OF_DOCUMENT = 256


class ByteTokenizer:
    """Encoder of files as bytes, in pieces that end with the end-of-document id.

    `flags` are Megatron's for training on these ids. `max_file_bytes` is the longest file that can
    be encoded.
    """

    vocab_size = _END_OF_DOCUMENT + 1
    flags = BYTES_TOKENIZER_FLAGS
    max_file_bytes = MAX_DOCUMENT_TOKENS - 1

    def encode_file(self, file: BinaryIO, path: Path) -> Iterator[Ids]:
        """Yield the ids of an open file; `path` is for messages."""
        with naming(path):
            while piece := file.read(_PIECE_BYTES):
                yield np.frombuffer(piece, dtype=np.uint8)
        yield np.array([_END_OF_DOCUMENT])


class HuggingFaceTokenizer(ByteTokenizer):
    """Encoder of files with a Hugging Face tokenizer, each as one piece."""

    max_file_bytes = _MAX_TEXT_BYTES

    def __init__(self, name: str) -> None:
        self._tokenizer = _load_hugging_face(name)
        self.vocab_size = len(self._tokenizer)
        self.flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", name)

    def encode_file(self, file: BinaryIO, path: Path) -> Iterator[Ids]:
        with naming(path):
            content = file.read(_MAX_TEXT_BYTES + 1)
        check_length(path, len(content), _MAX_TEXT_BYTES)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{quoted(path)} is not UTF-8 text ({error.reason} at byte {error.start}); leave "
                "it out, or use --tokenizer bytes"
            ) from error
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        yield np.array([*ids, self._tokenizer.eos_token_id])


def load_tokenizer(name: str) -> ByteTokenizer:
    """Load the tokenizer `bytes`, or a Hugging Face one by name, without its code."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)


def _load_hugging_face(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"the tokenizer {quoted(name)} needs the package transformers: "
            "`pip install transformers`, or use --tokenizer bytes, which needs none"
        ) from error
    try:
        # Download nothing, and run no code that comes with a tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the package tokenizers raises Exception itself
        raise ValueError(
            f"the tokenizer {quoted(name)} cannot be loaded: {error}; give the name of one that is "
            "in Hugging Face's cache, a folder with one, or bytes"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {quoted(name)} has no end-of-sequence token to end documents "
            "with; set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def check_length(path: Path, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ValueError(
            f"{quoted(path)} has {size_bytes:,} bytes, but a document at most {max_bytes:,}; split "
            "the file"
        )
