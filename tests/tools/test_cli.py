"""The command line, mostly in a process of its own: a script may change any state."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_laer import __version__
from megatron_laer.releases import TESTED_RANGE
from megatron_laer.tools import cli
from megatron_laer.tools.cli import plan
from megatron_laer.tools.model_flags import model_flags
from tests.processes import default_signals, python_path


def run(*words, cwd=None, device="cpu"):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_laer", *map(str, words)],
        env=os.environ | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": device},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def script(tmp_path):
    def write(code):
        (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(code))
        return path

    return write


def test_a_script_sees_what_python_would_show_it_and_the_plugin(script):
    path = script("""
        import json, sys
        import neighbour
        from megatron.training.arguments import add_megatron_arguments
        import argparse
        flags = add_megatron_arguments(argparse.ArgumentParser()).format_usage()
        has_flag = "--fsep-capacity" in flags
        print(json.dumps([__name__, sys.argv, sys.path[0], has_flag]))
    """)
    result = run("train", path, "--", "--lr", "1", "--", "x", cwd="/")
    assert result.returncode == 0, result.stderr
    name, argv, folder, has_flag = json.loads(result.stdout.splitlines()[-1])
    assert name == "__main__"
    assert argv == [str(path), "--lr", "1", "--", "x"]
    assert folder == str(path.parent)
    assert has_flag


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


def test_a_process_that_a_script_spawns_does_not_run_it_again(script):
    path = script("""
        import multiprocessing, os
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=os.getpid)
            process.start()
            process.join()
            print("ended with", process.exitcode)
    """)
    result = run("train", path)
    assert result.stdout.splitlines().count("ended with 0") == 1


def test_the_exit_status_of_a_script_is_kept(script):
    assert run("train", script("raise SystemExit(7)")).returncode == 7


def test_an_error_inside_a_script_keeps_its_traceback(script):
    result = run("train", script("raise ValueError('of the script')"))
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "megatron-laer: .* required: COMMAND"),
        (["dance"], "megatron-laer: .* invalid choice: 'dance'"),
        (["plan", "x", "--ranks", "x\n" * 5000], r"plan: .* --ranks: 'x\\n.*\\n' is no integer"),
        (["train", "script.py", "--lr", "1"], "train: unrecognized arguments: --lr 1; the scri"),
        (["flags", "x", "\x1b[31m\n"], r"flags: unrecognized arguments: '\\x1b\[31m\\n'"),
        (["flags", "tiny-moe", "--", "--lr"], "flags: nothing follows -- here, got --lr"),
    ],
    ids=["nothing", "command", "number", "no dashes", "control characters", "needless dashes"],
)
def test_a_wrong_command_line_is_refused_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1 and error[:-1].isprintable() and len(error) < 2200


@pytest.mark.parametrize("name", ["tiny-moe", "deepseek-v3", "gpt-oss-20b"])
def test_flags_are_printed_ready_for_a_shell(name, capsys):
    assert cli.main(["flags", name]) == 0
    printed = capsys.readouterr().out
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' $(echo {shlex.quote(printed)})"],
        capture_output=True,
        text=True,
    )
    assert words.stdout.splitlines() == shlex.split(printed) == model_flags(name)


def test_text_becomes_a_dataset(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    words = ["prepare-data", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "data")]
    assert cli.main(words) == 0
    assert (tmp_path / "data.bin").stat().st_size == 2 * len("text.")
    assert "1 documents, 5 tokens" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"megatron-laer {__version__}\n"


def test_messages_name_the_program_as_it_was_started(tmp_path):
    assert run("flags", "x").stderr.startswith("python -m megatron_laer flags: unknown model 'x'")
    link = tmp_path / "megatron-laer"
    link.write_text("import sys; from megatron_laer.tools.cli import main; sys.exit(main())")
    result = subprocess.run(
        [sys.executable, link, "flags", "x"],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert result.stderr.startswith("megatron-laer flags: unknown model 'x'")


# A command that reports its start and the end of its `finally` clause. It sleeps in a loop, since a
# signal just before `signal.pause` would be lost.
_WAITING = """
import sys, time
from megatron_laer.tools import cli
from megatron_laer.tools.cli import plan
def wait(args):
    try:
        print("at work", flush=True)
        while True:
            time.sleep(0.05)
    finally:
        print("tidied up")
plan.run = wait
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
    path = script("""
        import time
        try:
            print("at work", flush=True)
            while True:
                time.sleep(0.05)
        finally:
            print("tidied up")
    """)
    plainly = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        status, output, error = stopped_by(number, [path])
        plainly[number] = status, output, error.count("Traceback")
    assert plainly == {
        signal.SIGINT: (-signal.SIGINT, "tidied up\n", 1),
        signal.SIGTERM: (-signal.SIGTERM, "", 0),
    }
    for number, expected in plainly.items():
        status, output, error = stopped_by(number, ["-m", "megatron_laer", "train", path])
        assert (status, output, error.count("Traceback")) == expected


def stopped_by(number, words):
    process = started_at_work(words)
    process.send_signal(number)
    output, error = process.communicate()
    return process.returncode, output, error


def started_at_work(words):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *words],
        env=os.environ | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    while process.stdout.readline() not in ("at work\n", ""):
        pass
    return process


def test_flags_for_a_machine_without_a_gpu_follow_the_models():
    from megatron_laer.device import CPU_FLAGS

    plain, with_cpu = (run("flags", "tiny-moe", *more).stdout.split() for more in ([], ["--cpu"]))
    assert with_cpu == [*plain, *CPU_FLAGS]


@pytest.mark.parametrize("words", [["--help"], ["flags", "tiny-moe"]], ids=lambda words: words[-1])
def test_a_reader_that_goes_away_is_no_error(words):
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "megatron_laer", *words],
        # Unbuffered, argparse ignores it.
        env=os.environ | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": ""},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_the_output_is_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "megatron_laer", "flags", "tiny-moe"],
            env=os.environ | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2
    assert "No space left on device" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"]], ids=["all", "plan"])
def test_help_has_examples_that_parse(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(words)
    lines = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    commands = [line.split() for line in lines if line.split()[0] == "megatron-laer"]
    assert len(commands) >= 4
    for command in commands:
        assert cli._parse(command[1:])[0].command == command[1]


def test_help_of_plan_tells_every_default():
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    silent = [action.dest for action in parser._actions if "default" not in action.help]
    assert silent == ["help", "trace", "experts", "workload", "json", "plot"]
