"""Megatron's own unit tests of its MoE layers, on gloo ranks, with each one's verdict."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.processes import python_path

Mode = Literal["without", "standard", "fsep"]

RANKS = 4
_SCRIPT = Path(__file__).with_name("own_tests_rank.py")

# Tests in tests/unit_tests of Megatron-LM that build MoE layers.
FILES = """
    transformer/moe/test_moe_layer.py transformer/moe/test_shared_experts.py
    transformer/moe/test_sequential_mlp.py transformer/moe/test_a2a_token_dispatcher.py
    transformer/moe/test_token_dispatcher.py transformer/moe/test_routers.py
    transformer/moe/test_qb_routing.py transformer/moe/test_latent_moe_layer.py
    distributed/test_grad_sync_with_expert_parallel.py distributed/test_finalize_model_grads.py
    models/test_hybrid_moe_model.py
""".split()


@dataclass(frozen=True)
class Verdict:
    outcome: str
    reasons: tuple[str, ...] = ()


def run(mode: Mode, checkout: Path, files: Sequence[str], timeout_s: float) -> dict[str, Verdict]:
    """Run files from tests/unit_tests of the checkout, and return the verdict of each test.

    The mode is `without` the plugin, with it but FSEP off (`standard`), or with all MoE layers that
    tests build sharded (`fsep`).
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes, logs = [], []
        results = [Path(folder) / f"{rank}.json" for rank in range(RANKS)]
        for rank, result in enumerate(results):
            log = stack.enter_context(result.with_suffix(".log").open("w+", encoding="utf-8"))
            command = [sys.executable, "-W", "ignore", str(_SCRIPT), mode, str(checkout)]
            command += [str(store.port), str(result)]
            process = subprocess.Popen(
                [*command, *(f"tests/unit_tests/{name}" for name in files)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(rank),
            )
            stack.callback(process.kill)
            processes.append(process)
            logs.append(log)
        deadline_s = time.monotonic() + timeout_s
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its log shows how far it came
                process.wait(max(0.0, deadline_s - time.monotonic()))
        for result, log in zip(results, logs, strict=True):
            log.seek(0)
            assert result.exists(), log.read()[-5000:]
        return _worst([json.loads(result.read_text(encoding="utf-8")) for result in results])


def _environment(rank: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    return {
        **os.environ,
        **{name: str(number) for name, number in numbers.items()},
        "MEGATRON_LAER_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _worst(by_rank: list[dict[str, list[str]]]) -> dict[str, Verdict]:
    assert all(found.keys() == by_rank[0].keys() for found in by_rank), "ranks ran other tests"
    verdicts = {}
    for test in by_rank[0]:
        outcomes = [found[test] for found in by_rank]
        worst = max((outcome for outcome, _ in outcomes), key=("passed skipped failed").find)
        reasons = dict.fromkeys(why for outcome, why in outcomes if outcome == worst and why)
        verdicts[test.removeprefix("tests/unit_tests/")] = Verdict(worst, tuple(reasons))
    return verdicts
