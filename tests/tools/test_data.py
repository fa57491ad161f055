"""`prepare_data` writes a complete dataset or keeps the old one; refusals."""

import io
import os
import resource
import sys

import numpy as np
import pytest

from megatron_laer.tools import cli, data
from megatron_laer.tools.data import dataset, tokenizers
from tests.tools.datasets import prepare_data, read_documents


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes(bytes(range(256)))
    (folder / "a.txt").write_text("first in order")
    return folder


def test_the_dataset_gives_back_every_byte_and_ends_every_document(texts, tmp_path):
    written = prepare_data([texts], tmp_path / "out" / "train")

    first, second = read_documents(written.prefix)
    assert bytes(first[:-1].tolist()) == b"first in order"
    assert second[:-1].tolist() == list(range(256))
    assert first[-1] == second[-1] == 256
    assert (written.documents, written.tokens) == (2, 14 + 256 + 2)


def test_the_flags_make_megatron_see_the_same_end_of_document(texts, tmp_path):
    from megatron.core.tokenizers import MegatronTokenizer

    flags = prepare_data([texts], tmp_path / "train").flags
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
    documents = read_documents(prepare_data([folder], tmp_path / "train").prefix)
    texts = [bytes(document[:-1].tolist()).decode() for document in documents]
    assert texts == ["m.txt", "a/1.txt", "a/2.txt", "z/1.txt"]


def test_a_directory_is_read_without_its_empty_and_hidden_files(texts, tmp_path):
    (texts / "__init__.py").touch()
    (texts / ".hidden").write_text("hidden")
    assert prepare_data([texts], tmp_path / "train").documents == 2


def test_an_unreadable_file_is_refused_by_name_and_leaves_nothing(texts, tmp_path, monkeypatch):
    # Permissions do not stop root, so opening itself is made to fail.
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dataset, "open_input", refuse)
    with pytest.raises(ValueError, match=r"a\.txt' cannot be read: Permission denied"):
        prepare_data([texts], tmp_path / "out" / "train")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("texts/train", "would write over the input"),
        ("folder", r"folder\.idx': it is there and no regular file"),
        ("texts/a.txt/train", "is no folder"),
        ("/proc/train", "cannot be written to"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    prefix, message, texts, tmp_path, monkeypatch
):
    (tmp_path / "folder.idx").mkdir()
    monkeypatch.setattr(dataset, "load_tokenizer", None)
    with pytest.raises(ValueError, match=f"--output .*{message}"):
        prepare_data([texts], tmp_path / prefix)


def test_a_dataset_that_a_link_in_the_input_leads_to_is_not_replaced(texts, tmp_path):
    prepare_data([texts], tmp_path / "train")
    (texts / "link").symlink_to(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin' would write over the input .*link'"):
        prepare_data([texts], tmp_path / "train", follow_links=True)


def test_an_existing_dataset_is_replaced(texts, tmp_path):
    prepare_data([texts], tmp_path / "train")
    (texts / "b.txt").write_text("new")
    prepare_data([texts], tmp_path / "train")
    assert bytes(read_documents(tmp_path / "train")[1][:-1].tolist()) == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "train.bin", "train.idx"]


def test_a_dataset_that_was_trained_on_is_replaced_with_megatrons_indices_of_it(texts, tmp_path):
    prepare_data([texts], tmp_path / "train")
    indices = tmp_path / "train" / "cache" / "GPTDataset_indices"
    indices.mkdir(parents=True)
    (indices / "train-document_index.npy").write_text("of the old dataset")
    (texts / "b.txt").write_text("new")
    prepare_data([texts], tmp_path / "train")
    assert bytes(read_documents(tmp_path / "train")[1][:-1].tolist()) == b"new"
    assert not indices.exists()


def test_a_directory_of_the_users_is_no_prefix_though_it_holds_a_cache(texts, tmp_path):
    (tmp_path / "train" / "cache").mkdir(parents=True)
    (tmp_path / "train" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="train' must be a path"):
        prepare_data([texts], tmp_path / "train")


def test_an_interrupt_while_tokenizing_keeps_the_old_dataset(texts, tmp_path, monkeypatch):
    prepare_data([texts], tmp_path / "train")
    before = content(tmp_path)

    real = dataset.open_input

    def interrupted_at_the_second_file(path):
        if path.name == "b.txt":
            raise KeyboardInterrupt
        return real(path)

    (texts / "a.txt").write_text("must not be seen")
    monkeypatch.setattr(dataset, "open_input", interrupted_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        prepare_data([texts], tmp_path / "train")
    assert content(tmp_path) == before


def test_a_full_disk_names_the_output_and_keeps_the_old_dataset(texts, tmp_path):
    prepare_data([texts], tmp_path / "train")
    before = content(tmp_path)
    (texts / "a.txt").write_bytes(bytes(2**16))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*train'"):
            prepare_data([texts], tmp_path / "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == before


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("moves_before_the_interrupt", [0, 1])
def test_an_interrupt_while_replacing_leaves_no_index(
    moves_before_the_interrupt, texts, tmp_path, monkeypatch
):
    prepare_data([texts], tmp_path / "train")
    real, moves = os.replace, []

    def replace(source, target):
        if len(moves) == moves_before_the_interrupt:
            raise KeyboardInterrupt
        moves.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare_data([texts], tmp_path / "train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts", "train.bin"]


def test_the_default_sources_are_text_in_a_fixed_order():
    sources = data.default_text_sources()
    assert sources == data.default_text_sources()
    assert any(path.name == "argparse.py" for path in sources)
    assert all(path.suffix == ".py" and path.stat().st_size for path in sources)
    assert not {"site-packages", "test", "tests"} & {part for p in sources for part in p.parts}


def test_the_command_prints_the_flags_for_training_ready_for_a_shell(texts, tmp_path, capfd):
    prefix = tmp_path / "a b;id"
    assert cli.main(["prepare-data", "--input", str(texts), "--output", str(prefix)]) == 0
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
    data.prepare_data([texts], tmp_path / "train")
    assert "tokenizing: 100%" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    data.prepare_data([texts], tmp_path / "train", progress=False)
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
    (texts / "c.jsonl").write_text('{"text": "longer than a piece"}')
    documents = read_documents(prepare_data([texts], tmp_path / "train").prefix)
    assert [bytes(document[:-1].tolist()) for document in documents] == [
        b"first in order",
        bytes(range(256)),
        b"longer than a piece",
    ]


def test_a_file_that_has_grown_too_long_meanwhile_is_refused(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_DOCUMENT_TOKENS", 256)
    with pytest.raises(ValueError, match="a document has more than 256 tokens"):
        prepare_data([texts], tmp_path / "train")
    assert not list(tmp_path.glob("*train*"))
