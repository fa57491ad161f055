"""Today's runs resume from a checkpoint and recordings of version 0.1, with FSEP and stock."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as torch_checkpoint
from packaging.version import Version

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from megatron_laer.tools.traces.fsep import read_recording
from tests.checkpoints import iteration_folder
from tests.old_files import FOLDER, MEGATRON, SAVED, STEPS, copied, logged_losses
from tests.parity.row import HOMES

# Losses were printed with seven digits, and another processor rounds otherwise.
ROUNDING = 1e-4
FSEP = ("--expert-parallel-mode", "fsep", "--fsep-late-plan", "wait")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    if Version(version("megatron-core")) < Version(MEGATRON):
        pytest.skip(
            f"megatron-core {MEGATRON} wrote the checkpoint, and older releases do not read it"
        )
    return copied(tmp_path / "old")


def command(old: Path, *more: object, fsep: bool = True) -> list[str]:
    flags = (FOLDER / "flags.txt").read_text().split()
    assert tuple(flags[-len(FSEP) :]) == FSEP
    data = f"--data-path {old / 'text'} --data-cache-path {old / 'cache'} --train-iters {STEPS}"
    ours = (*FSEP, "--fsep-sharding", "rows") if fsep else ()  # there was no other one
    return [*flags[: -len(FSEP)], *ours, *data.split(), *map(str, more)]


def entries(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: entry[name] for name in entry if name != "crc"} for entry in found]


def keys(checkpoint: Path) -> set[str]:
    reader = torch_checkpoint.FileSystemReader(checkpoint)
    return set(reader.read_metadata().state_dict_metadata)


def test_a_run_is_resumed_with_its_planner_and_its_recordings(ranks: RankPools, old: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = command(
        *(old, "--load", old / "checkpoint", "--save", old / "saved", "--save-interval", STEPS),
        *("--fsep-record-layouts", old / "layouts", "--fsep-record-trace", old / "routing"),
        *("--tensorboard-dir", old / "tensorboard"),
    )
    record = ranks(2).run(train, flags)[0]
    assert record.losses == pytest.approx(logged_losses()[SAVED:], rel=ROUNDING)

    header, *recorded = entries(old / "layouts" / "group-0.jsonl")
    old_header, *steps = entries(FOLDER / "layouts" / "group-0.jsonl")
    # Steps 1 to 3 are moved aside, since they have no checksums, and step 4 has the plan in the
    # checkpoint. Step 5 is planned from the routing of step 4, which another processor may round
    # otherwise.
    assert recorded[:-1] == steps[SAVED - 1 : -1]
    assert recorded[-1]["step"] == steps[-1]["step"] == STEPS - 1
    assert header == old_header | {"format": "megatron_laer-layouts", "version": 2}
    aside = entries(old / "layouts" / "group-0.older-version.jsonl")
    assert aside == [old_header, *steps[: SAVED - 1]]
    cut_off = entries(old / "layouts" / f"group-0.cut-from-{SAVED}.jsonl")
    assert cut_off == [old_header, *steps[SAVED - 1 :]]
    for name, expected in (
        ("group-0.trace", range(SAVED, STEPS)),
        (f"group-0.cut-from-{SAVED}.trace", range(SAVED, STEPS)),
        ("group-0.older-version.trace", range(SAVED)),
    ):
        assert sorted(set(read_recording(old / "routing" / name).step_R)) == list(expected)

    saved = old / "saved"
    assert keys(iteration_folder(saved, STEPS)) == keys(iteration_folder(old / "checkpoint", SAVED))
    names = [file.relative_to(iteration_folder(saved, STEPS)) for file in saved.rglob("*.bin")]
    assert names == [Path("fsep_planner", "group-0.bin")]

    events = EventAccumulator(str(old / "tensorboard"))
    events.Reload()
    expected = json.loads((FOLDER / "names.json").read_text())["metrics"]
    assert set(expected) <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("fsep", [False, True], ids=["stock", "experts at home"])
def test_another_kind_of_run_goes_on_from_the_checkpoint(
    ranks: RankPools, old: Path, fsep: bool
) -> None:
    flags = command(old, "--load", old / "checkpoint", *(HOMES.split() if fsep else ()), fsep=fsep)
    record = ranks(2).run(train, flags)[0]
    assert record.losses == pytest.approx(logged_losses()[SAVED:], rel=ROUNDING)


def test_recorded_layouts_are_replayed(ranks: RankPools, old: Path) -> None:
    again = old / "again"
    flags = command(
        *(old, "--load", old / "checkpoint", "--fsep-replay-layouts", old / "layouts"),
        *("--fsep-record-layouts", again),
    )
    flags = [flag for flag in flags if flag not in ("--fsep-late-plan", "wait")]
    record = ranks(2).run(train, flags)[0]
    assert record.losses == pytest.approx(logged_losses()[SAVED:], rel=ROUNDING)
    steps = entries(FOLDER / "layouts" / "group-0.jsonl")
    recorded = entries(again / "group-0.jsonl")
    assert recorded[0] | steps[0] == recorded[0]
    assert recorded[-1] == steps[-1]


def test_a_timeline_names_its_events_as_it_did(ranks: RankPools, old: Path) -> None:
    def names(folder: Path) -> set[Any]:
        content = json.loads((folder / "rank-0.json").read_text())
        assert set(content) == {"displayTimeUnit", "traceEvents"}
        # Timing decides whether compute has to wait.
        return {
            (event["name"], event["ph"], event.get("cat"), event.get("tid"), tuple(sorted(event)))
            for event in content["traceEvents"]
            if not event["name"].startswith("wait: ")
        }

    shutil.rmtree(old / "timeline")
    ranks(2).run(train, command(old, "--fsep-timeline", old / "timeline"))
    assert names(old / "timeline") == names(FOLDER / "timeline")
