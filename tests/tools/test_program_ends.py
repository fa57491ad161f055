"""Programs end in one line that names the culprit, and print no foreign text raw."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laer import environment
from megatron_laer.tools.cli import calibrate, main
from megatron_laer.tools.cli.program import ended, escape_warnings
from scripts.paper import runner
from scripts.paper.tables import Result, Table
from tests.processes import python_path


def test_a_variable_that_a_library_cannot_use_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(environment._READ_BY, __name__.partition(".")[0], ("ODD_",))
    monkeypatch.setenv("ODD_NUMBER", "a\x1b[2J\nb")

    def fail() -> int:
        raise TypeError("no float")

    assert ended("plan", fail) == 2
    error = capsys.readouterr().err
    assert error == "plan: ODD_NUMBER='a\\x1b[2J\\nb': no float; correct or unset it\n"
    monkeypatch.delenv("ODD_NUMBER")
    with pytest.raises(TypeError):  # our own fault keeps its traceback
        ended("plan", fail)


def test_a_text_that_the_terminals_encoding_lacks_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended("flags", lambda: len("of a caf\u00e9".encode("ascii"))) == 2
    assert capsys.readouterr().err == "flags: 'of a caf\u00e9' cannot be written in ascii\n"


def test_a_warning_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = logging._StderrHandler(logging.WARNING)  # type: ignore[attr-defined]
    monkeypatch.setattr(logging, "lastResort", last)
    escape_warnings()
    record = logging.makeLogRecord({"msg": "%s: cut", "args": ("a\x1b[2J\nb",)})
    last.handle(record)
    assert capsys.readouterr().err == "a\\x1b[2J\\nb: cut\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("x.txt", "'x.txt' does not end in .yaml or .yml"),
        ("x.yaml --hidden 4", "--hidden and --ffn go together"),
        ("x.yaml --config ./no.yaml", "--config './no.yaml': "),
        ("there.yaml", "'there.yaml' is there already"),
        ("x.yaml", "exchanges need several ranks"),
    ],
)
def test_calibrate_checks_its_arguments_before_the_launcher(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").touch()
    assert main(["calibrate", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_calibrate_is_imported_without_torch() -> None:
    code = f"import sys, {calibrate.__name__}; sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": python_path()}, check=True, timeout=600
    )


def test_a_figure_prints_names_and_notes_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Result(8, "times", "toy", [Table("one", [{"run": "a\x1b[2Jb"}])], ["no \x1b[31m"])
    assert runner.finish(result, tmp_path / "a\x1b[2J") == 0
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert r"a\x1b[2Jb" in printed and r"* no \x1b[31m" in printed
    assert r"/a\x1b[2J/result.json and, as text" in printed
