"""Shared rank pools and data, kinds of tests, and their order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine

from megatron_laer.cpu.ranks import RankPools
from tests import durations, slurm
from tests.limits import limited
from tests.text_data import write_text_data

# A busy machine is slow to run an example, and to make one.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")
# A failing example is made smaller for half a minute, in place of five.
assert engine.MAX_SHRINKING_SECONDS == 300
engine.MAX_SHRINKING_SECONDS = 30

# Of a test of one process, ten times what the longest one takes.
LIMIT_S = 600.0

# Limit of live ranks. A rank grows to some 500 MB, and three sessions may run at once.
RANKS_KEPT = 8

KINDS = ("unit", "distributed", "races", "convergence", "gpu")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give a test its folder's kind, unless it is marked with another one (hook of pytest).

    Tests directly in `tools` are unit tests.
    """
    if not any(item.get_closest_marker(kind) for kind in KINDS):
        folder = item.path.parent.name
        item.add_marker("unit" if folder == "tools" else folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test of one process that hangs (hook of pytest)."""
    is_short = item.get_closest_marker("unit") and not item.get_closest_marker("nightly")
    with limited(LIMIT_S) if is_short else nullcontext():
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest units of work first, since one at the end idles workers (hook of pytest).

    This needs `--no-loadscope-reorder`. Tests that are not run do not count.
    """
    place = durations.longest_first([item.nodeid for item in items])
    items.sort(key=lambda item: place[item.nodeid])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """Spread units of work in place of files (hook of pytest-xdist)."""
    return durations.ByUnits(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Keep the seconds of each file (hook of pytest)."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    timed = [report for report in reports if hasattr(report, "duration")]
    durations.measure(terminalreporter.config, timed)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """Return `ranks(4)`, the session's pool of four ranks, which start once for many tests."""
    with RankPools(RANKS_KEPT) as pools:
        yield pools


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the prefix of a Megatron dataset of the standard library's sources, as bytes."""
    prefix = str(tmp_path_factory.mktemp("data") / "text")
    write_text_data(prefix)
    return prefix


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config) -> Path:
    """Return the folder of stock runs that later sessions find again."""
    return Path(pytestconfig.cache.mkdir("stock_runs"))


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """Yield a Slurm with two nodes of two fake GPUs, where Slurm is installed."""
    slurm.require_programs()
    with slurm.slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
