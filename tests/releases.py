"""What the installed Megatron lacks: tests are written for the newest release that is supported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from packaging.version import Version

NEWEST = Version("0.19")

_PROGRAM = """
import contextlib, io, json, sys
from megatron_laer.launch import prepare
prepare()
from megatron.core.package_info import __version__
from megatron.training.arguments import parse_args

def complaint(line):
    sys.argv = ["script", *line.split()]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            parse_args()
    except SystemExit:
        return output.getvalue().splitlines()[-1]

lines = json.load(sys.stdin)
print(json.dumps([__version__, [complaint(line) for line in lines]]))
"""


def refused_flags(lines: Sequence[str]) -> dict[str, str]:
    """Of these lines of flags, those that the installed Megatron does not know, with its complaint.

    Raises:
        AssertionError: there are some, and no newer Megatron that would know them is supported.
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    version, complaints = json.loads(result.stdout.splitlines()[-1])
    refused = {line: why for line, why in zip(lines, complaints, strict=True) if why is not None}
    assert not refused or Version(version) < NEWEST, f"megatron-core {version}: {refused}"
    return refused
