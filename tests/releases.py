"""Facts about Megatron's releases for tests, from the table in `megatron_laer/releases.py`.

`python -m tests.site_pages` writes the table's texts into files that cannot import it. Tests are
written for the newest supported release; this module lists the gaps of the installed one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata

from megatron_laer.releases import NEXT, NUMBERS, SUPPORTED, TESTED, release_after
from tests import processes

# Texts about releases in files that cannot import the table, for the group of a pattern.
PLACES = {
    "pyproject.toml": (r'^    "megatron-core(.*?)"', SUPPORTED),
    "constraints.txt": (r"^megatron-core==(.*)$", TESTED[-1]),
    "README.md": (r"^\| Megatron \| (.*) \|$", f"{', '.join(TESTED)} | {' and '.join(NUMBERS)}"),
    "docs/internals/architecture.md": (
        r"^\| megatron-core (.*?) \|",
        f"≥ {NUMBERS[0]}, < {release_after(NUMBERS[-1])}",
    ),
}

# Fields of TransformerConfig in our tables that come and go with NEXT.
FIELDS_FROM_NEXT = {"moe_combine_bwd_dtype", "moe_dispatch_fwd_dtype", "moe_use_grouped_tensor"}
FIELDS_BEFORE_NEXT = {"moe_ncclep_static_shape"}


def release_of(version: str) -> str:
    return ".".join(version.split(".")[:2])


def installed_release() -> str:
    return release_of(metadata.version("megatron-core"))


_PROGRAM = """
import argparse, contextlib, io, json, shlex, sys
from megatron_laer.launch import prepare
prepare()
from megatron.core.package_info import __version__
from megatron.training.arguments import add_megatron_arguments

parser = add_megatron_arguments(argparse.ArgumentParser("script", allow_abbrev=False))

def complaint(line):
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            parser.parse_args(shlex.split(line))
    except SystemExit:
        return output.getvalue().splitlines()[-1]

lines = json.load(sys.stdin)
print(json.dumps([__version__, [complaint(line) for line in lines]]))
"""


def refused_flags(lines: Sequence[str]) -> dict[str, str]:
    """Return the lines of flags that the installed Megatron does not know, with its complaint.

    Check that a newer Megatron would know them.
    """
    printed = processes.python("-c", _PROGRAM, stdin=json.dumps(lines))
    version, complaints = json.loads(printed.splitlines()[-1])
    refused = {line: why for line, why in zip(lines, complaints, strict=True) if why is not None}
    release = release_of(version)
    from_next = {f"--{field.replace('_', '-')}" for field in FIELDS_FROM_NEXT}
    unexplained = {
        line: why
        for line, why in refused.items()
        if release == NEXT.number or from_next.isdisjoint(line.split())
    }
    assert not unexplained or release in NUMBERS[:-1], f"megatron-core {version}: {unexplained}"
    return refused
