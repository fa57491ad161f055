"""The convergence benchmark notices runs that do not learn as stock does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import convergence
from benchmarks.convergence_results import (
    checks,
    rows,
)
from benchmarks.convergence_runs import AUX, AUX_LOSSES, FSEP, NO_AUX, POINTS, STOCK, WAYS, Run

STEPS = 10 * POINTS
SKEWED = [700, 200, 75, 25]
EVEN = [260, 250, 250, 240]

Runs = dict[tuple[str, str], Run]


def alike() -> Runs:
    """Make good runs: FSEP is as far from stock as stock with other roundings is."""
    rng = np.random.default_rng(0)
    curve = 2 + np.exp(-np.arange(STEPS) / 20)
    runs = {}
    for way in WAYS:
        for aux in AUX_LOSSES:
            moved = 0 if way == STOCK else rng.permutation([2, -2, 0, 0])
            losses = curve + (0 if way == STOCK else rng.normal(scale=0.01, size=STEPS))
            tokens_E = np.array(SKEWED if aux == NO_AUX else EVEN)
            placed = [1.01] if way == FSEP else [1.8]
            runs[way, aux] = Run(
                losses=losses.tolist(),
                max_over_mean=placed * STEPS,
                stock_max_over_mean=[1.8] * STEPS,
                validation=losses[:: STEPS // POINTS].tolist(),
                expert_tokens=[[(tokens_E + moved).tolist()] * 2] * POINTS,
                layouts=STEPS - 1 if way == FSEP else 0,
                fresh_layouts=0.1 if way == FSEP else 0.0,
                wall_s=60.0,
            )
    return runs


def missed(runs: Runs) -> list[str]:
    return [check.sentence for check in checks(runs) if not check.holds]


def test_all_holds_of_runs_that_learn_alike() -> None:
    assert missed(alike()) == []


def _shifted(values: list[float]) -> list[float]:
    return [value + 0.1 for value in values]


@pytest.mark.parametrize(
    "what, change",
    [
        ("training", lambda run: replace(run, losses=_shifted(run.losses))),
        ("validation", lambda run: replace(run, validation=_shifted(run.validation))),
        ("experts", lambda run: replace(run, expert_tokens=[[[250, 250, 250, 250]] * 2] * POINTS)),
        ("layouts", lambda run: replace(run, layouts=0)),
        ("over ranks", lambda run: replace(run, max_over_mean=[1.1] * STEPS)),
    ],
)
def test_fsep_that_is_further_from_stock_is_told(what: str, change: Callable[[Run], Run]) -> None:
    runs = alike()
    runs[FSEP, NO_AUX] = change(runs[FSEP, NO_AUX])
    found = missed(runs)
    assert found and all(what in sentence or "auxiliary" in sentence for sentence in found)


def test_an_auxiliary_loss_without_effect_is_told() -> None:
    runs = alike()
    for way in WAYS:
        runs[way, AUX] = replace(runs[way, AUX], expert_tokens=runs[way, NO_AUX].expert_tokens)
    assert missed(runs) == ["the auxiliary loss evens out the use of experts"]


def test_runs_that_a_file_has_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.json"
    expected = alike()
    asked: list[Any] = []

    class Pool:
        def __init__(self, _: int) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def run(self, _: object, flags: list[str], steps: int, **__: object) -> list[Run]:
            asked.append((flags, steps))
            return [[*expected.values()][len(asked) - 1]]

    monkeypatch.setattr(convergence, "RankPool", Pool)
    words = ["--steps", str(STEPS), "--json", str(path)]
    assert convergence.main(words) == 0
    assert len(asked) == len(expected) == len(rows(expected))
    assert len({" ".join(flags) for flags, _ in asked}) == len(expected)
    assert convergence.main(words) == 0
    assert len(asked) == len(expected)
    assert convergence.read(path, STEPS) == expected
    assert "MISSED" not in capsys.readouterr().out

    with pytest.raises(ValueError, match="has runs with other settings; name another"):
        convergence.main(["--steps", str(2 * STEPS), "--json", str(path)])


def test_steps_that_make_no_windows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convergence.main(["--steps=15"])
    assert "'15' is no number of steps; give a multiple of 10" in capsys.readouterr().err
