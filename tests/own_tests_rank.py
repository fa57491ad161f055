"""One rank of Megatron's own unit tests, without the plugin, with it, or with FSEP.

    torchrun ... tests/own_tests_rank.py MODE CHECKOUT RESULTS FILE...

`tests/own_tests.py` starts torchrun, which would end all ranks if one had another status than 0.
This file is never imported, since Megatron's tests are a package of the same name as ours. Ranks
meet after every test; after a failed one on any of them, all start the next one with new process
groups.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

MODE, CHECKOUT, RESULTS, *FILES = sys.argv[1:]
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

if MODE == "without":
    from megatron_laer import device
    from megatron_laer.plugin import wheel

    device.install_cpu()
    wheel.mend_dataset_helper()
else:
    from megatron_laer.launch import prepare

    prepare()

import torch.distributed as dist  # noqa: E402 -- after what replaces parts of torch

from tests.doubles.install import install  # noqa: E402

install()
# From here on `tests` is Megatron's; replace this script's folder.
for ours in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
    del sys.modules[ours]
sys.path[0] = CHECKOUT
os.chdir(CHECKOUT)

# Longer than ranks are late on a busy machine; a failed rank leaves its groups at once.
_GROUP_TIMEOUT = datetime.timedelta(seconds=120)
_MEETING_TIMEOUT = datetime.timedelta(seconds=900)


class Ranks:
    """pytest plugin that keeps this rank's tests in step with those of the others."""

    def __init__(self) -> None:
        # The launcher's.
        port = int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
        self.store.set_timeout(_MEETING_TIMEOUT)
        self.verdicts: dict[str, list[str]] = {}
        self._tests, self._groups = 0, 0
        # Megatron's fixtures run before `set_up` of its tests, and download data.
        name = "tests.test_utils.python_scripts.download_unit_tests_dataset"
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].download_and_extract_asset = _nothing

    def pytest_collection_finish(self) -> None:
        """Give test modules the settings of a launcher on GPUs (hook of pytest)."""
        from tests.unit_tests.test_utilities import Utils

        Utils.initialize_distributed = staticmethod(self._initialize_distributed)
        # Includes modules whose helpers others use.
        for module in [sys.modules[name] for name in sys.modules if name.startswith("tests.unit_")]:
            for value in list(vars(module).values()):
                # Ranks collect such objects at different times, and each waits for all.
                if isinstance(value, type) and "__del__" in vars(value):
                    del value.__del__
            if MODE == "fsep" and hasattr(module, "MoELayer"):
                module.MoELayer = _numbered_layer()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Keep the worst outcome of a test, and its reason if it did not pass (hook of pytest)."""
        report = yield
        known = self.verdicts.setdefault(item.nodeid, ["passed", ""])
        order = ("passed", "skipped", "failed")
        if order.index(report.outcome) > order.index(known[0]):
            known[:] = [report.outcome, _reason(report)]
        if report.failed:
            self._leave()
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Meet the other ranks, and leave all groups if the test failed (hook of pytest)."""
        self._tests += 1
        has_failed = self.verdicts[nodeid][0] == "failed"
        if "failed" in self._all_say(f"{self._tests}", "failed" if has_failed else "fine"):
            self._leave()
            self._all_say(f"{self._tests} left", "left")

    def pytest_sessionfinish(self) -> None:
        Path(RESULTS, f"{RANK}.json").write_text(json.dumps(self.verdicts), encoding="utf-8")

    def _all_say(self, about: str, word: str) -> list[str]:
        self.store.set(f"{about}/{RANK}", word)
        return [self.store.get(f"{about}/{rank}").decode() for rank in range(RANKS)]

    def _initialize_distributed(self) -> None:
        from tests.unit_tests.test_utilities import Utils

        if not dist.is_initialized():
            self._groups += 1
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"groups {self._tests} {self._groups}", self.store),
                rank=RANK,
                world_size=RANKS,
                timeout=_GROUP_TIMEOUT,
            )
        Utils.inited = True

    def _leave(self) -> None:
        """Leave all groups, so that no rank keeps waiting for this one."""
        from megatron.core import parallel_state

        from tests.unit_tests.test_utilities import Utils

        with contextlib.suppress(Exception):
            parallel_state.destroy_model_parallel()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        Utils.inited, self._groups = False, 0


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[:1000]


def _nothing(**_: object) -> None:
    return None


def _numbered_layer() -> type:
    """Make a layer class that numbers layers as a model would, where a test gives no number."""
    from megatron_laer.layer.moe_layer import FSEPMoELayer

    class MoELayer(FSEPMoELayer):
        def __init__(self, *args: Any, layer_number: int | None = None, **kwargs: Any) -> None:
            super().__init__(*args, layer_number=layer_number or 1, **kwargs)

    return MoELayer


if __name__ == "__main__":
    if MODE == "fsep":
        import megatron_laer

        megatron_laer.enable()
    # Use Megatron's folder, configuration and conftest files.
    flags = ["-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", CHECKOUT, "-q", "--tb=short"]
    pytest.main([*flags, *FILES], plugins=[Ranks()])
