"""`prepare_data` writes a complete dataset or keeps the old one; refusals."""

import argparse
import io
import os
import resource
import sys
import tracemalloc

import numpy as np
import pytest

from megatron_laer.tools import cli, data
from megatron_laer.tools.data import dataset, tokenizers
from tests.tools.datasets import install_fake_transformers, prepare_data, read_documents


def read_texts(prefix):
    """Return the documents without their ends."""
    return [bytes(document[:-1].tolist()) for document in read_documents(prefix)]


def test_the_dataset_gives_back_every_byte_and_ends_every_document(texts, tmp_path):
    written = prepare_data(texts, tmp_path / "out" / "train")
    assert read_texts(written.prefix) == [b"first in order", bytes(range(256))]
    assert {document[-1] for document in read_documents(written.prefix)} == {256}
    assert (written.documents, written.tokens) == (2, 14 + 256 + 2)


def test_the_flags_make_megatron_see_the_same_end_of_document(texts, tmp_path):
    from megatron.core.tokenizers import MegatronTokenizer

    flags = prepare_data(texts, tmp_path / "train").flags
    vocab_size = int(flags[flags.index("--vocab-size") + 1])
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=vocab_size
    )
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_an_unreadable_file_is_refused_by_name_and_leaves_nothing(texts, tmp_path, monkeypatch):
    # Permissions do not stop root, so opening itself is made to fail.
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(dataset, "open_input", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*a\.txt'"):
        prepare_data(texts, tmp_path / "out" / "train")
    assert not list((tmp_path / "out").iterdir())


def test_no_dataset_is_written_over_its_input(texts, tmp_path):
    prepare_data(texts, tmp_path / "train")
    with pytest.raises(ValueError, match="would write over the input"):
        prepare_data([tmp_path / "train.bin"], tmp_path / "train")
    (tmp_path / "link").symlink_to(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin' would write over the input .*link'"):
        prepare_data([tmp_path / "link"], tmp_path / "train")


def test_a_dataset_is_replaced_with_megatrons_indices_of_it(texts, tmp_path):
    prepare_data(texts, tmp_path / "train")
    cache = tmp_path / "train" / "cache"
    (cache / "GPTDataset_indices").mkdir(parents=True)
    (cache / "GPTDataset_indices" / "train-document_index.npy").write_text("of the old dataset")
    texts[1].write_text("new")
    prepare_data(texts, tmp_path / "train")
    assert read_texts(tmp_path / "train")[1] == b"new"
    assert not cache.exists()
    assert {path.name for path in tmp_path.glob("*train.*")} == {"train.bin", "train.idx"}
    # A directory of the user's is no prefix, though it has such a cache.
    cache.mkdir(parents=True)
    (tmp_path / "train" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="train' must be a path"):
        prepare_data(texts, tmp_path / "train")


def test_a_full_disk_names_the_output_and_keeps_the_old_dataset(texts, tmp_path):
    prepare_data(texts, tmp_path / "train")
    before = content(tmp_path)
    texts[0].write_bytes(bytes(2**16))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*train'"):
            prepare_data(texts, tmp_path / "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == before


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("moves_before", [0, 1])
def test_an_interrupt_while_replacing_leaves_no_index(moves_before, texts, tmp_path, monkeypatch):
    prepare_data(texts, tmp_path / "train")
    real, moves = os.replace, []

    def replace(source, target):
        if len(moves) == moves_before:
            raise KeyboardInterrupt
        moves.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(texts, tmp_path / "train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "train.bin"]


def test_the_default_sources_are_text_in_a_fixed_order():
    sources = data.default_text_sources()
    assert sources == data.default_text_sources()
    assert any(path.name == "argparse.py" for path in sources)
    assert not {"site-packages", "test", "tests"} & {part for p in sources for part in p.parts}


def test_the_command_prints_the_flags_for_training_ready_for_a_shell(texts, tmp_path, capfd):
    prefix = tmp_path / "a b;id"
    words = ["prepare-data", "--input", *map(str, texts), "--output", str(prefix)]
    assert cli.main(words) == 0
    printed = capfd.readouterr()
    flags = "--tokenizer-type NullTokenizer --vocab-size 257"
    assert f"train with: --data-path '{prefix}' {flags}\n" in printed.out
    # A log gets no progress bar.
    assert printed.err == ""


def test_a_terminal_gets_a_bar_unless_none_is_wanted(texts, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    data.prepare_data(texts, tmp_path / "train")
    assert "tokenizing: 100%" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    data.prepare_data(texts, tmp_path / "train", progress=False)
    assert sys.stderr.getvalue() == ""


@pytest.mark.releases
@pytest.mark.parametrize("vocab_size", [257, 65500])
def test_documents_in_pieces_give_the_bytes_of_whole_ones(vocab_size, tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    generator = np.random.default_rng(1)
    documents = [generator.integers(vocab_size, size=length) for length in (9, 1, 300)]
    builder = IndexedDatasetBuilder(
        str(tmp_path / "whole.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    with dataset._new_dataset(tmp_path / "pieces", vocab_size) as pieces:
        for document in documents:
            builder.add_document(document, [len(document)])
            for first in range(0, len(document), 8):
                pieces.add(document[first : first + 8])
            pieces.end_document()
    builder.finalize(str(tmp_path / "whole.idx"))
    for ending in ("bin", "idx"):
        written = (tmp_path / f"pieces.{ending}").read_bytes()
        assert written == (tmp_path / f"whole.{ending}").read_bytes()


def test_a_file_that_is_read_in_pieces_is_whole_in_the_dataset(texts, tmp_path, monkeypatch):
    # One file's size is a multiple of it.
    monkeypatch.setattr(tokenizers, "_PIECE_BYTES", 8)
    expected = [b"first in order", bytes(range(256))]
    assert read_texts(prepare_data(texts, tmp_path / "train").prefix) == expected


def test_a_file_that_has_grown_too_long_meanwhile_is_refused(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_DOCUMENT_TOKENS", 256)
    with pytest.raises(ValueError, match="a document has more than 256 tokens"):
        prepare_data(texts, tmp_path / "train")
    assert not list(tmp_path.glob("*train*"))


def test_without_transformers_the_error_says_what_to_install(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        prepare_data(texts, tmp_path / "train", tokenizer="some/name")


def test_a_hugging_face_tokenizer_ends_documents_with_its_own_token(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    texts[1].write_text("two words")
    written = prepare_data(texts, tmp_path / "train", tokenizer="some/name")
    assert [d.tolist() for d in read_documents(written.prefix)] == [[5, 2, 5, 7], [3, 5, 7]]
    assert written.flags[2:] == (
        *("--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", "some/name"),
    )


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (None, "no end-of-sequence token"),
        (7, r"b\.txt' is not UTF-8 text"),
        (2**16, "gave the id 65536, which is beyond its own size"),
    ],
    ids=["no end token", "no text", "an id beyond the size"],
)
def test_a_tokenizer_refuses_what_it_cannot_write(end, message, texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=end)
    with pytest.raises(ValueError, match=message):
        prepare_data(texts, tmp_path / "train", tokenizer="some/name")


@pytest.mark.parametrize("tokenizer", ["bytes", "some/name"])
def test_a_file_too_long_for_one_document_is_refused(tokenizer, texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    monkeypatch.setattr(dataset, "_new_dataset", None)
    limit = {"bytes": 2**31 - 2, "some/name": 2**26}[tokenizer]
    with texts[1].open("wb") as file:
        file.truncate(limit + 1)
    with pytest.raises(ValueError, match=rf"b\.txt' has {limit + 1:,} bytes.* {limit:,}"):
        prepare_data(texts, tmp_path / "train", tokenizer=tokenizer)


def test_a_hugging_face_tokenizer_that_cannot_be_loaded_is_named(texts, tmp_path, monkeypatch):
    def refuse(name, **kwargs):
        raise Exception("data did not match any variant")

    fake = argparse.Namespace(AutoTokenizer=argparse.Namespace(from_pretrained=refuse))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(ValueError, match=r"some/name' cannot be loaded: data did not match"):
        prepare_data(texts, tmp_path / "train", tokenizer="some/name")


def test_memory_does_not_depend_on_the_size_of_the_input(tmp_path):
    path = tmp_path / "in.txt"

    def peak_bytes(size_bytes):
        with path.open("wb") as file:
            file.truncate(size_bytes)
        tracemalloc.start()
        try:
            assert prepare_data([path], tmp_path / "train").documents == 1
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(2**25) < peak_bytes(2**22) + 2**20
