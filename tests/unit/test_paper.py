"""The paper's experiments: reading runs and published files, and their tables."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.published_files import (
    END_TO_END,
    Cell,
    read_ablation,
    read_breakdown,
    read_cells,
    read_tokens,
)
from benchmarks.published_table import positive, read_rows, text
from megatron_laer.files.checks import quoted
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS, RECORDED_OF_STEPS
from megatron_laer.telemetry.metrics_file import METRICS, MetricsWriter, Shape
from scripts.paper import figure8, figure9, figure10, published
from scripts.paper.experiments import LAER, STATIC, STOCK, Case, Run
from scripts.paper.measured import Measured, Profile, read_log, read_profile
from scripts.paper.runner import Found
from tests import shared_data
from tests.bad_inputs.published import tables
from tests.costs import COSTS

needs_files = shared_data.needs(published.END_TO_END)
E8K2 = "mixtral-8x7b-e8k2"


def log_line(step: int, of: int, time_ms: float, loss: float, more: str = "") -> str:
    return (
        f" [2026-01-01 00:00:00] iteration {step:8d}/{of:8d} | consumed samples: {step} | "
        f"elapsed time per iteration (ms): {time_ms} | lm loss: {loss:.6E} | {more}"
    )


def test_a_whole_log_is_read_and_the_first_steps_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    imbalance = "fsep_load_imbalance: 1.500 | fsep_stock_load_imbalance: 1.700 |"
    times_ms = {1: 9000.0, 2: 100.0, 3: 300.0}
    lines = [log_line(step, 3, ms, 5 - step, imbalance) for step, ms in times_ms.items()]
    path.write_text("\n".join(["something else", *lines]))
    found = read_log(path, 3)
    assert found.step_s == [9.0, 0.1, 0.3] and found.losses == [4.0, 3.0, 2.0]
    assert found.seconds(1) == pytest.approx(0.2)
    assert found.balance(1) == 1.5


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "0 of 3 steps"),
        ([log_line(step, 3, 1.0, 1.0) for step in (1, 2)], "2 of 3 steps"),
        ([log_line(step, 4, 1.0, 1.0) for step in (1, 2, 3, 4)], "4 of 3 steps"),
        ([log_line(step, 3, 1.0, 1.0).replace("lm", "no") for step in (1, 2, 3)], "without a loss"),
    ],
)
def test_a_log_that_is_not_whole_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    path = tmp_path / "a.log"
    with pytest.raises(ValueError, match="a: no log at"):
        read_log(path, 3)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"a: .*{said}"):
        read_log(path, 3)


def test_a_profile_is_the_mean_of_later_steps(tmp_path: Path) -> None:
    shape = Shape(num_ranks=2, num_experts=8, capacity=5, node_size=2, layers=("layer 1",))
    writer = MetricsWriter(METRICS.path(tmp_path, 0), shape, {}, 0, COSTS.cluster)
    for step, scale in enumerate((100.0, 1.0, 3.0)):
        of_step = dict.fromkeys(RECORDED_OF_STEPS, scale) | {"step": step}
        of_layers = {name: [scale] for name in RECORDED_OF_LAYERS}
        of_layers |= {"passes": [1], "stock_max_over_mean": [math.nan if step == 1 else 1.5]}
        writer.append(of_step, {}, of_layers, np.array([[8, 8]]))
    writer.close()
    found = read_profile(tmp_path, 1)
    assert found.kinds == pytest.approx((4e-3, 2e-3, 2e-3))  # dispatch and combine; experts; step
    assert found.exposed_s == pytest.approx(4e-3)
    assert (found.max_over_mean, found.stock_max_over_mean) == (2.0, 1.5)
    with pytest.raises(ValueError, match="no step after the first 3"):
        read_profile(tmp_path, 3)


def measured(step_s: float, steps: int = 3) -> Measured:
    return Measured([1.0] * steps, [step_s] * steps, [1.2] * steps)


@needs_files
def test_figure_8_has_the_papers_speed_beside_ours() -> None:
    runs = [Run(E8K2, case) for case in figure8.EXPERIMENT.cases]
    ended = {Run(E8K2, Case(STOCK)): measured(3.0), Run(E8K2, Case(LAER)): measured(2.0)}
    (table,) = figure8.tables(Found(ended, {}, runs, 1, shared_data.FOLDER))
    rows = {(row["aux"], row["ours"]): row for row in table.rows}
    assert len(table.rows) == 10
    laer = rows["0", "laer"]
    assert laer["speed"] == 1.5 and laer["max/mean"] == 1.2
    # 43.38 s over 26.33 s.
    assert laer["paper s, wikitext"] == pytest.approx(26.33, abs=0.01)
    assert laer["paper speed, wikitext"] == pytest.approx(1.65, abs=0.01)
    assert rows["0", "fsep"]["s"] is None and rows["1e-4", "laer"]["speed"] is None
    flex = rows["0", None]
    assert flex["paper"] == "FLEX" and flex["s"] is None and flex["paper s, wikitext"] > 20


def test_figure_9_answers_at_which_speed_the_low_loss_is_had() -> None:
    def curve(step_s: float, slope: float) -> published.Curve:
        return published.Curve([10 - slope * step for step in range(100)], [step_s] * 100)

    cases = dict.fromkeys(figure9.EXPERIMENT.cases)
    high, low, fsep = cases
    found = figure9.answer({high: curve(1.2, 0.05), low: curve(2.0, 0.1), fsep: curve(1.0, 0.1)})
    speed_high, speed_low, less_high, less_low, error, sooner = found.values()
    assert error == 0.0
    assert speed_high == pytest.approx(1.2) and speed_low == pytest.approx(2.0)
    # Means of each one's last ten.
    assert less_high == pytest.approx(0.05 * 94.5) and less_low == pytest.approx(0.0)
    # 10 - 0.05 * 94.5 is FSEP's mean over ten steps that end with number 51.75: the 53rd.
    assert sooner == pytest.approx(120 / 53)
    assert set(figure9.answer({fsep: curve(1.0, 0.1)}).values()) == {None}
    # A loss that is not reached.
    *_, sooner = figure9.answer({high: curve(1.0, 0.2), fsep: curve(1.0, 0.1)}).values()
    assert sooner is None


@needs_files
def test_figure_10_has_shares_speeds_and_layers_next_to_the_papers() -> None:
    runs = [Run(E8K2, Case(method)) for method in (STATIC, LAER)]
    profiles = {
        Run(E8K2, Case(STATIC)): Profile(4.0, 3.0, 0.0, 10.0, 1.5, 1.5, [1.4, 1.6]),
        Run(E8K2, Case(LAER)): Profile(2.0, 3.0, 0.0, 8.0, 1.1, 1.5, [1.1, 1.2]),
    }
    made = figure10.tables(Found({}, profiles, runs, 1, shared_data.FOLDER))
    _, exchanges, _, layers = (table.rows for table in made)
    laer = next(row for row in exchanges if row["ours"] == "laer")
    assert (laer["share"], laer["speed"]) == (0.25, 2.0)
    assert laer["paper share"] == pytest.approx(0.286, abs=1e-3)
    assert laer["paper speed"] == pytest.approx(1.74, abs=0.01)
    assert (layers[1]["static"], layers[1]["laer"], layers[2]["laer"]) == (1.6, 1.2, None)
    assert len(layers) == 32 and all(row["paper FLEX"] > 1 for row in layers)


def test_rows_are_read_by_column_whatever_their_order(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\ufefftime,more,name\r\n2.5,,"a, b"\r\n3,x,c\r\n')
    found = read_rows(path, {"name": text, "time": positive}, key=("name",))
    assert found == [{"name": "a, b", "time": 2.5}, {"name": "c", "time": 3.0}]


READERS = {
    END_TO_END: read_cells,
    published.CONVERGENCE: published.read_curves,
    published.PLANNER: published.read_planner,
    published.ABLATION: read_ablation,
    published.BREAKDOWN: read_breakdown,
    published.TOKENS[0]: partial(read_tokens, windows={"e8k2": slice(2, 10)}),
}


def refused(folder: Path, file: str, lines: list[str]) -> str:
    (folder / file).write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError) as error:
        READERS[file](folder)
    return str(error.value)


@pytest.mark.parametrize("file", READERS)
def test_a_whole_table_is_read_and_every_value_is_checked(file: str, tmp_path: Path) -> None:
    header, first, *rest = lines = tables()[file]
    (tmp_path / file).write_text("\n".join(lines))
    assert READERS[file](tmp_path)
    for place, column in enumerate(header.split(",")):
        # The tokens' model is in the file's name.
        if (file, column) == (published.TOKENS[0], "model_name"):
            continue
        for wrong in ("", "\x1b[31m") if column in NAMES else ("-1", "nan", "soon", "9e999"):
            cells = first.split(",")
            cells[place] = wrong
            said = refused(tmp_path, file, [header, ",".join(cells), *rest])
            assert f"line 2: {column} must be a " in said and f", got {quoted(wrong)}" in said
    said = refused(tmp_path, file, [*lines, first])
    assert f"line {len(lines) + 1}: " in said and "is there twice; remove one of them" in said


NAMES = ("dataset", "method", "model_name")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "line 1: the columns are ''"),
        (["method,avg_time_ms"], "the table holds no rows"),
        (["a,b"], "line 1: the columns are 'a,b', expected one 'method'"),
        (["method,avg_time_ms", "LAER"], "line 2: 1 values, expected 2"),
        (["method,avg_time_ms", '"LAER'], "not CSV"),
        (["method,avg_time_ms", "x" * 200_000 + ",1"], "not CSV: field larger than field limit"),
        (["method,avg_time_ms", "\0,1"], "method must be a name"),
    ],
)
def test_a_table_that_is_none_is_refused(lines: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, published.ABLATION, lines)


def test_tables_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    lines = tables()[published.TOKENS[0]]
    says = "LAER has 10239 counts, expected one for each layer"
    assert says in refused(tmp_path, published.TOKENS[0], lines[:-1])
    lines = [*tables()[published.CONVERGENCE], "FLEX,0.01,3,4,900"]
    assert "FLEX with auxiliary loss 0.01 has 1 steps" in refused(
        tmp_path, published.CONVERGENCE, lines
    )


def test_published_cells_and_tokens_keep_their_places(tmp_path: Path) -> None:
    for file in (END_TO_END, published.TOKENS[0]):
        (tmp_path / file).write_text("\n".join(tables()[file]))
    cells = read_cells(tmp_path)
    assert len(cells) == 48
    assert cells[0] == Cell("wikitext", "mixtral-8x7b-e8k2", "0.0", "megatron", 20.0)
    tokens = read_tokens(tmp_path, {"e8k2": slice(2, 10)})
    assert {key: found.shape for key, found in tokens.items()} == {
        ("e8k2", method): (32, 8, 32) for method in ("FSDP", "FLEX", "LAER")
    }
    assert tokens["e8k2", "LAER"][3, 4, 5] == 905
