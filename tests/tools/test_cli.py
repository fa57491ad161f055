"""The command line, mostly in a process of its own: a script may change any state."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_laer import __version__, environment
from megatron_laer.device import CPU_FLAGS
from megatron_laer.releases import TESTED_RANGE
from megatron_laer.tools import cli
from megatron_laer.tools.cli import calibrate, main, progress
from megatron_laer.tools.cli.program import ended, escape_warnings
from megatron_laer.tools.model_flags import model_flags
from scripts.paper import runner
from scripts.paper.tables import Result, Table
from tests.processes import finished, python, python_path, start


def run(*words, cwd=".", device="cpu"):
    return finished("-m", "megatron_laer", *words, cwd=cwd, MEGATRON_LAER_DEVICE=device)


@pytest.fixture
def script(tmp_path):
    def write(code):
        (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(code))
        return path

    return write


@pytest.mark.parametrize(
    ("line", "completed"),
    [("pl", "plan "), ("plan x --str", "--strategy "), ("plan x --mode ad", "adaptive ")],
)
def test_a_shell_completes_commands_flags_and_their_words(line, completed, tmp_path):
    pytest.importorskip("argcomplete")
    line, words = f"megatron-laer {line}", tmp_path / "words"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    said = python("-m", "megatron_laer", _ARGCOMPLETE_STDOUT_FILENAME=str(words), **asked)
    assert (words.read_text(), said) == (completed, "")


def test_a_script_sees_what_python_would_show_it_and_the_plugin(script):
    path = script("""
        import json, sys
        import neighbour
        from megatron.training.arguments import add_megatron_arguments
        import argparse
        flags = add_megatron_arguments(argparse.ArgumentParser()).format_usage()
        has_flag = "--fsep-capacity" in flags
        print(json.dumps([__name__, sys.argv, sys.path[0], has_flag]))
        raise ValueError("of the script")
    """)
    result = run("train", path, "--", "--lr", "1", "--", "x", cwd="/")
    assert result.returncode == 1 and "Traceback" in result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == ["__main__", [str(path), "--lr", "1", "--", "x"], str(path.parent), True]


def test_a_checkout_beside_the_script_is_the_megatron_whose_version_is_checked(script):
    path = script("raise SystemExit('must not run')")
    core = path.parent / "megatron" / "core"
    (core / "datasets").mkdir(parents=True)
    for module in (core / "__init__.py", core / "datasets" / "utils.py"):
        module.touch()
    (core / "package_info.py").write_text("__version__ = '0.17.1'\n")
    # The CPU platform would repair modules that this checkout lacks.
    result = run("train", path, device="cuda")
    assert result.returncode == 2
    assert f"supports megatron-core {TESTED_RANGE}, found 0.17.1" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_process_that_a_script_spawns_does_not_run_it_again_and_its_status_is_kept(script):
    path = script("""
        import multiprocessing, os, sys
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=os.getpid)
            process.start()
            process.join()
            print("ended with", process.exitcode)
            sys.exit(7)
    """)
    result = run("train", path)
    assert result.stdout.splitlines().count("ended with 0") == 1
    assert result.returncode == 7


@pytest.mark.parametrize("name", ["tiny-moe", "deepseek-v3", "gpt-oss-20b"])
def test_flags_are_printed_ready_for_a_shell(name, capsys):
    assert cli.main(["flags", name]) == 0
    plain = capsys.readouterr().out
    # As the shell splits what $(...) prints.
    assert plain.split() == shlex.split(plain) == model_flags(name)
    assert cli.main(["flags", name, "--cpu"]) == 0
    assert capsys.readouterr().out.split() == [*plain.split(), *CPU_FLAGS]


def test_messages_name_the_program_as_it_was_started(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"megatron-laer {__version__}\n"
    assert run("flags", "x").stderr.startswith("python -m megatron_laer flags: unknown model 'x'")
    link = tmp_path / "megatron-laer"
    link.write_text("import sys; from megatron_laer.tools.cli import main; sys.exit(main())")
    assert finished(link, "flags", "x").stderr.startswith("megatron-laer flags: unknown model 'x'")


# It reports its start and the end of its `finally` clause. It sleeps in a loop, since a signal just
# before `signal.pause` would be lost.
_AT_WORK = """
import time
try:
    print("at work", flush=True)
    while True:
        time.sleep(0.05)
finally:
    print("tidied up")
