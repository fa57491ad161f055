"""`prepare_data` writes a dataset of Megatron's format, with Megatron's own builder.

PREFIX.bin holds the ids of all documents, PREFIX.idx their lengths and places. One sequence is one
document, since Megatron's GPTDataset shuffles sequences. Megatron is imported after the input has
been checked. A dataset is put in place only when complete.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_laer.files.checks import (
    open_input,
    quoted,
    refuse_overwriting,
    refuse_unusable_folder,
    refuse_unwritable,
)
from megatron_laer.files.writing import InUseError, Replacement, sync_folder
from megatron_laer.tools.data.text_files import check_files
from megatron_laer.tools.data.tokenizers import (
    MAX_DOCUMENT_TOKENS,
    Ids,
    check_length,
    load_tokenizer,
)

_CACHE = "cache"


# First bytes of Megatron's index of a dataset.
_HEADER = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class PreparedData:
    """Result of `prepare_data`.

    `tokens` include the ends of documents. `flags` are Megatron's for training on the dataset.
    """

    prefix: Path
    documents: int
    tokens: int
    flags: tuple[str, ...]


def prepare_data(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: str = "bytes",
    progress: bool = True,
) -> PreparedData:
    """Write `output_prefix`.bin and .idx, with one document per file of text.

    `tokenizer` is `bytes` or the name of a Hugging Face tokenizer, as for Megatron's
    `--tokenizer-model`, whose end-of-sequence token ends a document.

    An existing dataset is replaced only when the new one is complete, together with Megatron's
    cache next to it. A folder given to Megatron as --data-cache-path is not cleared. The call
    leaves no temporary file, and removes the leftovers of a killed process.

    Raises ValueError for unusable input or output, or if another run is writing this dataset.
    """
    files = check_files(inputs)
    prefix = _checked_prefix(output_prefix, files)
    encoder = load_tokenizer(tokenizer)
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes, strict=True):
        check_length(path, size, encoder.max_file_bytes)

    bar = tqdm(
        total=sum(sizes),
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        # None shows the bar where stderr is a terminal.
        disable=None if progress else True,
    )
    with bar, _new_dataset(prefix, encoder.vocab_size) as dataset:
        for path in files:
            with open_input(path) as file:
                before = 0
                for ids in encoder.encode_file(file, path):
                    dataset.add(ids)
                    bar.update(file.tell() - before)
                    before = file.tell()
            dataset.end_document()
    flags = ("--data-path", str(prefix), *encoder.flags)
    return PreparedData(prefix, dataset.documents, dataset.tokens, flags)


def _checked_prefix(output_prefix: str | os.PathLike[str], files: Sequence[Path]) -> Path:
    prefix = Path(output_prefix)
    # Megatron keeps its indices of a dataset in a directory with the prefix's name.
    is_cache = prefix.is_dir() and {path.name for path in prefix.iterdir()} == {_CACHE}
    if (prefix.is_dir() and not is_cache) or prefix.suffix in (".bin", ".idx"):
        raise ValueError(
            f"output prefix {quoted(output_prefix)} must be a path without .bin or .idx that is no "
            "directory, such as 'data/train'; both endings are added"
        )
    refuse_unusable_folder(prefix.parent, "--output")
    for target in targets_of(prefix):
        if prefix.parent.is_dir():
            refuse_unwritable(target, "--output")
        refuse_overwriting(target, files, "--output")
    return prefix


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings, including logged ones, in the block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


class _Dataset:
    def __init__(self, bin_path: Path, vocab_size: int) -> None:
        with _quiet():
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        self._dtype = DType.optimal_dtype(vocab_size)
        self.builder: Any = IndexedDatasetBuilder(str(bin_path), dtype=self._dtype)
        self.documents = 0
        self.tokens = 0
        self._length = 0

    def add(self, ids: Ids) -> None:
        if ids.max() > np.iinfo(self._dtype).max:
            raise ValueError(
                f"the tokenizer gave the id {ids.max()}, which is beyond its own size; correct its "
                "vocabulary"
            )
        self.builder.data_file.write(ids.astype(self._dtype).tobytes())
        self._length += len(ids)
        if self._length > MAX_DOCUMENT_TOKENS:
            raise ValueError(
                f"a document has more than {MAX_DOCUMENT_TOKENS:,} tokens, which Megatron's index "
                "cannot express; split it"
            )

    def end_document(self) -> None:
        self.builder.sequence_lengths.append(self._length)
        self.builder.end_document()
        self.documents += 1
        self.tokens += self._length
        self._length = 0


@contextmanager
def _new_dataset(prefix: Path, vocab_size: int) -> Iterator[_Dataset]:
    """Yield a dataset that replaces the one at `prefix` if the block succeeds."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    replacements: list[Replacement] = []
    with ExitStack() as stack:
        try:
            for target in targets_of(prefix):
                replacements.append(Replacement(target))
                stack.callback(replacements[-1].discard)
        except InUseError as error:
            raise InUseError(
                f"--output {quoted(prefix)} is being written by another run; wait until that has "
                "ended, or give another prefix"
            ) from error
        new_bin, new_idx = replacements
        try:
            dataset = _Dataset(new_bin.path, vocab_size)
            stack.callback(dataset.builder.data_file.close)
            yield dataset
            dataset.builder.finalize(str(new_idx.path))
            _put_in_place(new_bin, new_idx, prefix)
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(prefix)) from error


def targets_of(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    return Path(f"{Path(prefix)}.bin"), Path(f"{Path(prefix)}.idx")


def is_dataset(prefix: str | os.PathLike[str]) -> bool:
    """Return True if a dataset of Megatron is at a prefix, by the header of its index."""
    with open_input(targets_of(prefix)[1]) as file:
        return file.read(len(_HEADER)) == _HEADER


def _put_in_place(new_bin: Replacement, new_idx: Replacement, prefix: Path) -> None:
    # Sync before the old dataset is removed, since this may take long or fail.
    for new in (new_bin, new_idx):
        os.fsync(new.file.fileno())
    # Megatron opens a dataset by its index. A missing index is reported, whereas an index of other
    # data is read without an error. So the old index is removed first and the new one comes last.
    _, idx_path = targets_of(prefix)
    idx_path.unlink(missing_ok=True)
    # Megatron finds its own indices by the prefix, and they do not fit the new data.
    shutil.rmtree(prefix / _CACHE, ignore_errors=True)
    sync_folder(prefix.parent)
    new_bin.commit()
    new_idx.commit()
