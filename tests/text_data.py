"""Megatron dataset that tests train on, written without the package's tools."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

# Megatron's NullTokenizer ends a document by its last id.
END = 256
TOKENIZER_FLAGS = ("--tokenizer-type", "NullTokenizer", "--vocab-size", str(END + 1))


def write_text_data(prefix: str) -> None:
    """Write 150 sources of the standard library as bytes, one document each."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for text in [text for source in sources if (text := source.read_bytes())][:150]:
        ids = np.append(np.frombuffer(text, dtype=np.uint8).astype(np.uint16), END)
        builder.data_file.write(ids.astype(np.uint16).tobytes())
        builder.sequence_lengths.append(len(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
