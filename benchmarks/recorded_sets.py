"""Turns files of sets into recordings for `plan --homes`: `python -m benchmarks.recorded_sets`.

A file NAME.E<experts>.k<top-k>.txt.gz has each token's experts in a line. The first half of its
tokens becomes one step, and the second another, of one layer on one source rank, with pairs and
sets.

Legend: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.command_line import parser_of, program
from megatron_laer.files.checks import refuse_unusable_folder
from megatron_laer.telemetry.trace_file import TraceWriter

_NAME = re.compile(r"(?P<name>.+)\.E(?P<experts>\d+)\.k\d+\.txt\.gz")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.recorded_sets", __doc__)
    parser.add_argument("sets", type=Path, metavar="FOLDER", help="with files of sets")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the recordings")
    options = parser.parse_args(arguments)
    refuse_unusable_folder(options.output, "OUT")
    files = {path: named for path in sorted(options.sets.glob("*")) if (named := _name(path))}
    if not files:
        raise ValueError(
            f"{str(options.sets)!r} has no file NAME.E<experts>.k<top-k>.txt.gz; give a folder "
            "with files of sets"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    for path, named in files.items():
        _record(path, named["name"], int(named["experts"]), options.output)
    print(f"{options.output}: {len(files)} recordings")
    return 0


def _name(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name)


def _record(path: Path, name: str, experts: int, folder: Path) -> None:
    with gzip.open(path, "rt") as lines:
        expert_TK = np.array([[int(word) for word in line.split()] for line in lines])
    map_TE = np.zeros((len(expert_TK), experts), dtype=np.bool_)
    np.put_along_axis(map_TE, expert_TK, True, axis=1)
    writer = TraceWriter(folder / f"{name}.trace", 1, experts, [name])
    half = len(map_TE) // 2
    for step, chosen_TE in enumerate((map_TE[:half], map_TE[half:])):
        chosen = chosen_TE.astype(np.int64)
        writer.append(step, 0, 0, chosen.sum(axis=0, keepdims=True))
        writer.append_pairs(step, 0, chosen.T @ chosen)
        writer.append_sets(step, 0, chosen_TE)
    writer.close()


if __name__ == "__main__":
    program("python -m benchmarks.recorded_sets", main)
