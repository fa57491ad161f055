"""Compare random legal combinations of settings with stock Megatron, on gloo ranks.

Each case prints a line; the exit code is 1 if one is beyond its bound, or FSEP fails where stock
trains.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from itertools import count, islice
from pathlib import Path

from megatron_laer.cpu.ranks import RankPools
from tests.parity.random.generator import draw
from tests.parity.random.judge import Verdict, judge
from tests.parity.random.settings import SETTINGS
from tests.text_data import write_text_data

# At once, as in the tests.
_RANKS = 8


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.random", description=__doc__)
    parser.add_argument("--cases", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="these cases alone")
    parser.add_argument("--having", metavar="FEATURE", help="cases with this feature alone")
    options = parser.parse_args(arguments)
    if options.having is not None and options.having not in SETTINGS:
        parser.error(f"--having {options.having}: give one of {', '.join(SETTINGS)}")
    seeds = options.only or count(options.seed)
    drawn = (case for case in map(draw, seeds) if options.having in (None, *case.features))
    cases = drawn if options.only else islice(drawn, options.cases)

    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder, RankPools(_RANKS) as ranks:
        data = str(Path(folder) / "text")
        write_text_data(data)
        for case in cases:
            judgement = judge(case, ranks, data)
            verdicts.append(judgement.verdict)
            print(judgement, flush=True)
    counts = Counter(verdicts)
    found = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    print(f"{counts.total()} cases: {'; '.join(found)}")
    return int(any(verdict.is_fault for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
