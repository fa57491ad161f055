"""Lines that only a card runs: found in the source, and all but a few run without one."""

from __future__ import annotations

import pytest

from tests.fake_cuda.lines import only_on_card, recorded
from tests.races import card_coverage

pytestmark = pytest.mark.races


@pytest.mark.nightly
def test_few_lines_run_in_no_case() -> None:
    assert card_coverage.main([]) == 0


def test_branches_kernels_and_their_callees_are_found() -> None:
    functions = {one.function for one in only_on_card()}
    assert {
        "_StreamResult.wait",
        "upload",
        "_pairs_of",
        "_copy_segments",
        "_write_product",
    } < functions
    assert not functions & {"ThreadStream.submit", "HostClock.now", "Loop.forward"}


def test_a_record_has_the_lines_that_ran_and_no_others() -> None:
    from megatron_laer.telemetry.clock import HostClock

    lines = recorded(lambda: HostClock().now())
    first = HostClock.now.__code__.co_firstlineno
    assert lines == [("megatron_laer/telemetry/clock.py", first + 1)]
