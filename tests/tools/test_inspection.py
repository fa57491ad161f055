"""`inspect` reports a checkpoint's content in one process, and runs nothing that it contains."""

from __future__ import annotations

import collections
import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import metadata

from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.planning.planner_checkpoint import state_path
from megatron_laer.tools import cli, inert_pickle, inspection
from megatron_laer.tools.inert_pickle import Name, read
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
    assert inspection.describe(run / "iter_0000007") == report.rstrip("\n")


def test_empty_slots_are_counted(run):
    layouts = tuple(ExpertLayout.at_home(3, 3, 6) for _ in LAYERS)
    forecasts = (SmoothedForecast(),) * len(LAYERS)
    state = make_state(layouts=layouts, forecasts=forecasts, plans=())
    write_state(run, state.to_bytes())
    text = "replicas per expert 1 1 1 1 1 1; 3 of 9 slots empty"
    assert inspection.describe(run).count(text) == len(LAYERS)


def test_a_damaged_state_is_part_of_the_report(run):
    assert "no state" in inspection.describe(run)
    write_state(run, make_state().to_bytes()[:-1])
    assert "planner, group 3: is damaged or cut off" in inspection.describe(run)
    write_state(run, make_state().to_bytes())
    path = Path(state_path(str(run / "iter_0000007"), 3))
    os.truncate(path, 2**40)
    assert "planner, group 3: has 1099511627776 bytes, its header says " in inspection.describe(run)
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe; give a regular file" in inspection.describe(run)


def write_list(run: Path, name: str, size: torch.Size) -> None:
    of_type = metadata.TensorProperties(dtype=torch.float32)
    tensors = {name: metadata.TensorStorageMetadata(of_type, size, [])}
    data = pickle.dumps(metadata.Metadata(tensors))
    (run / "iter_0000007" / ".metadata").write_bytes(data)


def test_names_of_tensors_cannot_forge_lines_of_the_report(run):
    name = "\x1b[31m\nFAKE LINE.mlp.experts.experts.linear_fc1.weight"
    write_list(run, name, torch.Size([2, 6, 8, 4]))
    report = inspection.describe(run)
    assert "FAKE" in report and "\x1b" not in report and "\nFAKE" not in report


def test_huge_sizes_are_told_exactly(run):
    write_list(run, "x", torch.Size([2**62, 2**62]))
    report = inspection.describe(run)
    assert f"1 tensors, {2**124:,} elements, {2**126:,} bytes (float32)" in report


CASES = 300


@pytest.mark.counts(fuzz_cases=CASES)
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


class Thing:
    def __new__(cls, *arguments: object) -> Thing:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[object, ...]:
        return 1, "a"

    def __init__(self) -> None:
        self.size = (1, 2)
        self.itself = self


THING = Name(Thing.__module__, "Thing")


def anything(name: Name) -> bool:
    return True


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back_from_every_binary_protocol(protocol):
    values: Any = {
        "numbers": [0, -1, 255, 65536, 2**40, -(2**200), 1.5],
        "texts": ["", "é", "x" * 300],
        "constants": (None, True, False),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "mapping": collections.OrderedDict(a={"b": {}}),
    }
    assert read(pickle.dumps(values, protocol), anything) == values


def test_objects_are_records_of_what_would_have_made_them():
    found = read(pickle.dumps([Thing(), Thing]), anything)
    record, name = found
    assert (record.name, record.arguments, name) == (THING, (1, "a"), THING)
    assert record.state["size"] == (1, 2)
    assert record.state["itself"] is record


def test_entries_with_other_keys_than_texts_are_left_out():
    assert read(pickle.dumps({"a": 1, 2: 3, (4,): 5}), anything) == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x80\x04", b"\xff", pickle.dumps([1])[:-1], b"\x80\x04.", b"\x80\x04t."),
        *(b"\x80\x04)]KxKys.", b"\x80\x04\x8a\xff.", b"\x80\x04X\xff\xff\xff\xff."),
        # Calls or changes of objects other than names.
        *(
            b"\x80\x04KxK\x01\x85R.",
            b"\x80\x04}(Kxu.",
            b"Pid\n.",
            b"\x80\x04cpathlib\nPath\n}X\1\0\0\0aK\1sb.",
        ),
        b"\x80\x05\x96" + b"\xff" * 8 + b".",
    ],
)
def test_damage_and_unknown_operations_are_value_errors(data):
    with pytest.raises(ValueError):
        read(data, anything)


def test_the_number_of_operations_is_limited(monkeypatch):
    monkeypatch.setattr(inert_pickle._Operations, "left", 1000)
    read(b"]" * 999 + b".", anything)
    with pytest.raises(ValueError, match="operations"):
        read(b"]" * 1000 + b".", anything)


PICKLES = 1000


@pytest.mark.counts(fuzz_cases=PICKLES)
def test_only_value_errors_come_out_of_damaged_pickles():
    whole = pickle.dumps({"a": [Thing(), collections.OrderedDict(b=1)], "c": (1.5, None, "d" * 9)})
    luck = random.Random(4)
    refused = 0
    for _ in range(PICKLES):
        try:
            read(damaged(whole, luck), anything)
        except ValueError:
            refused += 1
    assert refused > PICKLES // 2
