"""Tables of recipes are judged row by row, and the page has our recipes' verdicts."""

from __future__ import annotations

import json
from collections import Counter

from megatron_laer.tools import cli
from megatron_laer.tools.recipes.bridge_table import COLUMNS, judge_recipe, read_recipes
from megatron_laer.tools.recipes.proof import proved_rows
from megatron_laer.tools.recipes.verdict import Verdict
from tests import shared_data
from tests.recipes_page import LIST, PAGE, judged, tables
from tests.tools.test_recipes import NAME, NONE


def csv_of(*rows: dict[str, str]) -> str:
    cells = [[f'"{row[name]}"' for name in COLUMNS] for row in rows]
    return "\n".join(",".join(line) for line in [list(COLUMNS), *cells]) + "\n"


def test_a_table_is_judged_into_json(tmp_path, capsys):
    """A row that cannot be judged does not keep others from it."""
    table, output = tmp_path / "recipes.csv", tmp_path / "out.json"
    rows = [{"force_balance": "True"}, {"EP": "1"}, {"cuda_graph_impl": "local"}, {"pool": "rl"}]
    table.write_text(csv_of(*(NONE | row for row in rows)))
    words = ["check-recipe", "--bridge-csv", str(table), "--json", str(output)]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    runs, alone, _, unjudged, counts, lost, assumed = said.out.splitlines()
    assert runs.startswith(f"runs        {NAME}  (no row for ") and alone == f"set-ep      {NAME}"
    assert unjudged.startswith(f"not judged  recipe '{NAME}': pool 'rl': unknown")
    expected = "1 runs, 1 set-ep, 1 speed-only, 0 precision, 0 refused, 1 not judged"
    assert counts == expected
    assert lost == "the speed-up of the flags that 1 drop is lost, and no figure weighs it"
    assert assumed.startswith("those that run do so if the recipe sets none of: expert_tensor")
    assert "1 of 4 recipes cannot be judged, the first: recipe '" in said.err
    assert said.err.count("\n") == 1
    first, second, third, fourth = json.loads(output.read_text())
    keys = "recipe verdict proved_by on_replacements no_row no_row_together because drop allow"
    assert set(first) == set(second) == {*keys.split(), "if_none_of"}
    assert (first["recipe"], first["verdict"]) == (NAME, "runs")
    proved = [row.features for row in proved_rows() if row.name in first["proved_by"]]
    assert {"bf16", "forced balance", "fused permutation"} < frozenset().union(*proved)
    assert (first["on_replacements"], first["because"], first["drop"]) == (True, [], [])
    assert "bf16 + forced balance" in first["no_row_together"]
    assert (second["verdict"], second["proved_by"]) == ("set-ep", [])
    assert third["drop"] == ["--cuda-graph-impl"] and "speed-only" in third["because"][0]
    assert fourth["verdict"] is None and "pool 'rl': unknown" in fourth["because"][0]


def test_what_blocked_a_recipe_at_first_is_no_input(tmp_path):
    table = tmp_path / "recipes.csv"
    header, row = csv_of(NONE).splitlines()
    table.write_text(f"{header},refused_features\n{row},flex|muon|token_drop\n")
    (found,) = read_recipes(table)
    assert judge_recipe(found) == judge_recipe(NONE)


@shared_data.needs(LIST.name)
def test_the_page_has_the_verdicts_of_today():
    recipes = judged(LIST)
    page = PAGE.read_text(encoding="utf-8")
    for table in tables(recipes):
        assert "\n".join(table) in page, "python -m tests.recipes_page prints the tables of today"
    training = Counter(found.verdict for row, found in recipes if row["pool"] != "peft")
    assert training.total() == 104 and training[Verdict.SET_EP] == 9
    runs, speed_only = (training[verdict] for verdict in (Verdict.RUNS, Verdict.SPEED_ONLY))
    assert not training[Verdict.PRECISION]
    assert f"So of 104 recipes {runs} run as they are" in page
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"of 104 Megatron-Bridge recipes {runs} run as they are" in readme
    assert f"they are {runs + speed_only};" in page
    assert f"and {training[Verdict.REFUSED]} are refused" in page
