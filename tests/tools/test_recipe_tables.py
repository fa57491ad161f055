"""Tables of recipes are judged row by row, and the page has our recipes' verdicts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_laer.tools import cli
from megatron_laer.tools.recipes.bridge_table import COLUMNS, judge_recipe, read_recipes
from megatron_laer.tools.recipes.verdict import Verdict
from tests.recipes_page import LIST, PAGE, judged, tables
from tests.tools.test_recipes import NAME, NONE


def csv_of(*rows: dict[str, str]) -> str:
    cells = [[f'"{row[name]}"' for name in COLUMNS] for row in rows]
    return "\n".join(",".join(line) for line in [list(COLUMNS), *cells]) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recipe,pool,EP\nx,sft,4\n", "no field dispatcher"),
        (csv_of(NONE).replace("\n", ",EP\n", 1), "recipes.csv: EP comes twice; leave one out"),
        ("{}", "no field recipe"),
        (csv_of(NONE | {"EP": "x"}), f"recipe '{NAME}': EP 'x'"),
    ],
    ids=["columns", "column twice", "JSON", "field"],
)
def test_a_table_that_is_none_is_refused(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipes.csv"
    path.write_text(text)
    assert cli.main(["check-recipe", "--bridge-csv", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_table_is_judged_into_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, output = tmp_path / "recipes.csv", tmp_path / "out.json"
    rows = [NONE | {"dispatcher": "flex"}, NONE | {"EP": "1"}, NONE | {"delay_wgrad": "True"}]
    table.write_text(csv_of(*rows))
    words = ["check-recipe", "--bridge-csv", str(table), "--json", str(output)]
    assert cli.main(words) == 0
    *_, counts, lost, assumed = capsys.readouterr().out.splitlines()
    assert counts == "1 runs, 1 set-ep, 1 speed-only, 0 precision, 0 refused"
    assert lost == "the speed-up of the flags that 1 drop is lost, and no figure weighs it"
    assert assumed.startswith("those that run do so if the recipe sets none of: expert_tensor")
    first, second, third = json.loads(output.read_text())
    assert (
        set(first)
        == set(second)
        == {*"recipe verdict proved_by on_replacements".split()}
        | {*"no_row no_row_together because drop if_none_of".split()}
    )
    assert (first["recipe"], first["verdict"], first["proved_by"]) == (NAME, "runs", None)
    assert (first["on_replacements"], first["because"], first["drop"]) == (True, [], [])
    assert "DeepEP + fused permutation" in first["no_row_together"]
    assert (second["verdict"], second["proved_by"]) == ("set-ep", None)
    assert third["drop"] == ["--delay-wgrad-compute"] and "speed-only" in third["because"][0]


def test_a_row_that_cannot_be_judged_does_not_keep_others_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = tmp_path / "recipes.csv", tmp_path / "out.json"
    table.write_text(csv_of(NONE, NONE | {"pool": "rl"}, NONE | {"EP": "1"}))
    words = ["check-recipe", "--bridge-csv", str(table), "--json", str(output)]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    runs, unjudged, alone, counts, *_ = said.out.splitlines()
    assert runs == f"runs        {NAME}" and alone == f"set-ep      {NAME}"
    assert unjudged.startswith(f"not judged  recipe '{NAME}': pool 'rl': unknown")
    assert counts.endswith("0 refused, 1 not judged")
    assert "1 of 3 recipes cannot be judged, the first: recipe '" in said.err
    assert said.err.count("\n") == 1
    found = json.loads(output.read_text())
    assert [one["verdict"] for one in found] == ["runs", None, "set-ep"]
    assert "pool 'rl': unknown" in found[1]["because"][0]


@pytest.mark.parametrize("name", ["\x1b[2J\x1b[31mFAKE\nruns  all", "\u202eevil", "a\0b\rc"])
def test_names_in_a_table_say_nothing_to_a_terminal(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "recipes.csv"
    table.write_bytes(csv_of(NONE | {"recipe": name}).encode())
    assert cli.main(["check-recipe", "--bridge-csv", str(table)]) == 0
    verdict, counts, *_ = said = capsys.readouterr().out.splitlines()
    assert verdict.startswith("runs        ") and counts.startswith("1 runs")
    assert all(line.isprintable() for line in said)


def test_what_blocked_a_recipe_at_first_is_no_input(tmp_path: Path) -> None:
    table = tmp_path / "recipes.csv"
    header, row = csv_of(NONE).splitlines()
    table.write_text(f"{header},refused_features\n{row},flex|muon|token_drop\n")
    (found,) = read_recipes(table)
    assert judge_recipe(found) == judge_recipe(NONE)


@pytest.mark.skipif(not LIST.exists(), reason=f"no table of recipes at {LIST}")
def test_the_page_has_the_verdicts_of_today() -> None:
    recipes = judged(LIST)
    page = PAGE.read_text(encoding="utf-8")
    for table in tables(recipes):
        assert "\n".join(table) in page, "python -m tests.recipes_page prints the tables of today"
    training = Counter(found.verdict for row, found in recipes if row["pool"] != "peft")
    assert training.total() == 104 and training[Verdict.SET_EP] == 9
    running = [training[verdict] for verdict in (Verdict.RUNS, Verdict.SPEED_ONLY)]
    running.append(training[Verdict.PRECISION])
    assert f"So of 104 recipes {running[0]} run as they are" in page
    assert f"they are {sum(running[:2])}, and with bf16 {sum(running)}" in page
