"""Compares the balance of planners on a routing trace: `python -m benchmarks.planner --help`.

Everything runs here, in one process on one thread: our strategies with exact quotas, and rivals
with their own splitting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.balance import balance
from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, print_table
from benchmarks.trace_cases import Trace
from megatron_laer.files.checks import refuse_overwriting
from megatron_laer.tools.cli.argument_types import between, path

# Stride of `--quick`'s cases; prime, so that it meets all layers and microbatches.
QUICK_STRIDE = 37


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.planner", __doc__)
    parser.add_argument("--trace", type=path, required=True, help="npz with tokens [I, L, N, M, E]")
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK_STRIDE}th case")
    parser.add_argument(
        "--offset", type=between(0, QUICK_STRIDE - 1), default=0, help="first case of --quick"
    )
    options = parser.parse_args(arguments)
    if options.json is not None:
        refuse_overwriting(options.json, [options.trace], "--json")
    trace = Trace(options.trace)
    cases = trace.cases(*((QUICK_STRIDE, options.offset) if options.quick else (1, 0)))
    if not cases:
        raise ValueError(f"--offset {options.offset}: {options.trace} has no case from there on")
    print(json.dumps(machine()))
    rows = []
    for row in balance(trace, cases):
        rows.append(asdict(row))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print_table(rows)
    write_json(options.json, {"machine": machine(), "balance": rows})
    return 0


if __name__ == "__main__":
    program("python -m benchmarks.planner", main)
