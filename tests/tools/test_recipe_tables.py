"""The page has the verdicts of Megatron-Bridge's recipes of today."""

from __future__ import annotations

from collections import Counter

from megatron_laer.tools.recipes.verdict import Verdict
from tests import shared_data
from tests.recipes_page import LIST, PAGE, judged, tables


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
