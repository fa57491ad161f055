"""The command line, mostly in a process of its own: a script that it runs may change anything."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from megatron_laer import __version__, cli
from megatron_laer.model_flags import model_flags
from tests.processes import python_path

pytestmark = pytest.mark.unit


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
    """Writes a script beside a module that it imports, and returns its path."""

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
    # The CPU stand-in would mend modules that this checkout does not have.
    result = run("train", path, device="cuda")
    assert result.returncode == 2
    assert "supports megatron-core 0.18.0 to 0.19.2, found 0.17.1" in result.stderr
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
        (["train", "/no/script.py"], "script '/no/script.py' does not exist"),
        (["prepare-data", "--input", "/no/text", "--output", "out"], "'/no/text' does not exist"),
        (["flags", "no-model"], "unknown model 'no-model'; known are"),
        (["flags", "/no/model.yaml"], "No such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(words, message, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["train", "script.py", "--lr", "1"], "unrecognized arguments: --lr 1; the script's own"),
        (["flags", "tiny-moe", "--", "--lr"], "flags takes nothing after --, got --lr"),
    ],
    ids=["nothing", "unknown command", "no dashes", "needless dashes"],
)
def test_a_wrong_command_line_is_refused_with_the_usage(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_are_printed_ready_for_a_shell(capsys):
    assert cli.main(["flags", "tiny-moe"]) == 0
    assert capsys.readouterr().out.split() == model_flags("tiny-moe")


def test_text_becomes_a_dataset(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    words = ["prepare-data", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "data")]
    assert cli.main(words) == 0
    assert (tmp_path / "data.bin").stat().st_size == 2 * len("text.")
    assert "1 documents, 5 tokens" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
