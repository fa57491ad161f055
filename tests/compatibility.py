"""Record of the stacks that tests passed with, and its tables on a page.

After each whole set `scripts/test.sh` calls `python -m tests.site_pages --passed TESTS`, which adds
the installed stack to tests/tested.csv.
"""

from __future__ import annotations

import csv
import dataclasses
import platform
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from megatron_laer.layer.experts.gemm.te import KNOWN as KNOWN_TRANSFORMER_ENGINES
from megatron_laer.releases import NEXT, SUPPORTED
from megatron_laer.support.torch_version import OLDEST_ON_CUDA
from tests.documents import ROOT

RECORD = ROOT / "tests" / "tested.csv"
_NOTHING = "nothing yet"
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


def versions() -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needs = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["te"]
    ranges = dict(re.fullmatch(r"([\w-]+)(?:\[.*\])?(.*)", text).groups() for text in needs)
    built = project["tool"]["cibuildwheel"]["build"]
    pythons = ", ".join(f"{tag[2]}.{tag[3:5]}" for tag in built)
    stacks = recorded()
    on_cpu = [stack for stack in stacks if not stack.cards]
    on_cards = [stack for stack in stacks if stack.cards]
    cards = sorted({p.stem.split("-")[0] for p in (ROOT / "configs" / "clusters").glob("?[0-9]*")})
    older = f"older than {OLDEST_ON_CUDA}"
    gemms = f"`--fsep-set gemm=te` with others than {KNOWN_TRANSFORMER_ENGINES}"
    te = ranges["transformer-engine"]
    yield "| | tested | expected | refused |"
    yield "|---|---|---|---|"
    for name, part, of, expected, refused in (
        ("Megatron", "megatron", stacks, SUPPORTED, f"all others; {NEXT.number} unless asked for"),
        ("Python", "python", stacks, pythons, "older, as by Megatron"),
        ("torch, CPU ranks", "torch", on_cpu, ranges["torch"], ""),
        ("torch, CUDA", "torch", on_cards, f">={OLDEST_ON_CUDA}", older),
        ("Transformer Engine", "transformer_engine", stacks, te, gemms),
        ("CUDA", "cuda", stacks, "what that torch is built with", ""),
        ("cards", "cards", stacks, ", ".join(cards).upper(), ""),
        ("communication", "communication", stacks, "nccl", ""),
        ("system", "system", stacks, "Linux on Arm too", ""),
    ):
        found = dict.fromkeys(filter(None, (getattr(stack, part) for stack in of)))
        yield "| " + " | ".join((name, ", ".join(found) or _NOTHING, expected, refused)) + " |"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
