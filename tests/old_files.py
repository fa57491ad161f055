"""Files that version 0.1 wrote, in `files_of_0_1`; make.sh there says how they were made."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "files_of_0_1"

# The run had six steps; the checkpoint is of the fourth.
STEPS, SAVED = 6, 4


def copied(target: Path) -> Path:
    """A copy of the files, the checkpoint unpacked, for runs that go on with them."""
    shutil.copytree(FOLDER, target)
    with tarfile.open(target / "checkpoint.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target


def logged_losses() -> list[float]:
    """The loss of every step of the run."""
    text = (FOLDER / "training.log").read_text()
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", text)]
