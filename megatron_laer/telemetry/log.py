"""Lines of a training log: FSEP's own, steps of Megatron's, and a table that compares runs.

    python -m megatron_laer.telemetry.log fsep=FSEP.log standard=STANDARD.log

prints the table for runs that have ended; a run in several parts may have one log.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_laer.files.checks import in_one_line, lines, one_line, open_input

# Share of all steps after which routing and speed are steady enough to be averaged.
STEADY_AFTER = 0.5

LOSS = "lm loss"
STEP_MS = "elapsed time per iteration (ms)"
IMBALANCE = "fsep_load_imbalance"
STOCK_IMBALANCE = "fsep_stock_load_imbalance"
# Name of the run's number, which FSEP prints before the first step.
RUN = "fsep_run"
_RUN = re.compile(rf"\b{RUN} ([0-9a-f]{{16}})\b")

_LABEL_WIDTH, _COLUMN_WIDTH = 46, 10
_SKIPPED = "-"


@dataclass(frozen=True)
class Step:
    """One step of Megatron's log, counted from 1; `values` are by Megatron's names.

    `run` is the number of the FSEP run that the log named last; None before any.
    """

    number: int
    of: int
    values: dict[str, float]
    run: str | None = None


@dataclass
class LoggedRun:
    """Steps of a run by number, as in its log; a step repeated after a restart counts once."""

    name: str
    of: int = 0
    steps: dict[int, Step] = field(default_factory=dict)


def say(text: str) -> None:
    """Print a line by one write: with two, another rank's text may come before its end."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def step_of_line(line: str, run: str | None = None) -> Step | None:
    """Parse the step of a line of Megatron's log; return None for other lines."""
    found = re.search(r"\biteration +(\d{1,18})/ *(\d{1,18}) \|(.*)", line)
    if found is None:
        return None
    values = {}
    # `name: value |`, as Megatron and its metrics trackers write them. A regular expression would
    # take time quadratic in a line's length.
    for part in found[3].split("|")[:-1]:
        name, _, value = part.rpartition(": ")
        try:
            values[name.strip()] = float(value)
        except ValueError:  # e.g. a time of day
            continue
    return Step(int(found[1]), int(found[2]), values, run)


def read_run(name: str, text: Iterable[str]) -> LoggedRun:
    run, number = LoggedRun(name), None
    for line in text:
        if RUN in line and (named := _RUN.search(line)):
            number = named[1]
        if (step := step_of_line(line, number)) is not None:
            run.steps[step.number] = step
            run.of = step.of
    return run


def read_log(name: str, path: Path) -> LoggedRun:
    with open_input(path) as file:
        return read_run(name, (line.decode(errors="replace") for line in lines(file, path)))


def steady(values: Sequence[float]) -> Sequence[float]:
    return values[int(len(values) * STEADY_AFTER) :]


def window(iterations: Sequence[int]) -> range:
    """Return the iterations over which a run is averaged; they are given in order."""
    late = iterations[int(len(iterations) * STEADY_AFTER) :]
    return range(late[0], late[-1] + 1) if late else range(0)


def in_words(iterations: range) -> str:
    """Return a window as text, in Megatron's counting from 1."""
    first, last = iterations[0], iterations[-1]
    return f"iterations {first} to {last}" if last > first else f"iteration {first}"


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:{_LABEL_WIDTH}}" + "".join(f"{cell:>{_COLUMN_WIDTH}}" for cell in cells)

    return "\n".join([line("", heads), *(line(*row) for row in rows)])


def comparison(runs: Sequence[LoggedRun]) -> str:
    """Return a table of runs that trained the same model on the same data."""
    steady_iterations = in_words(window(range(1, max(run.of for run in runs) + 1)))

    def values(run: LoggedRun, name: str) -> list[float]:
        steps = (run.steps[key] for key in sorted(run.steps))
        return [step.values[name] for step in steps if name in step.values]

    def steady_mean(found: list[float]) -> str:
        return f"{statistics.fmean(steady(found)):.3f}" if found else _SKIPPED

    # Stock has no metric of balance. An FSEP run also measures its own tokens under stock's
    # placement, and both route alike at the same loss.
    as_stock = next((found for run in runs if (found := values(run, STOCK_IMBALANCE))), [])
    losses = [values(run, LOSS) for run in runs]
    rows: list[tuple[str, Sequence[str]]] = [
        ("steps in the log", [f"{len(run.steps)}" for run in runs]),
        ("loss of its last step", [f"{found[-1]:.4f}" if found else _SKIPPED for found in losses]),
        (
            f"max/mean tokens per rank, {steady_iterations}",
            [steady_mean(values(run, IMBALANCE) or as_stock) for run in runs],
        ),
        (
            f"step time, median of {steady_iterations} (ms)",
            [
                f"{statistics.median(steady(found)):.0f}" if found else _SKIPPED
                for found in (values(run, STEP_MS) for run in runs)
            ],
        ),
    ]
    return table([run.name for run in runs], rows)


def main(words: Sequence[str]) -> int:
    """Print the comparison of `NAME=LOG` words; return 2 for invalid ones."""
    runs = []
    try:
        for word in words:
            name, equals, path = word.partition("=")
            if not (name and equals and path):
                raise ValueError(f"{word!r} is no NAME=LOG")
            runs.append(read_log(name, Path(path)))
            if not runs[-1].steps:
                raise ValueError(
                    f"{path} holds no step of a run; give a log of Megatron's training"
                )
        if not runs:
            raise ValueError("give a NAME=LOG for each run")
    except (ValueError, OSError) as error:
        print(one_line(f"megatron_laer.telemetry.log: {in_one_line(error)}"), file=sys.stderr)
        return 2
    print(comparison(runs))
    print(
        "Balance: 1.000 is perfect, the number of ranks the worst. A run that does not measure it\n"
        "  has what FSEP's run counted for stock's placement of its own tokens."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
