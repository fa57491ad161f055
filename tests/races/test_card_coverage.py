"""Lines that only a card runs: found in the source, and all but a few run without one."""

from __future__ import annotations

import pytest

from tests.fake_cuda.lines import only_on_card, recorded
from tests.races import card_coverage

pytestmark = pytest.mark.races

MOST_LEFT = 20


@pytest.mark.nightly
def test_lines_that_no_case_runs_are_those_of_the_list() -> None:
    assert card_coverage.main([]) == 0


def test_few_lines_run_nowhere_and_each_has_a_reason() -> None:
    reasons = card_coverage.reasons()
    assert len(reasons) <= MOST_LEFT and all(reasons.values())
    assert reasons.keys() <= {one.name for one in only_on_card()}


def test_branches_kernels_and_their_callees_are_found() -> None:
    found = {(one.function, one.text) for one in only_on_card()}
    assert {
        ("read_here", "tensor.record_stream(torch.cuda.current_stream(tensor.device))"),
        ("upload", "return tensor.pin_memory().to(device, non_blocking=True)"),
        ("_rows_of", "return (rank + 1) * rows // ranks - rank * rows // ranks"),
        ("_StreamResult.result", "return self._result"),
        ("_write_product", 'options["out_dtype"] = out_RK.dtype'),
    } <= found
    functions = {function for function, _ in found}
    assert not functions & {"ThreadStream.submit", "HostClock.now", "Loop.forward"}


def test_a_record_has_the_lines_that_ran_and_no_others() -> None:
    from megatron_laer.telemetry.clock import HostClock

    lines = recorded(lambda: HostClock().now())
    first = HostClock.now.__code__.co_firstlineno
    assert lines == [("megatron_laer/telemetry/clock.py", first + 1)]
