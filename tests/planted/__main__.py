"""Plant each deliberate fault in a copy of the tree and run the tests that must notice it.

    python -m tests.planted [--only TEXT]

Tests that compare texts with the code are left out: only what the fault breaks may give it away.
Ends with 1 if a fault is not found or does not fit the code, or if its test fails without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.documents import ROOT
from tests.planted.faults import FAULTS, Fault, MisfitError, planted

_FOUND = 1


def copy_of_tree(folder: Path) -> Path:
    """Copy what git tracks or would track, and the native core."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    native = (ROOT / "megatron_laer" / "planner").glob("_native*.so")
    names = [*filter(None, listed.split("\0")), *(str(path.relative_to(ROOT)) for path in native)]
    for name in names:
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def status_of(tests: tuple[str, ...], tree: Path, *options: str) -> int:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPYCACHEPREFIX", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", *options]
    marks = ["-m", "not gpu and not nightly and not texts"]
    return subprocess.run(
        [*command, *marks, *tests], cwd=tree, env=environment, capture_output=True
    ).returncode


def outcome_of(fault: Fault, tree: Path) -> str:
    """Plant a fault, run its tests, and remove it; then the test that failed must pass."""
    path = tree / "megatron_laer" / fault.file
    content = path.read_text()
    try:
        changed = planted(fault, content)
    except (MisfitError, SyntaxError) as error:
        return f"does not fit: {error}"
    path.write_text(changed)
    status = status_of(fault.tests, tree, "--cache-clear")
    path.write_text(content)
    if status != _FOUND:
        return f"missed (status {status})"
    sound = status_of(fault.tests, tree, "--last-failed", "--last-failed-no-failures=none")
    return "found" if sound == 0 else f"fails without it ({sound})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name or file has this text")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if args.only in fault.name or args.only in fault.file]
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_tree(Path(folder))
        for fault in chosen:
            outcome = outcome_of(fault, tree)
            found += outcome == "found"
            print(f"{outcome:26} {fault.file:42} {fault.name}", flush=True)
    print(f"{found} of {len(chosen)} faults were found")
    return 0 if found == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
