"""Tokenizers that `prepare_data` accepts, the length of their texts, and their memory."""

import argparse
import sys
import tracemalloc

import pytest

from megatron_laer.tools.data import dataset
from tests.tools.datasets import install_fake_transformers, prepare_data, read_documents


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes(bytes(range(256)))
    (folder / "a.txt").write_text("first in order")
    return folder


def test_a_hugging_face_tokenizer_without_transformers_says_what_to_install(
    texts, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        prepare_data([texts], tmp_path / "train", tokenizer=str(texts))


def test_a_hugging_face_tokenizer_ends_documents_with_its_own_token(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    (texts / "b.txt").write_text("two words")
    written = prepare_data([texts], tmp_path / "train", tokenizer=str(texts))
    assert [d.tolist() for d in read_documents(written.prefix)] == [[5, 2, 5, 7], [3, 5, 7]]
    assert "HuggingFaceTokenizer" in written.flags


def test_a_hugging_face_tokenizer_without_an_end_token_is_refused(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=None)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        prepare_data([texts], tmp_path / "train", tokenizer=str(texts))


def test_a_hugging_face_tokenizer_refuses_what_is_no_text(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    with pytest.raises(ValueError, match=r"b\.txt' is not UTF-8 text"):
        prepare_data([texts], tmp_path / "train", tokenizer=str(texts))


@pytest.mark.parametrize("tokenizer", ["bytes", "Hugging Face"])
def test_a_file_too_long_for_one_document_is_refused_before_any_work(
    tokenizer, texts, tmp_path, monkeypatch
):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    monkeypatch.setattr(dataset, "_new_dataset", None)
    limit = {"bytes": 2**31 - 2, "Hugging Face": 2**26}[tokenizer]
    with (texts / "long.txt").open("wb") as file:
        file.truncate(limit + 1)
    with pytest.raises(ValueError, match=rf"long\.txt' has {limit + 1:,} bytes.* {limit:,}"):
        prepare_data(
            [texts], tmp_path / "train", tokenizer="bytes" if tokenizer == "bytes" else str(texts)
        )


def test_an_id_beyond_the_tokenizer_s_size_is_refused(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=2**16)
    (texts / "b.txt").unlink()
    with pytest.raises(ValueError, match="gave the id 65536, which is beyond its own size"):
        prepare_data([texts], tmp_path / "train", tokenizer=str(texts))


def test_a_hugging_face_tokenizer_that_cannot_be_loaded_is_named(texts, tmp_path, monkeypatch):
    def refuse(folder, **kwargs):
        raise Exception("data did not match any variant")

    fake = argparse.Namespace(AutoTokenizer=argparse.Namespace(from_pretrained=refuse))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(ValueError, match=r"texts' cannot be loaded: data did not match"):
        prepare_data([texts], tmp_path / "train", tokenizer=str(texts))


_LONG_LINE = b'{"text": "%s"}\n' % (b"%512d" % 0 * 2**6)


@pytest.mark.parametrize(
    ("line", "size_bytes", "tokenizer"),
    [
        (b"", 2**22, "bytes"),
        (_LONG_LINE, 2**22, "bytes"),
        (_LONG_LINE, 2**22, "Hugging Face"),
    ],
    ids=["plain", "long lines", "Hugging Face"],
)
def test_the_memory_needed_does_not_depend_on_the_size_of_the_input(
    line, size_bytes, tokenizer, tmp_path, monkeypatch
):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    path = tmp_path / ("in.jsonl" if line else "in.txt")

    def peak_bytes(size_bytes):
        with path.open("wb") as file:
            if line:
                file.writelines(line for _ in range(size_bytes // len(line)))
            else:
                file.truncate(size_bytes)
        tracemalloc.start()
        try:
            written = prepare_data(
                [path],
                tmp_path / "train",
                tokenizer="bytes" if tokenizer == "bytes" else str(tmp_path),
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert written.documents == (size_bytes // len(line) if line else 1)
        return peak

    small = peak_bytes(size_bytes)
    assert peak_bytes(8 * size_bytes) < small + 2**20
