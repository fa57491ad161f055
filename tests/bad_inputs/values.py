"""Wrong values: of the commands' options by their types, of FSEP's settings, paths and variables.

Rows are places for a value and columns values; daily tests try every sixteenth pair of a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_laer.config import FSEPConfig, setting, types_of, words_of
from megatron_laer.files.checks import one_line
from tests.bad_inputs.case import Case
from tests.bad_inputs.inputs import HUGE

SHOWN = 40
_EVERY = 16

# Control characters, a title, backspaces, marks of direction and halves of characters.
_FORGED = (
    "a\x1b[2J\x1b]0;FAKE\x07\nFAKE  ok\r\b\x0c\x9b31m\x7f\t",
    "a\u202e\u2066\u200b\u2028\ue000\udce9\udcff",
)
_NUMBERS = ("", "-7", "0x10", "7,8", "9" * 5000, "nan", "inf", "[7]", "$(touch ran)", *_FORGED)
INTEGERS = (
    *_NUMBERS,
    *(" ", " 7 ", "7\n", "+7", "-", "1_0", "1e1", "7.0", "\u0667", "\uff17", "\u00b2"),
    *(str(10**18), str(2**63), "0" * 400 + "x"),
)
FRACTIONS = (
    *_NUMBERS,
    " 7 ",
    "1_0",
    "\uff17",
    "-nan",
    "-inf",
    "1e999",
    "1e308",
    "0x1p3",
    "1.5.2",
    "50%",
    "1h",
)
RANGES = ("0:3", "3-1", f"0-{'9' * 20}", "0-2000000", "a-b", "5")
OF_TYPES = {
    "between": INTEGERS,
    "number": FRACTIONS,
    "rank_range": RANGES,
    "path": ("", "-"),
}
# Options whose texts are files, folders or names, tried below.
_FREE = ("FILE", "NAME|YAML", "PREFIX", "bytes|NAME", "NAME", "CHECKPOINT", "SCRIPT")


def excluded(action: argparse.Action) -> Sequence[str]:
    """Return the texts that an argument's type excludes; AssertionError for a type without any."""
    if action.nargs == 0:
        return ()
    if action.choices:
        return "moon", "", str(next(iter(action.choices))).upper(), *_FORGED
    kind = getattr(action.type, "__qualname__", "").partition(".")[0]
    assert kind in OF_TYPES or action.metavar in _FREE, (action.dest, kind)
    return OF_TYPES.get(kind, ())


_NO_INTEGERS = (
    *("x", "nan", "1.5", "9" * 21, "", " 7", "1_0", "1e1", "\uff17", "7,8", "+-7", "[7]"),
    *("0x10", "0b11"),
)
_NO_FRACTIONS = ("x", "nan", "inf", "", "0x1p3", "1_0", "\uff17", "1.5.2", "50%", "1h", "--1")


def settings() -> Iterator[tuple[str, str]]:
    """Yield FSEP's settings with a value that no field takes, and a part of the message."""
    for field in dataclasses.fields(FSEPConfig):
        name, kind = field.name, types_of(field.name)[0]
        if words_of(name) or name == "planner":
            yield setting(name, "pigeon"), "pigeon"
        elif kind is not str:
            for value in _NO_INTEGERS if kind is int else _NO_FRACTIONS:
                yield setting(name, value), setting(name, value)
            for bound, step in (("minimum", -1), ("maximum", 1)):
                if (found := field.metadata[bound]) is not None:
                    beyond = setting(name, kind(found.value + step))
                    yield beyond, beyond


# Values for any argument that is a path, by the name of a file that `make` writes or Linux has.
NAMES = (
    *_FORGED,
    *("y" * 300, "d/" * 2500 + "x", "\u6f22" * 100, " ", "~nobody-there/x", "$(touch ran)"),
    *("../../../../../nothing-there", "%s%n{0}{x}", "http://localhost:1/x"),
)
SPECIAL = (
    *("", "pipe", "socket", "dangling", "loop", "good.txt/x"),
    *("/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem", "/proc/self/pagemap"),
)
CONTENTS = (
    *("random.bin", "zeros.bin", "empty.txt", "sparse.bin", "utf16.txt", "returns.txt"),
    *("one-line.txt", "escapes.txt", "archive.zip", "page.html"),
)
_MODEL = "--model mixtral-8x7b-e8k2 --node-size 2"
_ADVISED = "--model mixtral-8x7b-e8k2 --cluster h100-8 --gpus 4"
# Arguments that are read. One with ./ accepts names of shipped files as well.
READ = (
    "plan {}",
    "plan good.trace --cluster ./{}",
    "plan good.trace --config ./{}",
    f"simulate {{}} {_MODEL}",
    "simulate good.trace --model ./{}",
    f"simulate good.trace {_MODEL} --cluster ./{{}}",
    f"advise {{}} {_ADVISED}",
    "report {}",
    "report measured --cluster ./{}",
    "flags ./{}",
    "inspect {}",
    "prepare-data --input {} --output out/read",
    "prepare-data --input good.txt --tokenizer {} --output out/read",
    "check-recipe {}",
    "check-recipe ./{}.yaml",
    "calibrate out/c.yaml --config ./{}",
    "megatron_laer/telemetry/log.py a={}",
    "benchmarks/planner.py --quick --trace {}",
    "benchmarks/validate_simulator.py --no-here --cluster {}",
    "benchmarks/host_path.py --before {}",
)
# Arguments for folders or scripts, tried without contents, which could be accepted.
READ_NAMES = (
    "train {}",
    "benchmarks/validate_simulator.py --no-here --published {}",
    "scripts/paper/figure8.py --toy --collect --work-dir out/paper --published {}",
    "scripts/paper/figure11.py --here --work-dir out/paper --published {}",
)
# These accept any content: a text, a command line, a script, which fails as Python does.
_TAKEN = {
    "prepare-data --input {} --output out/read": {*CONTENTS} - {"empty.txt", "sparse.bin"},
    "train {}": {"/proc/self/mem", "/proc/self/pagemap"},
}
NO_FOLDERS = tuple(f"{name}/x" for name in _FORGED)
UNWRITABLE = (
    *("y" * 300, "d/" * 2500 + "x", "good.txt/x", "/proc/x", "/proc/self/x", "loop/x"),
    *("dangling/x", "/dev/full/x"),
)
# Arguments for written files. The suffix is the argument's.
WRITTEN = (
    "plan good.trace --homes {}.json",
    "plan good.trace --json {}.json",
    f"simulate good.trace {_MODEL} --json {{}}.json",
    f"advise good.trace {_ADVISED} --json {{}}.json",
    "report good.trace --out {}.html",
    "calibrate {}.yaml",
    "benchmarks/planner.py --quick --trace few.npz --json {}.json",
    "benchmarks/validate_simulator.py --no-here --json {}.json",
    "benchmarks/convergence.py --json {}.json",
    "benchmarks/end_to_end.py --json {}.json",
)
MADE = (
    "prepare-data --input good.txt --output {}",
    "benchmarks/gpu/__main__.py --dry-run --output {}/y",
    "scripts/paper/figure9.py --toy --work-dir {}/y",
    "scripts/paper/figure11.py --here --work-dir {}/y",
    "scripts/quickstart.py --work-dir {}/y",
)


