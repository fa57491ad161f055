"""Checks of the files and folders that a configuration names, before a run begins.

No recording is opened: `runtime` checks their contents.
"""

from __future__ import annotations

from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import problem_of, refuse_unusable_folder
from megatron_laer.planner.cluster_files import load_cluster

# Folders that a run writes to. They may be one folder, since their files' names differ.
WRITTEN = ("record_layouts", "record_trace", "record_metrics")


def check(config: FSEPConfig) -> None:
    """Refuse files and folders that the run could not use; create none."""
    if config.cluster is not None:
        try:
            load_cluster(config.cluster)
        except (OSError, ValueError) as error:
            raise ValueError(problem_of("--fsep-set cluster=", config.cluster, error)) from error
    for name in WRITTEN:
        folder = getattr(config, name)
        if folder is not None:
            refuse_unusable_folder(folder, "--fsep-record")
