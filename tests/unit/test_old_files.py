"""Today's commands read files of version 0.1, and names have not changed since."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.config import FSEPConfig
from megatron_laer.fsep_flags import add_arguments
from tests.old_files import FOLDER, copied
from tests.processes import python_path

# Fields of a plan that are measured when it is made.
MEASURED = ("plan_ms", "gate_ms")


def run(*words: object) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *map(str, words)],
        env=os.environ | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"},
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_checkpoint_and_its_planners_state_are_inspected(tmp_path: Path) -> None:
    report = run("megatron_laer", "inspect", copied(tmp_path / "old") / "checkpoint")
    assert "experts.linear_fc1.weight: 2 layers, 4 experts of 16 x 8" in report
    assert "experts.linear_fc2.weight: 2 layers, 4 experts of 8 x 8" in report
    assert "(exp_avg, exp_avg_sq)" in report
    assert (
        "planner, group 0: N = 2 ranks, C = 3 slots, E = 4 experts; goes on with step 4, layout "
        "version 3, plans not in force yet from steps 3\n"
    ) in report
    assert report.count("replicas per expert") == 2
    assert report.count("replicas per expert 2 2 1 1") == 2


def test_recorded_routing_is_planned_for_a_clusters_constants(tmp_path: Path) -> None:
    def content(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text())
        for row in found["rows"]:
            for name in MEASURED:
                assert row.pop(name) >= 0
        return found

    made = tmp_path / "plan.json"
    sizes = "--hidden 8 --ffn 8 --strategy static greedy".split()
    run("megatron_laer", "plan", "routing", "--cluster", "cluster.yaml", *sizes, "--json", made)
    found, expected = content(made), content(FOLDER / "plan.json")
    rows, expected_rows = found.pop("rows"), expected.pop("rows")
    # All of 0.1's sizes are there; newer ones may follow.
    sizes_found, sizes_expected = found.pop("expert_sizes"), expected.pop("expert_sizes")
    assert sizes_found | sizes_expected == sizes_found
    assert found | expected == found
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for name, value in expected_row.items():
            # Exchanges have a price for packing since.
            is_number = isinstance(value, int | float)
            assert row[name] == (pytest.approx(value, rel=1e-4) if is_number else value), name


def test_a_dataset_has_the_bytes_that_it_had(tmp_path: Path) -> None:
    run("megatron_laer", "prepare-data", "--input", "text.jsonl", "--output", tmp_path / "text")
    for ending in ("bin", "idx"):
        made = tmp_path / f"text.{ending}"
        assert made.read_bytes() == (FOLDER / f"text.{ending}").read_bytes()


def test_a_models_configuration_is_turned_into_flags() -> None:
    flags = f" {run('megatron_laer', 'flags', 'model.yaml').strip()} "
    for part in ("--num-layers 4", "--swiglu", "--moe-router-topk 2", "--vocab-size 257"):
        assert f" {part} " in flags


def test_a_log_is_read_back() -> None:
    table = run("megatron_laer.telemetry.log", "fsep=training.log")
    (steps,) = (line for line in table.splitlines() if line.startswith("steps in the log"))
    (loss,) = (line for line in table.splitlines() if line.startswith("loss of its last step"))
    assert (steps.split()[-1], loss.split()[-1]) == ("6", "4.9658")


def test_flags_have_the_names_defaults_and_choices_that_they_had() -> None:
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    defaults = FSEPConfig()
    found = {
        action.option_strings[0]: {
            "default": getattr(defaults, action.dest.removeprefix("fsep_"), action.default),
            "choices": action.choices and list(action.choices),
            "type": getattr(action.type, "__name__", None),
        }
        for action in parser._actions
    }
    expected = json.loads((FOLDER / "names.json").read_text())["flags"]
    # Newer flags and choices may follow.
    for flag, then in expected.items():
        old = then["choices"]
        if old is not None:
            found[flag]["choices"] = [word for word in found[flag]["choices"] if word in old]
        assert found[flag] == then
