"""The input of `prepare_data`: folders, links, and lines of JSON."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from megatron_laer.tools import data
from megatron_laer.tools.data.text_files import find_files
from tests.tools.datasets import read_documents


def texts_of(written):
    documents = read_documents(written.prefix)
    return [document[:-1].astype(np.uint8).tobytes().decode() for document in documents]


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


@pytest.mark.parametrize("name", ["a.txt", "."], ids=["file", "folder"])
def test_a_link_that_is_named_itself_is_followed(name, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / name)
    written = prepare_data(tmp_path / "link")
    assert texts_of(written) == ["inside"] and not written.left_out


def test_links_in_a_circle_end_and_a_folder_is_read_once(folder):
    (folder / "z").mkdir()
    (folder / "z" / "b.txt").write_text("deeper")
    (folder / "z" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "z")
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


@pytest.mark.parametrize(
    ("lines", "options", "texts", "left_out"),
    [
        ('{"text": "a"}\n', {"text_format": "text"}, ['{"text": "a"}\n'], ()),
        ('{"text": "a title", "body": "a body"}\n', {"json_key": "body"}, ["a body"], ()),
        (
            '{"text": ""}\n{"text": "a"}\n{"text": ""}\n',
            {},
            ["a"],
            ("left out documents without text: 2",),
        ),
    ],
    ids=["as text", "key", "empty"],
)
def test_jsonl_is_read_as_asked_for(tmp_path, lines, options, texts, left_out):
    (tmp_path / "in.jsonl").write_text(lines)
    written = prepare_data(tmp_path / "in.jsonl", **options)
    assert (texts_of(written), written.left_out) == (texts, left_out)


def test_a_line_without_end_is_refused(tmp_path):
    with (tmp_path / "in.jsonl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"line 1 is longer than 67,108,864 bytes"):
        prepare_data(tmp_path / "in.jsonl")


def test_a_compressed_file_is_refused_unless_its_bytes_are_asked_for(tmp_path):
    (tmp_path / "in.zst").write_text("packed")
    with pytest.raises(ValueError, match=r"in\.zst' is compressed by its ending; unpack it first"):
        prepare_data(tmp_path / "in.zst")
    assert texts_of(prepare_data(tmp_path / "in.zst", text_format="text")) == ["packed"]
