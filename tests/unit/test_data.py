import argparse
import os
import sys

import numpy as np
import pytest

from megatron_laer import data

pytestmark = pytest.mark.unit


def read_documents(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [np.array(dataset[i]) for i in range(len(dataset))]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes(bytes(range(256)))
    (folder / "a.txt").write_text("first in order")
    return folder


def prepare(inputs, prefix, **kwargs):
    return data.prepare_data(inputs, prefix, progress=False, **kwargs)


def test_the_dataset_gives_back_every_byte_and_ends_every_document(texts, tmp_path):
    written = prepare([texts], tmp_path / "out" / "train")

    first, second = read_documents(written.prefix)
    assert bytes(first[:-1].tolist()) == b"first in order"
    assert second[:-1].tolist() == list(range(256))
    assert first[-1] == second[-1] == 256
    assert (written.documents, written.tokens) == (2, 14 + 256 + 2)


def test_the_flags_make_megatron_see_the_same_end_of_document(texts, tmp_path):
    from megatron.core.tokenizers import MegatronTokenizer

    flags = prepare([texts], tmp_path / "train").flags
    vocab_size = int(flags[flags.index("--vocab-size") + 1])
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=vocab_size
    )
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_the_order_of_a_directory_does_not_depend_on_the_file_system(tmp_path):
    folder = tmp_path / "texts"
    for name in ("z/1.txt", "m.txt", "a/2.txt", "a/1.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    documents = read_documents(prepare([folder], tmp_path / "train").prefix)
    texts = [bytes(document[:-1].tolist()).decode() for document in documents]
    assert texts == ["m.txt", "a/1.txt", "a/2.txt", "z/1.txt"]


def test_a_directory_is_read_without_its_empty_and_hidden_files(texts, tmp_path):
    (texts / "__init__.py").touch()
    (texts / ".hidden").write_text("hidden")
    assert prepare([texts], tmp_path / "train").documents == 2


@pytest.mark.parametrize("case", ["missing", "empty file", "empty directory"])
def test_an_input_without_text_is_refused_by_name(case, tmp_path):
    path = tmp_path / case
    if case == "empty file":
        path.touch()
    elif case == "empty directory":
        path.mkdir()
    with pytest.raises(ValueError, match=str(path)):
        prepare([path], tmp_path / "train")
    assert not list(tmp_path.glob("train*"))


def test_an_unreadable_file_is_refused_by_name_and_leaves_nothing(texts, tmp_path, monkeypatch):
    # Permissions do not stop root, who runs many test machines, so the read itself is made to fail.
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"a\.txt' cannot be read: Permission denied"):
        prepare([texts], tmp_path / "out" / "train")
    assert not list((tmp_path / "out").iterdir())


def test_no_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="inputs is empty"):
        prepare([], tmp_path / "train")


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "texts"])
def test_an_output_that_is_no_prefix_is_refused(name, texts, tmp_path):
    with pytest.raises(ValueError, match=name):
        prepare([texts], tmp_path / name)


def test_an_output_among_the_inputs_is_refused(texts):
    prepare([texts], texts / "train")
    with pytest.raises(ValueError, match=r"train\.bin' is both input and output"):
        prepare([texts], texts / "train")


def test_an_unknown_tokenizer_is_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="'wordpiece' is neither 'bytes' nor a directory"):
        prepare([texts], tmp_path / "train", tokenizer="wordpiece")


