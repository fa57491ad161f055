"""Runs that are killed, stopped and signalled at random moments end as if undisturbed.

Damaged recordings are refused.

    python -m tests.chaos --runs 40 --seed 40

Prints a line for each run with its problems; the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.runs import chaos
from tests.text_data import write_text_data


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=40)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of runs, from 0; all if none")
    parser.add_argument("--folder", type=Path, help="for their files; a temporary one if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        data = folder / "text"
        folder.mkdir(parents=True, exist_ok=True)
        write_text_data(str(data))
        failed = chaos(args.runs, args.seed, str(data), folder, args.only)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