def paths() -> Iterator[Case]:
    for places, values in (
        (READ, NAMES + SPECIAL + CONTENTS),
        (READ_NAMES, NAMES + SPECIAL),
        (WRITTEN, NO_FOLDERS + UNWRITABLE),
        (MADE, UNWRITABLE),
    ):
        for row, place in enumerate(places):
            for column, path in enumerate(values):
                if path not in _TAKEN.get(place, ()):
                    is_whole = path.startswith(("/", "~"))
                    by_name = place.replace("./{}", "{}") if is_whole else place
                    words = [word.replace("{}", path) for word in by_name.split(" ")]
                    yield Case(tuple(words), _part(path), nightly=(row + column) % _EVERY != 0)


def _part(path: str) -> str:
    """Return a part of a path as messages show it."""
    if path.startswith("d/d/"):
        return "d/d/d"
    if path in UNWRITABLE + NO_FOLDERS:
        path = path.removesuffix("/x")  # the folder is the bad part
    return one_line(":1/x" if path.startswith("http://") else path)[:SHOWN]


_RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
_BY_NODE = {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2"}
_CONNECTIONS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
_SBATCH = ("scripts/slurm/pretrain.sbatch", "train.py")
# Variables that have a whole number, with the command that reads them and its status.
VARIABLES = (
    *((("calibrate", "out/c.yaml"), _RANKS, name, 2) for name in _RANKS),
    *((("doctor",), _RANKS, name, 1) for name in (*_RANKS, "LOCAL_WORLD_SIZE")),
    (("doctor",), _RANKS, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
    (("doctor",), _BY_NODE, "SLURM_STEP_TASKS_PER_NODE", 1),
    (("doctor",), _CONNECTIONS, "CUDA_DEVICE_MAX_CONNECTIONS", 1),
)
# The shell refuses these before Python starts.
_NO_NUMBERS = ("x", "-1", "1.5", "1e3", " 7", "08", "0x10", "9" * 30, "\uff17", "a[$(touch ran)]")
_NUMBERS_OF_JOBS = ("GPUS_PER_NODE", "MASTER_PORT", "MARGIN_MIN", "MAX_REQUEUES", "MAX_RESTARTS")
_DEVICES = ("tpu", "CPU", "", " cpu", "cpu\n", "c" * 5000, *_FORGED)


def variables() -> Iterator[Case]:
    for row, (words, others, name, status) in enumerate(VARIABLES):
        for column, value in enumerate(INTEGERS):
            # Without a world size there are no ranks.
            if (status, name, value) != (2, "WORLD_SIZE", ""):
                is_nightly = (row + column) % 4 != 0
                yield Case(words, name, others | {name: value}, status, nightly=is_nightly)
    for row, name in enumerate(_NUMBERS_OF_JOBS):
        for column, value in enumerate(_NO_NUMBERS):
            given = {"DRY_RUN": "1", name: value}
            yield Case(_SBATCH, f"{name}={value}", given, nightly=(row + column) % 4 != 0)
    for value in _DEVICES:
        given = {"MEGATRON_LAER_DEVICE": value}
        yield Case(("train", "script.py"), "MEGATRON_LAER_DEVICE=", given)


def make(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        # A path of a socket may have a hundred bytes only.
        place = os.open(folder, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{place}/socket")
        os.close(place)
    (folder / "dangling").symlink_to("nowhere/at/all")
    (folder / "random.bin").write_bytes(bytes(byte * 37 % 251 for byte in range(4096)))
    (folder / "zeros.bin").write_bytes(bytes(4096))
    (folder / "sparse.bin").touch()
    os.truncate(folder / "sparse.bin", HUGE)
    (folder / "utf16.txt").write_bytes("a: 1\n".encode("utf-16"))
    (folder / "returns.txt").write_bytes(b"a\rb\rc\r")
    (folder / "one-line.txt").write_bytes(b"x" * 2**20)
    (folder / "escapes.txt").write_bytes(b"\x1b[2J\x1b]0;FAKE\x07\n\x9b31m\n")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("x", "x")
    (folder / "page.html").write_text("<html><script>alert(1)</script></html>\n")
