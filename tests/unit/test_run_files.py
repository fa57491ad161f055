"""Files and folders of a configuration are refused before a run, without creating any."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_laer.config import FSEPConfig, flag_name
from megatron_laer.runtime.planning.layout_recording import recording_path
from megatron_laer.support import config_files
from megatron_laer.support.config_files import RECORDED_LAYOUTS, WRITTEN
from megatron_laer.telemetry.metrics_file import recording_path as metrics_path
from megatron_laer.telemetry.timeline import timeline_path
from megatron_laer.telemetry.trace_file import recording_path as trace_path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    folder = tmp_path / "layouts"
    folder.mkdir()
    recording_path(str(folder), 0).write_text("{}\n")
    return folder


def there(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_folders_that_can_be_used_are_taken_and_not_made(tmp_path: Path, recording: Path) -> None:
    before = there(tmp_path)
    config_files.check(FSEPConfig())
    config_files.check(FSEPConfig(cluster="cpu-gloo", replay_layouts=str(recording)))
    config_files.check(
        FSEPConfig(
            record_layouts=str(tmp_path),
            record_trace=str(tmp_path / "new"),
            timeline=str(tmp_path / "not" / "yet"),
        )
    )
    config_files.check(
        FSEPConfig(replay_layouts=str(recording), record_layouts=str(tmp_path / "other"))
    )
    assert there(tmp_path) == before


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("given", ["", "a-file", "a-file/below", "/proc/x", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("mine")
    with pytest.raises(ValueError, match="give a folder that can be written") as error:
        config_files.check(FSEPConfig(**{name: given}))
    assert f"{flag_name(name)} {given!r}" in str(error.value)
    assert there(tmp_path) == {tmp_path / "a-file"}
    assert Path("a-file").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("", "empty"),
        ("missing", "no such folder"),
        ("a-file", "is no folder"),
        ("bare", "holds no group"),
    ],
)
def test_a_replay_of_what_is_no_recording_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("bare").mkdir()
    with pytest.raises(ValueError, match="a folder that --fsep-record-layouts wrote") as error:
        config_files.check(FSEPConfig(replay_layouts=given))
    assert f"--fsep-replay-layouts {given!r}: " in str(error.value)
    assert problem in str(error.value)


def symbolic(folder: Path) -> str:
    folder.with_name("link").symlink_to(folder)
    return str(folder.with_name("link"))


def hard(folder: Path) -> str:
    """Make another folder, with a hard link to the recording."""
    folder.with_name("other").mkdir()
    file = recording_path(str(folder), 0)
    os.link(file, folder.with_name("other") / file.name)
    return str(folder.with_name("other"))


ALIASES: dict[str, Callable[[Path], str]] = {
    "the same": str,
    "with a dot": lambda folder: f"./{folder.name}",
    "with a slash": lambda folder: f"{folder.name}/",
    "relative": lambda folder: folder.name,
    "through its parent": lambda folder: f"{folder.name}/../{folder.name}",
    "symbolic link": symbolic,
    "hard link": hard,
}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_recording_is_not_written_over_while_it_is_replayed(
    recording: Path, monkeypatch: pytest.MonkeyPatch, alias: str
) -> None:
    monkeypatch.chdir(recording.parent)
    recorded = ALIASES[alias](recording)
    config = FSEPConfig(replay_layouts=str(recording), record_layouts=recorded)
    with pytest.raises(ValueError, match="would write over the input") as error:
        config_files.check(config)
    assert f"--fsep-record-layouts {recorded!r}" in str(error.value)


@pytest.mark.parametrize(
    ("given", "problem"),
    [("nope", "cpu-gloo"), ("./nope.yaml", "No such file"), ("", "unknown cluster ''")],
)
def test_a_cluster_that_cannot_be_read_is_refused(given: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        config_files.check(FSEPConfig(cluster=given))
    assert f"--fsep-cluster {given!r}" in str(error.value)


def test_a_cluster_file_whose_content_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\n")
    with pytest.raises(ValueError, match=r"--fsep-cluster .*mine.yaml.* lacks the keys"):
        config_files.check(FSEPConfig(cluster=str(file)))


def test_what_a_run_writes_into_one_folder_has_different_names(tmp_path: Path) -> None:
    folder = str(tmp_path)
    files = {
        recording_path(folder, 0),
        trace_path(folder, 0),
        metrics_path(folder, 0),
        timeline_path(folder, 0),
    }
    assert len(files) == len(WRITTEN)
    assert recording_path(folder, 3).match(RECORDED_LAYOUTS)
