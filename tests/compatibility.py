"""Record of the stacks that tests passed with, and its table on a page.

After each whole set `scripts/test.sh` calls `python -m tests.site_pages --passed TESTS`, which adds
the installed stack to tests/tested.csv.
"""

from __future__ import annotations

import csv
import dataclasses
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from tests.documents import ROOT

RECORD = ROOT / "tests" / "tested.csv"
_NONE = "–"


@dataclass(frozen=True)
class Stack:
    """Stack of a set of tests, in the order of the columns; empty where a part is missing.

    `tests` is the command of the set, `cards` are the GPUs' names.
    """

    tests: str
    megatron: str
    torch: str
    transformer_engine: str
    cuda: str
    cards: str
    communication: str
    python: str
    system: str


def here(tests: str) -> Stack:
    import torch

    from megatron_laer.megatron_version import megatron_version

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    on_cuda = bool(cards) and "--gpu" in tests
    return Stack(
        tests=tests,
        # Without the commit of the surrounding repository, which may be ours.
        megatron=Version(megatron_version()).public,
        torch=torch.__version__,
        transformer_engine=_version("transformer-engine"),
        cuda=(torch.version.cuda or "") if on_cuda else "",
        cards=", ".join(sorted({*cards})) if on_cuda else "",
        communication="nccl" if len(cards) > 1 and on_cuda else "gloo",
        python=".".join(platform.python_version_tuple()[:2]),
        system=f"{platform.system()} {platform.machine()}",
    )


def recorded(path: Path = RECORD) -> list[Stack]:
    with path.open(encoding="utf-8", newline="") as file:
        return [Stack(**row) for row in csv.DictReader(file)]


def record(stack: Stack, path: Path = RECORD) -> bool:
    """Add a stack to the record; return False if it is there already."""
    if stack in (known := recorded(path)):
        return False
    with path.open("w", encoding="utf-8", newline="") as file:
        names = [field.name for field in dataclasses.fields(Stack)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in [*known, stack])
    return True


def combinations() -> Iterator[str]:
    names = ("tests", "Megatron", "torch", "Transformer Engine", "CUDA", "cards")
    yield "| " + " | ".join((*names, "communication", "Python", "system")) + " |"
    yield "|---" * len(dataclasses.fields(Stack)) + "|"
    for stack in recorded():
        tests, *cells = dataclasses.astuple(stack)
        yield "| " + " | ".join((f"`{tests}`", *(cell or _NONE for cell in cells))) + " |"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
