"""`prepare-data`: text files in, a dataset that Megatron reads out.

Writes through Megatron's own `IndexedDatasetBuilder`; there is no file format of ours, and no
shuffling or splitting, which Megatron does when it reads.

The tokenizer `bytes` needs no vocabulary: ids 0 to 255 are the bytes of the file, 256 ends a
document. Train on it with `--tokenizer-type NullTokenizer --vocab-size 257`
(`BYTES_TOKENIZER_FLAGS`): Megatron's NullTokenizer takes its last id, vocabulary size - 1, as the
end of a document.
"""

import argparse
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

BYTES_TOKENIZER_FLAGS: tuple[str, ...] = (
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "257",
)
"""Megatron's flags for a dataset written with the tokenizer `bytes`."""

_END_OF_DOCUMENT = 256
_CACHE = "cache"


@dataclass(frozen=True)
class PreparedData:
    """What `prepare_data` wrote. `flags` are Megatron's, for training on it."""

    prefix: Path
    documents: int
    tokens: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class _Tokenizer:
    encode: Callable[[Path], np.ndarray]
    vocab_size: int
    flags: tuple[str, ...]


def prepare_data(
    inputs: Iterable[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: str = "bytes",
    progress: bool = True,
) -> PreparedData:
    """Write `output_prefix`.bin and .idx with one document per input file.

    `inputs` are files, and directories, which are walked in sorted order, without hidden and empty
    files. `tokenizer` is `bytes` or a directory that holds a Hugging Face tokenizer; its
    end-of-sequence token ends a document. A dataset that is there already is replaced only when the
    new one is complete, and with it what Megatron has cached beside it; a folder given to Megatron
    as --data-cache-path is the user's to clear.
    """
    files = list(_files(inputs))
    prefix = _checked_prefix(output_prefix, files)
    tokens_of = _tokenizer(tokenizer)

    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokens = 0
    with _replaced_when_complete(prefix) as (bin_path, idx_path):
        dtype = DType.optimal_dtype(tokens_of.vocab_size)
        builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype)
        try:
            for path in tqdm(files, desc="tokenizing", unit="file", disable=not progress):
                document = tokens_of.encode(path)
                builder.add_document(document, [len(document)])
                tokens += len(document)
            builder.finalize(str(idx_path))
        finally:
            builder.data_file.close()
    flags = ("--data-path", str(prefix), *tokens_of.flags)
    return PreparedData(prefix, len(files), tokens, flags)


def default_text_sources() -> list[Path]:
    """The Python standard library's source files, sorted: some megabytes of text on every machine.

    Tests, installed packages and empty files are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [
        path
        for path in _walk(root, skipped)
        if path.suffix == ".py" and path.stat().st_size and os.access(path, os.R_OK)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `prepare-data` to `parser`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="text files, and directories of text files"
    )
    source.add_argument(
        "--python-sources",
        action="store_true",
        help="use the source of Python's standard library, for a first try without any data",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|DIR",
        help="bytes (257 ids, no vocabulary) or a directory with a Hugging Face tokenizer; "
        "default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Run `prepare-data` and print what was written and how to train on it."""
    inputs = default_text_sources() if args.python_sources else args.input
    written = prepare_data(inputs, args.output, args.tokenizer)
    print(f"{written.prefix}: {written.documents} documents, {written.tokens} tokens")
    print(f"train with: {' '.join(written.flags)}")
    return 0


def _files(inputs: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    paths = [Path(path) for path in inputs]
    if not paths:
        raise ValueError("inputs is empty: name at least one text file or directory")
    for path in paths:
        if path.is_dir():
            # A folder of sources holds empty files by custom; named singly, one is a mistake.
            found = [file for file in _walk(path, ()) if file.stat().st_size]
            if not found:
                raise ValueError(f"{str(path)!r} holds no text: no file in it has any content")
            yield from found
        elif not path.exists():
            raise ValueError(f"{str(path)!r} does not exist; name a text file or a directory")
        elif path.stat().st_size == 0:
            raise ValueError(f"{str(path)!r} is empty; leave it out, or give a file with text")
        else:
            yield path


def _walk(root: Path, skipped: Iterable[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(n for n in folders if n not in skipped and not n.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _checked_prefix(output_prefix: str | os.PathLike[str], files: Sequence[Path]) -> Path:
    prefix = Path(output_prefix)
    # Megatron keeps its indices of a dataset in a directory called like the prefix.
    is_cache = prefix.is_dir() and {path.name for path in prefix.iterdir()} == {_CACHE}
    if (prefix.is_dir() and not is_cache) or prefix.suffix in (".bin", ".idx"):
        raise ValueError(
            f"output prefix {str(output_prefix)!r} must be a path without .bin or .idx that is no "
            "directory, such as 'data/train'; both endings are added"
        )
    targets = {_with_ending(prefix, ending).resolve() for ending in ("bin", "idx")}
    for path in files:
        if path.resolve() in targets:
            raise ValueError(
                f"{str(path)!r} is both input and output; write the dataset outside its inputs"
            )
    return prefix


def _with_ending(prefix: Path, ending: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{ending}")


@contextmanager
def _replaced_when_complete(prefix: Path) -> Iterator[tuple[Path, Path]]:
    """Temporary .bin and .idx paths, moved over `prefix`'s on success and removed otherwise."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic within one file system only.
    written = prefix.with_name(f".{prefix.name}.{os.getpid()}.tmp")
    new_bin, new_idx = _with_ending(written, "bin"), _with_ending(written, "idx")
    bin_path, idx_path = _with_ending(prefix, "bin"), _with_ending(prefix, "idx")
    try:
        yield new_bin, new_idx
        # Megatron opens a dataset by its index. Without one it says that the dataset is missing,
        # whereas an index beside the wrong data would be read as if it were right: so the old index
        # goes first, and the new one comes last.
        idx_path.unlink(missing_ok=True)
        # Megatron's own indices are found by the prefix, and would be taken for the new data's.
        shutil.rmtree(prefix / _CACHE, ignore_errors=True)
        os.replace(new_bin, bin_path)
        os.replace(new_idx, idx_path)
    finally:
        new_bin.unlink(missing_ok=True)
        new_idx.unlink(missing_ok=True)


def _tokenizer(name: str) -> _Tokenizer:
    if name == "bytes":
        return _Tokenizer(_bytes_and_end, _END_OF_DOCUMENT + 1, BYTES_TOKENIZER_FLAGS)
    if not Path(name).is_dir():
        raise ValueError(
            f"tokenizer {name!r} is neither 'bytes' nor a directory with a Hugging Face tokenizer"
        )
    return _hugging_face(name)


def _bytes_and_end(path: Path) -> np.ndarray:
    ids = np.frombuffer(_read(path), dtype=np.uint8).astype(np.uint16)
    return np.append(ids, np.uint16(_END_OF_DOCUMENT))


def _hugging_face(folder: str) -> _Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"the tokenizer in {folder!r} needs the package transformers: "
            "`pip install transformers`, or use --tokenizer bytes, which needs none"
        ) from error

    # A directory was given, so nothing may be downloaded.
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder!r} has no end-of-sequence token to end documents with; "
            "set eos_token in its tokenizer_config.json"
        )

    def encode(path: Path) -> np.ndarray:
        try:
            text = _read(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{str(path)!r} is not UTF-8 text ({error}); leave it out, or use --tokenizer bytes"
            ) from error
        ids = tokenizer.encode(text, add_special_tokens=False)
        return np.array([*ids, tokenizer.eos_token_id])

    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder)
    return _Tokenizer(encode, len(tokenizer), flags)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
