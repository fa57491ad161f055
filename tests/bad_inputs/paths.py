"""Arguments that name paths, each with every kind of bad path.

A row of the tables is an argument, a column a kind of path. Daily tests try every sixteenth pair.
"""

from __future__ import annotations

import os
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

from megatron_laer.files.checks import one_line
from tests.bad_inputs.case import Case

HUGE = 2**36
_EVERY = 16
_SHOWN = 40

ODD_NAMES = {
    "erases the screen": "\x1b[2J\x1b[31mFAKE",
    "title": "\x1b]0;FAKE\x07",
    "newline": "a\nFAKE  ok",
    "return": "a\rFAKE  ok",
    "backspaces": "a\b\b\bFAKE",
    "form feed": "a\x0cFAKE",
    "C1 control": "a\x9b31mFAKE",
    "bidi": "a\u202ecsv",
    "isolate": "\u2066a\u2069",
    "zero width": "a\u200bb",
    "line separator": "a\u2028FAKE",
    "no UTF-8": "caf\udce9",
    "surrogate half": "a\udcff\udcfeb",
    "tab": "a\tb",
    "delete": "a\x7fb",
    "private use": "a\ue000b",
    "long": "y" * 300,
    "deep": "d/" * 2500 + "x",
    "wide letters": "\u6f22" * 100,
    "formula": "=cmd|' /C calc'!A0",
    "blank": " ",
    "star": "*.nothing",
    "address": "http://localhost:1/x",
    "home": "~nobody-there/x",
    "variable": "$(touch ran)",
    "up": "../../../../../nothing-there",
    "percent": "%s%n{0}{x}",
    "backslash": "C:\\nothing",
}
# Existing entries that are no file with a fitting content; made by `make`, or on every Linux.
SPECIAL = {
    "pipe": "pipe",
    "socket": "socket",
    "zeros": "/dev/zero",
    "full": "/dev/full",
    "own input": "/dev/stdin",
    "memory": "/proc/self/mem",
    "counters": "/proc/self/pagemap",
    "dangling": "dangling",
    "loop": "loop",
    "through a file": "good.txt/x",
    "nothing": "",
}
CONTENTS = {
    "random bytes": "random.bin",
    "zero bytes": "zeros.bin",
    "no bytes": "empty.txt",
    "sparse": "sparse.bin",
    "wide": "utf16.txt",
    "returns": "returns.txt",
    "one line": "one-line.txt",
    "escapes": "escapes.txt",
    "an archive": "archive.zip",
    "a page": "page.html",
}
_MODEL = "--model mixtral-8x7b-e8k2 --node-size 2"
_ADVISED = "--model mixtral-8x7b-e8k2 --cluster h100-8"
# Arguments that are read. One with ./ accepts names of shipped files as well.
READ = (
    "plan {}",
    "plan good.trace --cluster ./{}",
    "plan good.trace --config ./{}",
    f"simulate {{}} {_MODEL}",
    "simulate good.trace --model ./{}",
    f"simulate good.trace {_MODEL} --cluster ./{{}}",
    "report {}",
    "report good.trace --compare {}",
    "report measured --cluster ./{}",
    "report good.trace --config ./{}",
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
    "prepare-data --input {} --output out/read": tuple(CONTENTS.keys() - {"no bytes", "sparse"}),
    "check-recipe {}": ("zero bytes", "no bytes", "returns", "a page"),
    "train {}": ("memory", "counters"),
}

NO_FOLDERS = {
    "escapes": "nowhere\x1b[2J/x",
    "lines": "no\nFAKE/x",
    "no UTF-8": "caf\udce9/x",
    "bidi": "a\u202e/x",
}
UNWRITABLE = {
    "long": "y" * 300,
    "deep": "d/" * 2500 + "x",
    "through a file": "good.txt/x",
    "kernel's": "/proc/x",
    "kernel's own": "/proc/self/x",
    "loop": "loop/x",
    "dangling": "dangling/x",
    "full": "/dev/full/x",
}
# Arguments for written files. The suffix is the argument's.
WRITTEN = (
    "plan good.trace --homes {}.json",
    "plan good.trace --json {}.json",
    f"simulate good.trace {_MODEL} --json {{}}.json",
    f"advise good.trace {_ADVISED} --gpus 4 --json {{}}.json",
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


def cases() -> Iterator[Case]:
    names = ODD_NAMES | SPECIAL
    for places, kinds in (
        (READ, names | CONTENTS),
        (READ_NAMES, names),
        (WRITTEN, NO_FOLDERS | UNWRITABLE),
        (MADE, UNWRITABLE),
    ):
        for row, place in enumerate(places):
            for column, (kind, path) in enumerate(kinds.items()):
                if kind not in _TAKEN.get(place, ()):
                    yield _case(place, path, nightly=(row + column) % _EVERY != 0)


def _case(place: str, path: str, *, nightly: bool) -> Case:
    words = place.split(" ")
    if path.startswith(("/", "~")):
        words = [word.replace("./{}", "{}") for word in words]
    words = [word.replace("{}", path) for word in words]
    return Case(tuple(words), _part(path), nightly=nightly)


def _part(path: str) -> str:
    """Return a part of a path as messages show it."""
    if path.startswith("d/d/"):
        return "d/d/d"
    if path in UNWRITABLE.values() or path in NO_FOLDERS.values():
        path = path.removesuffix("/x")  # the folder is the bad part
    for whole, part in (("http://", ":1/x"), ("C:\\", "nothing")):
        path = part if path.startswith(whole) else path
    return one_line(path)[:_SHOWN]


def make(folder: Path) -> None:
    """Write the files, to which those of the other tables are added."""
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
