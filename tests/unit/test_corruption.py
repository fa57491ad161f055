"""A changed file with checksums yields nothing but the written content."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import corruption
from tests.corruption import (
    CHANGES_OF_A_KIND,
    ERROR,
    FORMATS,
    KINDS,
    OTHER,
    PREFIX,
    RECORDINGS,
    UNCHANGED,
)


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> corruption.Format:
    return FORMATS[request.param]


@pytest.fixture
def path(tmp_path: Path, format: corruption.Format) -> Path:
    corruption.make(tmp_path)
    return tmp_path / format.name


@pytest.mark.counts(fuzz_cases=len(KINDS) * CHANGES_OF_A_KIND)
def test_a_changed_file_is_refused_or_read_up_to_the_change(
    format: corruption.Format, path: Path
) -> None:
    found = corruption.outcomes(format, path, corruption.changed(path.read_bytes()))
    assert found.total() == len(KINDS) * CHANGES_OF_A_KIND
    assert found[OTHER] == 0 and found[ERROR] > found.total() / 2


@pytest.mark.parametrize("name", RECORDINGS)
def test_lost_moved_and_another_runs_records_are_never_read_in_silence(
    tmp_path: Path, name: str
) -> None:
    format = FORMATS[name]
    corruption.make(tmp_path)
    path = tmp_path / format.name
    expected, content = format.read(path), path.read_bytes()
    for copy in corruption.moved(path, random.Random(name)):
        path.write_bytes(copy)
        # Only a lost last record is missed by no later one.
        said = PREFIX if content.startswith(copy) else ERROR
        assert corruption.outcome(format, path, expected) == (
            UNCHANGED if copy == content else said
        )


def test_a_header_with_any_bit_changed_is_refused(format: corruption.Format, path: Path) -> None:
    content = path.read_bytes()
    length = format.header_bytes(content)
    found = corruption.outcomes(format, path, corruption.flipped(content, length))
    assert found == {ERROR: 8 * length}


def test_a_record_that_says_to_be_longer_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    """Otherwise the rest of a trace would be ignored, and cut off by the next run."""
    trace = FORMATS["trace"]
    corruption.make(tmp_path)
    path = tmp_path / trace.name
    content = bytearray(path.read_bytes())
    first = trace.header_bytes(content)
    width = first + 4
    assert content[width] in (2, 4)
    for other in {1, 2, 4} - {content[width]}:
        content[width] = other
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"byte {first}: no record of its run begins"):
            trace.read(path)


@pytest.mark.parametrize("zeros", [1, 20, 70])
def test_a_trace_ends_where_a_machine_that_lost_power_left_zeros(
    tmp_path: Path, zeros: int
) -> None:
    trace = FORMATS["trace"]
    corruption.make(tmp_path)
    path = tmp_path / trace.name
    content = path.read_bytes()
    expected = trace.read(path)
    path.write_bytes(content[:-zeros] + bytes(zeros))
    assert corruption.outcome(trace, path, expected) == PREFIX
    assert len(trace.read(path)) == len(expected) - 1
