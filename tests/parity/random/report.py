"""Lines about random cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.parity.random.judge import Judgement, Verdict

REPEAT = "python -m tests.parity.random --only {}"


def line(judgement: Judgement) -> str:
    case = judgement.case
    parts = [f"{case.seed}: {judgement.verdict}", ", ".join(case.features)]
    for name in ("distance", "floor", "explained"):
        if (found := getattr(judgement, name)) is not None:
            parts.append(f"{name} {found}")
    parts += [text for text in (judgement.near_ties, judgement.message) if text]
    parts.append(f"{judgement.processor_s:.1f} s of processor")
    if judgement.verdict.is_fault:
        parts.append(f"again: {REPEAT.format(case.seed)}")
    return " | ".join(parts)


def summary(verdicts: Iterable[Verdict]) -> str:
    counts = Counter(verdicts)
    found = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    return f"{counts.total()} cases: {'; '.join(found)}"
