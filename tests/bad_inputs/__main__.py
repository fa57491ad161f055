"""Try all bad inputs, and count their ends by command: `python -m tests.bad_inputs`."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.bad_inputs import judging
from tests.bad_inputs.cases import every_case


def main() -> int:
    cases = every_case()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judging.make(folder)
        before = set(judging.content(folder))
        ended = judging.tried(folder, cases)
        changed = sorted({name for name, _ in before ^ set(judging.content(folder))})
    counts: dict[str, Counter[str]] = {"all": Counter()}
    for case in cases:
        counts.setdefault(case.command, Counter())["cases"] += 1
    for case, problems, told in judging.failures(cases, ended):
        print(told)
        for problem in problems:
            kind = next(k for k, start in judging.CLASSES.items() if problem.startswith(start))
            counts[case.command][kind] += 1
    counts["all"] = sum(counts.values(), Counter())
    kinds = ("cases", *judging.CLASSES)
    print(f"\n{'command':20}" + "".join(f"{kind:>24}" for kind in kinds))
    for command, count in counts.items():
        print(f"{command:20}" + "".join(f"{count[kind]:24}" for kind in kinds))
    print(f"\nfiles left or changed: {len(changed)} {changed[:20]}")
    return int(bool(changed) or any(counts["all"][kind] for kind in judging.CLASSES))


if __name__ == "__main__":
    sys.exit(main())
