"""Checks of the files and folders that a configuration names, before a run begins.

No recording is read, and none opened for writing: `runtime` checks their contents.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_laer.config import FSEPConfig, flag_name
from megatron_laer.files.checks import is_same_file, quoted, refuse_unusable_folder
from megatron_laer.planner.cluster_files import load_cluster

# Files in a folder of recorded layouts, one per FSEP group.
RECORDED_LAYOUTS = "group-*.jsonl"

# Folders that a run writes to. They may be one folder, since their files' names differ.
WRITTEN = ("record_layouts", "record_trace", "record_metrics", "timeline")


def check(config: FSEPConfig) -> None:
    """Refuse files and folders that the run could not use; create none."""
    if config.cluster is not None:
        try:
            load_cluster(config.cluster)
        except (OSError, ValueError) as error:
            raise ValueError(f"--fsep-cluster {quoted(config.cluster)}: {error}") from error
    if config.replay_layouts is not None:
        _check_replay(config.replay_layouts)
    if config.replay_layouts is not None and config.record_layouts is not None:
        _refuse_recording_over_replay(config.replay_layouts, config.record_layouts)
    for name in WRITTEN:
        folder = getattr(config, name)
        if folder is not None:
            refuse_unusable_folder(folder, flag_name(name))


def _check_replay(given: str) -> None:
    folder = Path(given)
    problem = None
    if not given:
        problem = "the path is empty"
    elif not os.path.exists(folder):  # pathlib's raises for a too long name
        problem = "no such folder"
    elif not folder.is_dir():
        problem = "is no folder"
    elif not any(folder.glob(RECORDED_LAYOUTS)):
        problem = f"holds no {RECORDED_LAYOUTS}"
    if problem:
        raise ValueError(
            f"--fsep-replay-layouts {quoted(given)}: {problem}; give a folder that "
            "--fsep-record-layouts wrote, where this rank can read it"
        )


def _refuse_recording_over_replay(replayed: str, recorded: str) -> None:
    """Refuse to overwrite the replayed recording, also through links of a folder or a file."""
    is_same = is_same_file(replayed, recorded) or any(
        is_same_file(file, Path(recorded) / file.name)
        for file in Path(replayed).glob(RECORDED_LAYOUTS)
    )
    if is_same:
        raise ValueError(
            f"--fsep-record-layouts {quoted(recorded)} would write over the input of "
            f"--fsep-replay-layouts {quoted(replayed)}; record to another folder"
        )
