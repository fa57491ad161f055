"""Megatron's flags are read from files and command lines that hold some, and from no others."""

from __future__ import annotations

import pytest

from megatron_laer.tools.recipes.command_lines import (
    check_patterns,
    check_variables,
    flags_in_file,
    script_flags,
    without,
)


def test_flags_are_taken_from_a_script_and_from_yaml(tmp_path):
    line = "torchrun --nproc-per-node 8 pretrain_gpt.py --lr 1 --bf16"
    assert script_flags(line.split()) == ["--lr", "1", "--bf16"]
    assert script_flags("train x.py -- --lr 1".split()) == ["--lr", "1"]
    path = tmp_path / "run.sh"
    path.write_text("#!/bin/bash\ntorchrun pretrain_gpt.py \\\n  --lr 1 \\\n  --split '99,1,0'\n")
    assert flags_in_file(path) == ["--lr", "1", "--split", "99,1,0"]
    given = tmp_path / "x.yaml"
    given.write_text(
        "description: x\nmoe:\n  num_experts: 8\n  --moe-layer-freq: '[0,1]'\nswiglu: true\n"
    )
    flags = ["--num-experts", "8", "--moe-layer-freq", "[0,1]", "--swiglu"]
    assert flags_in_file(given) == flags
    given.write_text("Num Layers: 2\n")
    with pytest.raises(ValueError, match=r"x\.yaml: 'Num Layers' is no flag"):
        flags_in_file(given)
    path.write_text("--lr 'x")
    with pytest.raises(ValueError, match="no command line"):
        flags_in_file(path)
    path.write_text("x" * 2**20)
    with pytest.raises(ValueError, match="has 1,048,576 bytes; at most 262,144"):
        flags_in_file(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no flags and cannot be judged; give a command line"),
        ('{"num-experts": 8}\n', "it looks like JSON; give a command line"),
        ("num_experts,8\nhidden,64\n", "it looks like CSV; give a command line"),
        ("flag,value\n--num-experts,8\n", "rows with commas .*; it looks like CSV; give a command"),
        ("{it's\n", "no command line: No closing quotation; it looks like JSON"),
    ],
)
def test_a_file_without_flags_is_named_for_its_kind(text, says, tmp_path):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=says):
        flags_in_file(tmp_path / "x")


def test_variables_of_a_shell_may_be_values_alone():
    check_variables(["--data-path", "$DATA", "--split", "99,1,0", "--price", "5$"])
    for words in (["$A"], ["--x", "${A[@]}"], ["--x", "1", "`pwd`"], ["--x", "1", "$(pwd)"]):
        with pytest.raises(ValueError, match="shell variables are not expanded; put `echo` before"):
            check_variables(words)


@pytest.mark.parametrize(
    "pattern",
    ["([0]*3+[1]*58)", "[0]*04+[1]*4", "([0,1]*15+[1])*2", "2", "[]", "*.weight", "1e-5"],
)
def test_patterns_of_layers_may_be_evaluated(pattern):
    check_patterns(["--moe-layer-freq", pattern])


@pytest.mark.parametrize(
    "pattern", ["2**9", "[0]*99999999", "[0]*" + "9" * 5000, "([1]*8)*9999999"]
)
def test_patterns_that_would_take_all_memory_are_refused(pattern):
    with pytest.raises(ValueError, match="at most some thousand layers"):
        check_patterns([f"--moe-layer-freq={pattern}"])


def test_a_line_loses_flags_with_their_values():
    words = "--a 1 2 --b --c=3 --d -1 --ab 4".split()
    assert without(words, ("--a", "--c")) == ["--b", "--d", "-1", "--ab", "4"]