def test_a_hugging_face_tokenizer_without_transformers_says_what_to_install(
    texts, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        prepare([texts], tmp_path / "train", tokenizer=str(texts))


def test_a_hugging_face_tokenizer_ends_documents_with_its_own_token(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    (texts / "b.txt").write_text("two words")
    written = prepare([texts], tmp_path / "train", tokenizer=str(texts))
    assert [d.tolist() for d in read_documents(written.prefix)] == [[5, 2, 5, 7], [3, 5, 7]]
    assert "HuggingFaceTokenizer" in written.flags


def test_a_hugging_face_tokenizer_without_an_end_token_is_refused(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=None)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        prepare([texts], tmp_path / "train", tokenizer=str(texts))


def test_a_hugging_face_tokenizer_refuses_what_is_no_text(texts, tmp_path, monkeypatch):
    install_fake_transformers(monkeypatch, eos_token_id=7)
    with pytest.raises(ValueError, match=r"b\.txt' is not UTF-8 text"):
        prepare([texts], tmp_path / "train", tokenizer=str(texts))


def install_fake_transformers(monkeypatch, eos_token_id):
    class LengthOfWords:
        def __init__(self):
            self.eos_token_id = eos_token_id

        def __len__(self):
            return 100

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [len(word) for word in text.split()]

        @classmethod
        def from_pretrained(cls, folder, local_files_only):
            assert local_files_only
            return cls()

    fake = argparse.Namespace(AutoTokenizer=LengthOfWords)
    monkeypatch.setitem(sys.modules, "transformers", fake)


def test_an_existing_dataset_is_replaced(texts, tmp_path):
    prepare([texts], tmp_path / "train")
    (texts / "b.txt").write_text("new")
    prepare([texts], tmp_path / "train")
    assert bytes(read_documents(tmp_path / "train")[1][:-1].tolist()) == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "train.bin", "train.idx"]


def test_a_dataset_that_was_trained_on_is_replaced_with_megatrons_indices_of_it(texts, tmp_path):
    prepare([texts], tmp_path / "train")
    indices = tmp_path / "train" / "cache" / "GPTDataset_indices"
    indices.mkdir(parents=True)
    (indices / "train-document_index.npy").write_text("of the old dataset")
    (texts / "b.txt").write_text("new")
    prepare([texts], tmp_path / "train")
    assert bytes(read_documents(tmp_path / "train")[1][:-1].tolist()) == b"new"
    assert not indices.exists()


def test_a_directory_of_the_users_is_no_prefix_though_it_holds_a_cache(texts, tmp_path):
    (tmp_path / "train" / "cache").mkdir(parents=True)
    (tmp_path / "train" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="train' must be a path"):
        prepare([texts], tmp_path / "train")


def test_an_interrupt_while_tokenizing_keeps_the_old_dataset(texts, tmp_path, monkeypatch):
    prepare([texts], tmp_path / "train")
    before = read_documents(tmp_path / "train")

    real = data._read

    def interrupted_at_the_second_file(path):
        if path.name == "b.txt":
            raise KeyboardInterrupt
        return real(path)

    (texts / "a.txt").write_text("must not be seen")
    monkeypatch.setattr(data, "_read", interrupted_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts], tmp_path / "train")
    after = read_documents(tmp_path / "train")
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "train.bin", "train.idx"]


@pytest.mark.parametrize("moves_before_the_interrupt", [0, 1])
def test_an_interrupt_while_replacing_leaves_no_index(
    moves_before_the_interrupt, texts, tmp_path, monkeypatch
):
    prepare([texts], tmp_path / "train")
    real, moves = os.replace, []

    def replace(source, target):
        if len(moves) == moves_before_the_interrupt:
            raise KeyboardInterrupt
        moves.append(target)
        real(source, target)

    monkeypatch.setattr(data.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts], tmp_path / "train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "train.bin"]


def test_the_default_sources_are_text_in_a_fixed_order():
    sources = data.default_text_sources()
    assert sources == data.default_text_sources()
    assert any(path.name == "argparse.py" for path in sources)
    assert all(path.suffix == ".py" and path.stat().st_size for path in sources)
    assert not {"site-packages", "test", "tests"} & {part for p in sources for part in p.parts}


def test_the_command_prints_the_flags_for_training(texts, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    prefix = str(tmp_path / "train")
    assert data.run(parser.parse_args(["--input", str(texts), "--output", prefix])) == 0
    out = capsys.readouterr().out
    assert f"--data-path {prefix} --tokenizer-type NullTokenizer --vocab-size 257" in out
