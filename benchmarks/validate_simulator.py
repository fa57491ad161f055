"""Compares `simulate`'s predictions with measured times: `python -m benchmarks.validate_simulator`.

Here: the end-to-end benchmark on two ranks of this machine, after its constants were measured.
Published: the cells of LAER-MoE's artifact, if its files are there. `docs/predict.md` has the
expected results, and the limits of these comparisons.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a file

from benchmarks import measured_cells
from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.published_cells import PRIORS, Constants, Fit, Published, fit, model_of
from benchmarks.published_files import (
    END_TO_END,
    FIT_MODELS,
    Cell,
)
from benchmarks.report import machine, print_table
from megatron_laer.files.checks import quoted, refuse_overwriting
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.tools.cli.argument_types import path

# Relative difference from which on a pair of times is expected in order.
_TOLD_APART = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the requested parts; return 1 if nothing could be compared."""
    parser = parser_of("benchmarks.validate_simulator", __doc__)
    add_json(parser)
    parser.add_argument("--published", type=path, help="the folder with laer_ae_*.csv")
    parser.add_argument("--quick", action="store_true", help="few cells, small sizes: that it runs")
    parser.add_argument("--no-here", action="store_true", help="measure nothing on this machine")
    parser.add_argument("--cluster", type=path, help="of `calibrate` here, which else runs first")
    options = parser.parse_args(arguments)
    inputs = [given for given in (options.published, options.cluster) if given is not None]
    if options.json is not None:
        refuse_overwriting(options.json, inputs, "--json")
    if options.cluster is not None:
        load_cluster(options.cluster)
    of = None
    if options.no_here and options.published is None:
        raise ValueError("nothing to compare: give --published, or leave --no-here out")
    if options.published is not None:
        if not options.published.is_dir():
            raise ValueError(
                f"--published {quoted(options.published)} is no folder; give one that is"
            )
        if (options.published / END_TO_END).exists():
            of = Published(options.published, quick=options.quick)
        else:
            print(f"no published cells: {quoted(options.published)} has no {END_TO_END}")
    result: dict[str, Any] = {"here": [], "published": [], "machine": machine()}
    if not options.no_here:
        result["here"] = measured_cells.compare(quick=options.quick, cluster=options.cluster)
        _report_here(result["here"])
    if of is not None:
        result |= published(of)
    write_json(options.json, result)
    return 0 if result["here"] or result["published"] else 1


def _report_here(rows: Sequence[dict[str, Any]]) -> None:
    """Print this machine's configurations, and the accuracy of those not calibrated on."""
    unseen = [row for row in rows if not row["calibrated"]]
    print_table([{**row, "error": row["predicted_s"] / row["measured_s"] - 1} for row in rows])
    near = sum(abs(row["predicted_s"] / row["measured_s"] - 1) <= 0.1 for row in unseen)
    right, pairs = _pairs([(row["measured_s"], row["predicted_s"]) for row in unseen])
    print(f"{near} of {len(unseen)} that were not calibrated on are within 10 %")
    print(f"{right} of {pairs} pairs that differ by over 5 % are in the right order\n")


def _pairs(times: Sequence[tuple[float, float]], apart: float = _TOLD_APART) -> tuple[int, int]:
    """Count the pairs in the right order, and those that are measurably apart."""
    told = [
        (one, other)
        for one, other in combinations(times, 2)
        if max(one[0], other[0]) > (1 + apart) * min(one[0], other[0])
    ]
    right = sum((one[0] < other[0]) == (one[1] < other[1]) for one, other in told)
    return right, len(told)


def published(of: Published) -> dict[str, Any]:
    """Fit on Mixtral-8x7B's cells, predict all, and print scores next to priors and FLOPs."""
    found = _fitted(of)
    rows = []
    for cell in of.cells:
        low_s, high_s = of.range(cell, found.constants)
        rows.append(
            {
                "cell": cell.name,
                "method": cell.method,
                "measured_s": cell.measured_s,
                "predicted_s": of.predict(cell, found.constants),
                "low_s": low_s,
                "high_s": high_s,
                "naive_s": naive_seconds(cell, of.cells),
                "prior_s": of.predict(cell, PRIORS),
                "fitted": cell.is_fitted,
            }
        )
    print_table(
        [
            {**row, "error": row["predicted_s"] / row["measured_s"] - 1}  # as a share
            for row in rows
        ]
    )
    scores = score(rows)
    print_table(scores)
    print_table([asdict(found.constants)])
    return {"published": rows, "scores": scores, "constants": asdict(found)}


def _fitted(of: Published) -> Fit:
    """Fit on Mixtral-8x7B's cells; auxiliary losses of 0 and 1e-4 are alike to the simulator."""
    cells = [cell for cell in of.cells if cell.is_fitted]
    return fit(
        lambda at: np.array([of.predict(cell, at) for cell in cells]),
        np.array([cell.measured_s for cell in cells]),
        Constants(backward=1.3, drift=0.3, kappa=1.3),
    )


def naive_seconds(cell: Cell, cells: Sequence[Cell]) -> float:
    """Scale the measured Mixtral-8x7B cell of the same method by FLOPs: one constant for each."""
    like = next(model for model in FIT_MODELS if model.endswith(cell.family))
    same = next(
        other
        for other in cells
        if (other.model, other.method, other.aux_loss) == (like, cell.method, cell.aux_loss)
    )
    flops = [model_of(model).flops_per_token for model in (cell.model, like)]
    return same.measured_s * flops[0] / flops[1]


def score(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return errors by group of cells, and the number of method pairs in the right order."""
    groups = {
        "fitted (Mixtral-8x7B)": [row for row in rows if row["fitted"]],
        "unseen, Qwen-8x7B": [row for row in rows if "qwen" in row["cell"]],
        "unseen, Mixtral-8x22B": [row for row in rows if "8x22b" in row["cell"]],
        "unseen": [row for row in rows if not row["fitted"]],
    }
    found = []
    for name, of_group in groups.items():
        line: dict[str, Any] = {"cells": name, "points": len(of_group)}
        for what in ("predicted_s", "prior_s", "naive_s"):
            errors = [abs(row[what] / row["measured_s"] - 1) for row in of_group]
            line[what.replace("_s", "_mape")] = float(np.mean(errors))
            line[what.replace("_s", "_max")] = float(np.max(errors))
        right = pairs = told_right = told = 0
        differences = []
        for cell in {row["cell"] for row in of_group}:
            times = [
                (row["measured_s"], row["predicted_s"]) for row in of_group if row["cell"] == cell
            ]
            for apart in (0.0, _TOLD_APART):
                good, of_all = _pairs(times, apart)
                if apart:
                    told_right, told = told_right + good, told + of_all
                else:
                    right, pairs = right + good, pairs + of_all
            differences += [
                abs((one[1] - other[1]) - (one[0] - other[0]))
                for one, other in combinations(times, 2)
            ]
        line |= {
            "pairs_right": f"{right}/{pairs}",
            "pairs_over_5_percent": f"{told_right}/{told}",
            "difference_error_s": float(np.mean(differences)),
        }
        found.append(line)
    return found


if __name__ == "__main__":
    program("python -m benchmarks.validate_simulator", main)
