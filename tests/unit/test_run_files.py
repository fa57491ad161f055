"""Files and folders of a configuration are refused before a run, without creating any."""

from __future__ import annotations

from pathlib import Path

from megatron_laer.config import FSEPConfig
from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from megatron_laer.support import config_files
from megatron_laer.support.config_files import WRITTEN
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE


def there(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_folders_that_can_be_used_are_taken_and_not_made(tmp_path: Path) -> None:
    before = there(tmp_path)
    config_files.check(FSEPConfig())
    config_files.check(FSEPConfig(cluster="cpu-gloo"))
    config_files.check(
        FSEPConfig(
            record_layouts=str(tmp_path),
            record_trace=str(tmp_path / "new"),
            record_metrics=str(tmp_path / "not" / "yet"),
        )
    )
    assert there(tmp_path) == before


def test_what_a_run_writes_into_one_folder_has_different_names(tmp_path: Path) -> None:
    folder = str(tmp_path)
    files = {
        LAYOUTS.path(folder, 0),
        TRACE.path(folder, 0),
        METRICS.path(folder, 0),
    }
    assert len(files) == len(WRITTEN)