"""
_WAITING = f"""
import sys
from megatron_laer.tools import cli
from megatron_laer.tools.cli import plan
plan.run = lambda args: exec({_AT_WORK!r})
sys.exit(cli.main(["plan", "trace"]))
"""


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGINT, 130, "megatron-laer plan: interrupted\n"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 143 - signal.SIGTERM + signal.SIGHUP, ""),
    ],
)
def test_a_command_that_a_signal_stops_tidies_up_without_a_traceback(number, status, message):
    assert stopped_by(number, ["-c", _WAITING]) == (status, "tidied up\n", message)


def test_a_signal_that_is_ignored_stays_ignored():
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = started_at_work(["-c", ignoring + _WAITING])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143


def test_a_script_gets_signals_as_under_python_itself(script):
    path = script(_AT_WORK)
    for number, *expected in (
        (signal.SIGINT, -signal.SIGINT, "tidied up\n", 1),
        (signal.SIGTERM, -signal.SIGTERM, "", 0),
    ):
        for words in ([path], ["-m", "megatron_laer", "train", path]):
            status, output, error = stopped_by(number, words)
            assert [status, output, error.count("Traceback")] == expected


def stopped_by(number, words):
    process = started_at_work(words)
    process.send_signal(number)
    output, error = process.communicate()
    return process.returncode, output, error


def started_at_work(words):
    process = start(*words)
    while process.stdout.readline() not in ("at work\n", ""):
        pass
    return process


def flags_into(stdout, unbuffered):
    return subprocess.run(
        [sys.executable, "-m", "megatron_laer", "flags", "tiny-moe"],
        env=os.environ | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": unbuffered},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_goes_away_is_no_error_and_a_full_disk_is_one_line(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    result = flags_into(writing, unbuffered)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        result = flags_into(full, unbuffered)
    assert result.returncode == 2
    assert "No space left on device" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [None, *cli._COMMANDS])
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*filter(None, [command]), "--help"])
    examples = capsys.readouterr().out.split("examples:\n")[1].partition("\n\n")[0]
    found = []
    for line in examples.replace("\\\n", " ").splitlines():
        words = re.sub(r"\$\(.*\)", "x", line).split()
        programs = "megatron-laer", "megatron_laer"
        start = next(place for place, word in enumerate(words, 1) if word in programs)
        found.append(cli._parse(words[start:])[0].command)
    assert found and (command is None or {*found} == {command})


def test_a_pipe_gets_a_line_of_progress_now_and_then(monkeypatch, capsys):
    assert [*progress.bar("planning")(range(4))] == [*range(4)]
    assert capsys.readouterr().err == ""  # all was done within the time
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    assert [*progress.bar("planning")(range(4))] == [*range(4)]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("planning: 4 of 4, ") and "\r" not in "".join(lines)
    with progress.working("importing"):
        while not (said := capsys.readouterr().err):
            time.sleep(0.01)
    assert said == "importing, which takes some seconds\n"


def test_a_file_is_replaced_if_a_command_wrote_it_or_by_force(tmp_path, capsys):
    out = tmp_path / "x.json"
    words = "plan --workload W0 --ranks 2 --config tiny-moe --strategy greedy --every 9 --json"
    out.write_text("precious")
    assert main([*words.split(), str(out)]) == 2
    assert out.read_text() == "precious"
    assert "x.json' is there already; give another file, or --force" in capsys.readouterr().err
    for more in (["--force"], []):
        assert main([*words.split(), str(out), *more]) == 0
        assert json.loads(out.read_text())["written_by"] == "megatron_laer"


def test_a_variable_that_a_library_cannot_use_is_named(monkeypatch, capsys):
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


def test_a_text_that_the_terminals_encoding_lacks_is_named(capsys):
    assert ended("flags", lambda: len("of a caf\u00e9".encode("ascii"))) == 2
    assert capsys.readouterr().err == "flags: 'of a caf\u00e9' cannot be written in ascii\n"


def test_a_warning_is_one_line(monkeypatch, capsys):
    last = logging._StderrHandler(logging.WARNING)  # type: ignore[attr-defined]
    monkeypatch.setattr(logging, "lastResort", last)
    escape_warnings()
    record = logging.makeLogRecord({"msg": "%s: cut", "args": ("a\x1b[2J\nb",)})
    last.handle(record)
    assert capsys.readouterr().err == "a\\x1b[2J\\nb: cut\n"


def test_calibrate_checks_its_arguments_before_the_launcher(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ("x.txt", "'x.txt' does not end in .yaml or .yml"),
        ("x.yaml --config moon", "unknown model 'moon'"),
        ("x.yaml", "exchanges need several ranks"),
    ):
        assert main(["calibrate", *words.split()]) == 2
        assert message in capsys.readouterr().err


def test_calibrate_is_imported_without_torch():
    code = f"import sys, {calibrate.__name__}; sys.exit('torch' in sys.modules)"
    python("-c", code)


def test_a_figure_prints_names_and_notes_escaped(tmp_path, capsys):
    result = Result(8, "times", "toy", [Table("one", [{"run": "a\x1b[2Jb"}])], ["no \x1b[31m"])
    assert runner.finish(result, tmp_path / "a\x1b[2J") == 0
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert r"a\x1b[2Jb" in printed and r"* no \x1b[31m" in printed
    assert r"/a\x1b[2J/result.json and, as text" in printed
