"""A `Case` is one command line that cannot work, or that must not do harm, and its judgement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.bad_inputs.forks import Ended

_LONGEST = 2500
_RECORDINGS = ("plan", "simulate", "advise", "report")


@dataclass(frozen=True)
class Case:
    """One bad input, with a part of the message that quotes it and the command's status.

    The status is not 2 where the input is odd and the command answers, and None where it either
    refuses or answers with a warning, which quotes as well. Cases that are `nightly` are many and
    similar.
    """

    words: tuple[str, ...]
    says: str
    environment: dict[str, str] = field(default_factory=dict)
    status: int | None = 2
    nightly: bool = False

    @property
    def kind(self) -> str:
        """Return the part of the project that reads the input."""
        command = self.words[0] if self.words else ""
        if command in ("train", "check-recipe") or command.endswith(".sbatch"):
            return "training"
        return "recordings" if command in _RECORDINGS else "commands"

    @property
    def key(self) -> tuple[object, ...]:
        return self.words, tuple(sorted(self.environment.items()))


def problems(case: Case, ended: Ended) -> Iterator[str]:
    if ended.limit:
        yield f"stopped by {ended.limit}"
    is_either = case.status is None
    if ended.status not in ((0, 1, 2) if is_either else (case.status,)):
        yield f"status {ended.status}"
    if "Traceback" in ended.errors:
        yield "a traceback"
    is_refused = (ended.status if is_either else case.status) == 2
    # Without the further lines of a message of argparse.
    lines = [line for line in ended.errors.splitlines() if not line.startswith((" ", "usage:"))]
    # A warning may come before a message.
    if is_refused and len(lines) not in ((1, 2) if is_either else (1,)):
        yield f"messages: {len(lines)}"
    if case.says not in ("" if is_refused or is_either else ended.output) + ended.errors:
        yield f"does not say {case.says!r}"
    is_script = case.words[:1] == ("train",)  # which may print anything
    printed = ended.errors if is_script else ended.errors + ended.output
    if not printed.replace("\n", "").isprintable():
        yield "control characters"
    if is_refused and not is_script:
        if ended.output:
            yield f"prints {ended.output[:200]!r}"
        if len(ended.errors) > _LONGEST:
            yield f"{len(ended.errors)} characters"


def failures(cases: Sequence[Case], ended: Sequence[Ended]) -> Iterator[str]:
    """Yield a text on each case that ended wrongly."""
    for case, end in zip(cases, ended, strict=True):
        if found := list(problems(case, end)):
            words = " ".join(case.words)[-300:]
            yield f"{words!r} {case.environment}: {'; '.join(found)}\n    {end.errors[-600:]!r}"
