"""Lines about random cases: for people, and for a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def entry(judgement: Judgement) -> str:
    case, row = judgement.case, judgement.case.row
    found: dict[str, Any] = {
        "seed": case.seed,
        "verdict": judgement.verdict.name,
        "features": case.features,
        "flags": row.flags.strip(),
        "without": row.without,
        "fsep": row.fsep.strip(),
        "ranks": row.ranks,
        "experts": row.experts,
        "expert_parallel": row.expert_parallel,
        "stock_parallel": row.stock_parallel,
        "accumulation": row.accumulation,
        "capacity": row.capacity,
        "near_ties": judgement.near_ties,
        "message": judgement.message,
        "processor_s": round(judgement.processor_s, 2),
    }
    for name in ("distance", "floor", "explained"):
        distance = getattr(judgement, name)
        found[name] = None if distance is None else distance.parts()
    return json.dumps(found)


def seeds_in(file: Path) -> set[int]:
    """Return the seeds of a file's cases; none if there is no file."""
    if not file.exists():
        return set()
    lines = file.read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["seed"] for line in lines}


def summary(verdicts: Iterable[Verdict]) -> str:
    counts = Counter(verdicts)
    told = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    return f"{counts.total()} cases: {'; '.join(told)}"
