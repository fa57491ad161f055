"""The parity rows of a day have the settings and pairs that published recipes have."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from unittest import mock

from megatron_laer.tools.recipes.features import features_of
from tests import bridge_table, shared_data
from tests.bridge_families import IMPLIED
from tests.durations import PARITY
from tests.parity.daily import (
    UNPUBLISHED,
    all_needed,
    cases,
    daily,
    needed,
    published_words,
    sharing,
)
from tests.parity.row import STEPS_BY_DAY, words_of
from tests.parity.rows import ALL_ROWS
from tests.parity.settings import published_entries, settings_in, settings_of
from tests.planted.faults import FAULTS
from tests.recipes_page import LIST, judged

ROWS = [row for row in ALL_ROWS if row.id in daily()]


def test_a_day_has_every_published_setting_and_the_pairs_that_count() -> None:
    assert all_needed(ROWS) == all_needed(ALL_ROWS)
    published = {word for row in ALL_ROWS for word in words_of(row.flags)} & published_words()
    assert {word for row in ROWS for word in row.values} >= published
    assert len(published) > 80
    assert all(row.id in daily() for row in ALL_ROWS if row.releases)


def test_a_day_trains_few_stock_runs_for_few_steps() -> None:
    assert len(ROWS) <= 80
    assert len({sharing()[row.id] for row in ROWS}) <= 40
    by_day = [case.row for case in cases() if case.is_daily]
    assert all(row.steps <= STEPS_BY_DAY for row in by_day if not row.evaluations)


def test_every_row_runs_whole_at_night_or_by_day() -> None:
    found = [*cases()]
    assert len({case.id for case in found}) == len(found) > len(ALL_ROWS)
    assert {case.id for case in found if case.is_daily} == daily()
    assert all(row in (case.row for case in found) for row in ALL_ROWS)


def test_rows_with_other_settings_of_fsep_share_a_stock_run() -> None:
    shared = sharing()
    assert shared["exact-home"] == shared["hybridep"] == shared["exact"]
    assert shared["exact-12"] not in (shared["exact"], shared["bf16"])


def test_what_a_row_needs_tells_shardings_apart() -> None:
    at_home = next(row for row in ALL_ROWS if row.id == "exact-home")
    parts, without = needed(at_home), needed(next(row for row in ALL_ROWS if row.id == "exact"))
    assert ("at home", "--fsep-plan-mode exact") in parts - without
    assert ("in this sharding", "--fsep-plan-mode exact", "False") in without - parts


def test_no_published_command_or_recipe_has_an_unpublished_feature() -> None:
    published = frozenset[str]().union(*_published())
    assert published & UNPUBLISHED == frozenset()
    known = {feature for row in ALL_ROWS for feature in features_of(settings_of(row))}
    assert known >= UNPUBLISHED
    assert len(known - UNPUBLISHED) > 40


@shared_data.needs(LIST.name)
def test_no_recipe_of_the_list_has_an_unpublished_feature() -> None:
    found: list[frozenset[str]] = []
    judge = bridge_table.judge

    def observed(settings: Namespace, **more: object) -> object:
        found.append(features_of(settings))
        return judge(settings, **more)  # type: ignore[arg-type]

    with mock.patch.object(bridge_table, "judge", observed):
        assert len(judged(LIST)) == len(found) > 100
    assert frozenset[str]().union(*found) & UNPUBLISHED == frozenset()


def _published() -> Iterator[frozenset[str]]:
    for entry in published_entries():
        if "flags" in entry:
            flags = entry["flags"].replace("--cuda-graph-scope", "--cuda-graph-modules")
            yield features_of(settings_in(flags.split()))
    for implied in IMPLIED:
        yield features_of(Namespace(**implied.settings))


def test_the_rows_that_find_a_fault_run_each_day() -> None:
    for fault in FAULTS:
        *_, option, words = ("", "", *fault.tests)
        if PARITY in fault.tests and option == "-k":
            assert any(word in row for word in words.split(" or ") for row in daily()), fault.name
