"""Files of version 0.1 in `files_of_0_1`; make.sh there made them.

Small recordings are also turned into the form of 0.1.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

from megatron_laer.files.json_lines import unsealed
from megatron_laer.telemetry.metrics import RECORDED_LATER
from megatron_laer.telemetry.trace_file import MAGIC

FOLDER = Path(__file__).resolve().parent / "files_of_0_1"

MEGATRON = "0.19"

# The run had six steps; the checkpoint is of the fourth.
STEPS, SAVED = 6, 4


def copied(target: Path) -> Path:
    shutil.copytree(FOLDER, target)
    with tarfile.open(target / "checkpoint.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target


def logged_losses() -> list[float]:
    text = (FOLDER / "training.log").read_text()
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", text)]


def as_version_1(content: bytes) -> bytes:
    if content.startswith(MAGIC):
        return _trace_as_version_1(content)
    return b"".join(_line_as_version_1(line) for line in content.splitlines())


def _line_as_version_1(line: bytes) -> bytes:
    entry = json.loads(line)
    del entry["crc"]
    if "slots" not in entry and "num_experts" in entry:
        entry["version"] = 1
    for content in (entry, entry.get("layers")):
        if isinstance(content, dict):
            for name in RECORDED_LATER & content.keys():
                del content[name]
    if entry.get("format") == "megatron_laer-layouts":
        del entry["format"], entry["version"]
    return unsealed(entry)


def _trace_as_version_1(content: bytes) -> bytes:
    at = content.index(b"\n") + 1
    header = json.loads(content[:at])
    old = [_line_as_version_1(content[:at])]
    counts = header["num_ranks"] * header["num_experts"]
    while at < len(content):
        _, width, step, layer, microbatch, _ = struct.unpack_from("<IIqIII", content, at)
        begin, at = at + 28, at + 28 + counts * width
        rest = struct.pack("<IqII", width, step, layer, microbatch) + content[begin:at]
        old.append(zlib.crc32(rest).to_bytes(4, "little") + rest)
    return b"".join(old)
