"""A dataset's two files in Megatron's format are written in pieces, and put in place when complete.

PREFIX.bin holds the ids of all documents. PREFIX.idx holds a header, and then for each document its
length in tokens, where it begins in PREFIX.bin, and the number of its first sequence: one sequence
is one document, since Megatron's GPTDataset shuffles sequences.

Megatron's `IndexedDatasetBuilder` writes the same bytes (tests/unit/test_data.py compares them),
but takes documents as a whole, keeps some 128 bytes of memory for each of them, and comes with an
import of torch and Megatron, of 4 s and 950 MiB.
"""

import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_laer.files.checks import (
    quoted,
    refuse_overwriting,
    refuse_unusable_folder,
    refuse_unwritable,
)
from megatron_laer.files.writing import InUseError, Replacement, locked, sync_folder
from megatron_laer.tools.data.tokenizers import MAX_DOCUMENT_TOKENS, Ids

_CACHE = "cache"

# As in Megatron's megatron/core/datasets/indexed_dataset.py: a mark, the version, the code of the
# ids' type, the numbers of sequences and of document boundaries.
_HEADER = struct.Struct("<9sQBQQ")
_MARK = b"MMIDIDX\0\0"
_VERSION = 1
_LENGTH = struct.Struct("<i")
_DOCUMENTS_AT_ONCE = 2**12


def check_prefix(
    output_prefix: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    files: Sequence[Path],
) -> Path:
    """Return the prefix as a path, if a dataset can be written there; make nothing.

    Args:
        output_prefix: what the user passed.
        inputs: what the user passed, files and directories.
        files: all that is read of them.

    Raises:
        ValueError: it is no prefix, cannot be written, or lies in an input.
    """
    prefix = Path(output_prefix)
    # Megatron keeps its indices of a dataset in a directory called like the prefix.
    is_cache = prefix.is_dir() and {path.name for path in prefix.iterdir()} == {_CACHE}
    if (prefix.is_dir() and not is_cache) or prefix.suffix in (".bin", ".idx"):
        raise ValueError(
            f"output prefix {quoted(output_prefix)} must be a path without .bin or .idx that is no "
            "directory, such as 'data/train'; both endings are added"
        )
    refuse_unusable_folder(prefix.parent, "--output")
    for target in _targets(prefix):
        if prefix.parent.is_dir():
            refuse_unwritable(target, "--output")
        refuse_overwriting(target, inputs, "--output")
        if target.exists():
            # One that a link has led to.
            refuse_overwriting(target, files, "--output")
    return prefix


@contextmanager
def new_dataset(prefix: Path, vocab_size: int) -> Iterator["DatasetWriter"]:
    """Yield a writer, and put what it wrote in the place of `prefix`'s dataset if all went well.

    Raises:
        InUseError: another run is writing it.
        OSError: writing failed.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    bin_path, idx_path = _targets(prefix)
    with ExitStack() as stack:
        try:
            # For the two together: two runs might otherwise each put one of them in place.
            stack.enter_context(locked(prefix.with_name(f".{prefix.name}.lock")))
        except InUseError as error:
            raise InUseError(
                f"--output {quoted(prefix)} is being written by another run; wait until that has "
                "ended, or give another prefix"
            ) from error
        new_bin = _replacement(bin_path, stack)
        new_idx = _replacement(idx_path, stack)
        try:
            with new_bin.path.open("wb") as bin_file, new_idx.path.open("w+b") as idx_file:
                dataset = DatasetWriter(bin_file, idx_file, vocab_size)
                yield dataset
                dataset.finish()
            _put_in_place(new_bin, new_idx, prefix)
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(prefix)) from error


class DatasetWriter:
    """Adds documents in pieces to a dataset of Megatron's.

    Attributes:
        documents: how many were added.
        tokens: how many were added.
    """

    def __init__(self, bin_file: BinaryIO, idx_file: BinaryIO, vocab_size: int) -> None:
        """Begin two files: `bin_file` to write, `idx_file` to write and to read again."""
        self._bin = bin_file
        self._idx = idx_file
        # The types that Megatron chooses, and their codes.
        self._dtype, self._code = ("<u2", 8) if vocab_size < 65500 else ("<i4", 4)
        self.documents = 0
        self.tokens = 0
        idx_file.seek(_HEADER.size)

    def add(self, pieces: Iterable[Ids]) -> None:
        """Add one document.

        Raises:
            ValueError: it, or an id in it, is too large for Megatron's format.
        """
        length = 0
        for ids in pieces:
            if ids.max() > np.iinfo(self._dtype).max:
                raise ValueError(
                    f"the tokenizer gave the id {ids.max()}, which is beyond its own size; mend "
                    "its vocabulary"
                )
            self._bin.write(ids.astype(self._dtype).tobytes())
            length += len(ids)
            if length > MAX_DOCUMENT_TOKENS:
                raise ValueError(
                    f"a document has more than {MAX_DOCUMENT_TOKENS:,} tokens, which Megatron's "
                    "index cannot express; split it"
                )
        self._idx.write(_LENGTH.pack(length))
        self.documents += 1
        self.tokens += length

    def finish(self) -> None:
        """Complete the index: so far it has lengths only."""
        total = self.documents
        begin = 0
        for first in range(0, total, _DOCUMENTS_AT_ONCE):
            self._idx.seek(_HEADER.size + first * _LENGTH.size)
            count = min(_DOCUMENTS_AT_ONCE, total - first)
            lengths = np.frombuffer(self._idx.read(count * _LENGTH.size), dtype="<i4")
            ends = begin + np.cumsum(lengths, dtype="<i8") * np.dtype(self._dtype).itemsize
            begins = np.concatenate(([begin], ends[:-1])).astype("<i8")
            self._idx.seek(_HEADER.size + total * _LENGTH.size + first * begins.itemsize)
            self._idx.write(begins.tobytes())
            begin = int(ends[-1])
        for first in range(0, total + 1, _DOCUMENTS_AT_ONCE):
            boundaries = np.arange(first, min(first + _DOCUMENTS_AT_ONCE, total + 1), dtype="<i8")
            self._idx.write(boundaries.tobytes())
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(_MARK, _VERSION, self._code, total, total + 1))


def _targets(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def _replacement(target: Path, stack: ExitStack) -> Replacement:
    replacement = Replacement(target)
    stack.callback(replacement.discard)
    return replacement


def _put_in_place(new_bin: Replacement, new_idx: Replacement, prefix: Path) -> None:
    # Before the old dataset goes, since this may take long, or fail.
    for new in (new_bin, new_idx):
        os.fsync(new.file.fileno())
    # Megatron opens a dataset by its index. Without one it says that the dataset is missing,
    # whereas an index beside the wrong data would be read as if it were right: so the old index
    # goes first, and the new one comes last.
    _, idx_path = _targets(prefix)
    idx_path.unlink(missing_ok=True)
    # Megatron's own indices are found by the prefix, and would be taken for the new data's.
    shutil.rmtree(prefix / _CACHE, ignore_errors=True)
    sync_folder(prefix.parent)
    new_bin.commit()
    new_idx.commit()
