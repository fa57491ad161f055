"""`inspect` reports a checkpoint's content in one process, and runs nothing that it contains."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import metadata

from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.planning.planner_checkpoint import state_path
from megatron_laer.tools import cli, inspection
from tests.fuzz import damaged
from tests.planner_states import LAYERS, make_state

EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
BIASES = "decoder.layers.mlp.experts.experts.linear_fc1.bias"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    tensors = {
        "embedding.word_embeddings.weight": torch.zeros(16, 4, dtype=torch.bfloat16),
        EXPERTS: torch.zeros(2, 6, 8, 4, dtype=torch.bfloat16),
        BIASES: torch.zeros(2, 6, 8, dtype=torch.bfloat16),
        f"optimizer.state.exp_avg.{EXPERTS}": torch.zeros(2, 6, 8, 4),
    }
    with warnings.catch_warnings(action="ignore"):
        torch_checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path


def write_state(run: Path, data: bytes) -> None:
    path = Path(state_path(str(run / "iter_0000007"), 3))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def test_a_run_and_its_checkpoint_are_described(run, capsys):
    write_state(run, make_state().to_bytes())
    assert cli.main(["inspect", str(run)]) == 0
    report = capsys.readouterr().out
    for expected in (
        "iter_0000007",
        "3 tensors, 544 elements, 1,088 bytes (bfloat16)",
        "vocabulary 16, hidden 4",
        f"{EXPERTS}: 2 layers, 6 experts of 8 x 4\n",
        f"{BIASES}: 2 layers, 6 experts of 8\n",
        "1 tensors, 1,536 bytes (exp_avg)",
        "planner, group 3: N = 4 ranks, C = 3 slots, E = 6 experts; goes on with step 8, layout "
        "version 5, plans not in force yet from steps 6, 7",
        "layer 2: replicas per expert",
        "mtp 1: replicas per expert",
    ):
        assert expected in report
    assert inspection.describe(run / "iter_0000007")[0] == report.rstrip("\n")


def test_empty_slots_are_counted(run):
    layouts = tuple(ExpertLayout.at_home(3, 3, 6) for _ in LAYERS)
    forecasts = (SmoothedForecast(),) * len(LAYERS)
    state = make_state(layouts=layouts, forecasts=forecasts, plans=())
    write_state(run, state.to_bytes())
    text = "replicas per expert 1 1 1 1 1 1; 3 of 9 slots empty"
    assert inspection.describe(run)[0].count(text) == len(LAYERS)


def test_a_damaged_state_is_part_of_the_report(run):
    assert "no state" in inspection.describe(run)[0]
    write_state(run, make_state().to_bytes()[:-1])
    assert "planner, group 3: the state is damaged or cut off" in inspection.describe(run)[0]
    write_state(run, make_state().to_bytes())
    path = Path(state_path(str(run / "iter_0000007"), 3))
    os.truncate(path, 2**40)
    says = "planner, group 3: the state, record 6 at byte"
    assert says in inspection.describe(run)[0]
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe; give a regular file" in inspection.describe(run)[0]


def test_groups_are_shown_up_to_a_number_and_damage_ends_with_status_1(run, capsys):
    folder = Path(state_path(str(run / "iter_0000007"), 0)).parent
    folder.mkdir()
    for group in range(30):
        content = make_state().to_bytes()
        (folder / f"group-{group}.bin").write_bytes(content if group % 3 else content[:-1])
    assert cli.main(["inspect", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.count("planner, group ") == 16
    assert "12 more groups with a whole state" in out and "2 more groups with a damaged" in out
    assert "planner, group 21: the state is damaged" in out and "planner, group 22:" not in out


def write_list(run: Path, name: str, size: torch.Size) -> None:
    of_type = metadata.TensorProperties(dtype=torch.float32)
    tensors = {name: metadata.TensorStorageMetadata(of_type, size, [])}
    data = pickle.dumps(metadata.Metadata(tensors))
    (run / "iter_0000007" / ".metadata").write_bytes(data)


def test_names_of_tensors_cannot_forge_lines_of_the_report(run):
    name = "\x1b[31m\nFAKE LINE.mlp.experts.experts.linear_fc1.weight"
    write_list(run, name, torch.Size([2, 6, 8, 4]))
    report = inspection.describe(run)[0]
    assert "FAKE" in report and "\x1b" not in report and "\nFAKE" not in report


def test_huge_sizes_are_told_exactly(run):
    write_list(run, "x", torch.Size([2**62, 2**62]))
    report = inspection.describe(run)[0]
    assert f"1 tensors, {2**124:,} elements, {2**126:,} bytes (float32)" in report


CASES = 300


def test_only_value_errors_come_out_of_a_damaged_list_of_tensors(run):
    path = run / "iter_0000007" / ".metadata"
    data = path.read_bytes()
    luck = random.Random(2)
    refused = 0
    for _ in range(CASES):
        path.write_bytes(damaged(data, luck))
        try:
            inspection.describe(run)
        except ValueError:
            refused += 1
    assert refused > CASES // 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_list_of_any_binary_protocol_is_read(run, protocol):
    path = run / "iter_0000007" / ".metadata"
    expected = inspection.describe(run)[0]
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
    assert inspection.describe(run)[0] == expected
