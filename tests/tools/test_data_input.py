"""The input of `prepare_data`: folders, links, and lines of JSON."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from megatron_laer.tools import data
from megatron_laer.tools.data.text_files import find_files


def texts_of(written):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(written.prefix))
    return [
        np.array(dataset[i])[:-1].astype(np.uint8).tobytes().decode() for i in range(len(dataset))
    ]


def prepare_data(path, **kwargs):
    return data.prepare_data([path], path.parent / "train", progress=False, **kwargs)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("inside")
    return folder


def test_a_link_inside_a_folder_is_counted_and_read_only_when_asked(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.txt").write_text("outside")
    (folder / "file").symlink_to(tmp_path / "out" / "secret.txt")
    (folder / "folder").symlink_to(tmp_path / "out")

    written = prepare_data(folder)
    assert texts_of(written) == ["inside"]
    assert written.left_out == (
        "left out symbolic links inside folders: 2; --follow-links reads what they lead to",
    )
    written = prepare_data(folder, follow_links=True)
    assert texts_of(written) == ["inside", "outside", "outside"]
    assert written.left_out == ()


def test_a_folder_of_nothing_but_links_says_how_to_read_them(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"in' holds no text: .*--follow-links reads what they"):
        prepare_data(tmp_path / "in")


@pytest.mark.parametrize("name", ["a.txt", "."], ids=["file", "folder"])
def test_a_link_that_is_named_itself_is_followed(name, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / name)
    written = prepare_data(tmp_path / "link")
    assert texts_of(written) == ["inside"] and not written.left_out


def test_links_in_a_circle_end(folder):
    (folder / "z").mkdir()
    (folder / "z" / "b.txt").write_text("deeper")
    (folder / "z" / "up").symlink_to(folder)
    assert texts_of(prepare_data(folder, follow_links=True)) == ["inside", "deeper"]


def test_what_goes_away_while_a_folder_is_listed_is_left_out(folder, monkeypatch):
    (folder / "gone.txt").write_text("gone")
    (folder / "went").mkdir()
    stat = Path.stat

    def gone(path, **words):
        if path.name == "went" or (path.name == "gone.txt" and path.name in seen):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        seen.append(path.name)
        return stat(path, **words)

    seen = []
    monkeypatch.setattr(Path, "stat", gone)
    assert find_files([folder]).files == [folder / "a.txt"]


def test_a_folder_that_two_ways_lead_to_is_read_once(folder):
    (folder / "z").mkdir()
    (folder / "z" / "b.txt").write_text("deeper")
    (folder / "again").symlink_to(folder / "z")
    assert texts_of(prepare_data(folder, follow_links=True)) == ["inside", "deeper"]


def test_pipes_and_sockets_in_a_folder_are_counted_and_not_opened(folder):
    os.mkfifo(folder / "pipe")
    (folder / "broken").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket"))
        written = prepare_data(folder, follow_links=True)
    assert texts_of(written) == ["inside"]
    assert written.left_out == (
        "left out broken links and what is no regular file, such as pipes: 3",
    )


def test_a_folder_that_cannot_be_listed_is_refused(folder, monkeypatch):
    (folder / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"closed' cannot be listed: Permission denied"):
        prepare_data(folder)


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "txt"])
def test_each_line_of_jsonl_is_a_document(ending, tmp_path):
    path = tmp_path / f"in.{ending}"
    documents = ["one\nwith two lines", "zwei: ü, 🙂", '"quoted"']
    lines = [json.dumps({"id": 5, "text": text}) for text in documents]
    path.write_text("\ufeff" + "\r\n".join([lines[0], "", *lines[1:]]))
    text_format = "jsonl" if ending == "txt" else None
    assert texts_of(prepare_data(path, text_format=text_format)) == documents


def test_jsonl_is_one_document_where_text_is_asked_for(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    written = prepare_data(tmp_path / "in.jsonl", text_format="text")
    assert texts_of(written) == ['{"text": "a"}\n']


def test_the_key_of_the_text_can_be_named(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a title", "body": "a body"}\n')
    assert texts_of(prepare_data(tmp_path / "in.jsonl", json_key="body")) == ["a body"]


def test_documents_without_text_are_counted_and_left_out(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    written = prepare_data(tmp_path / "in.jsonl")
    assert texts_of(written) == ["a"]
    assert written.left_out == ("left out documents without text: 2",)


def test_a_line_without_end_is_refused(tmp_path):
    with (tmp_path / "in.jsonl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"line 1 is longer than 67,108,864 bytes"):
        prepare_data(tmp_path / "in.jsonl")


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.zst"])
def test_a_compressed_file_is_refused_unless_its_bytes_are_asked_for(name, tmp_path):
    (tmp_path / name).write_text("packed")
    with pytest.raises(ValueError, match=f"{name}' is compressed by its ending; unpack it first"):
        prepare_data(tmp_path / name)
    assert texts_of(prepare_data(tmp_path / name, text_format="text")) == ["packed"]
