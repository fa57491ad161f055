"""Megatron's own unit tests of its MoE layers, on gloo ranks, with each one's verdict."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests import processes

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
    environment = {
        "MEGATRON_LAER_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": processes.python_path(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={RANKS}", str(_SCRIPT), mode, str(checkout), folder),
            *(f"tests/unit_tests/{name}" for name in files),
        ]
        ended = processes.run(command, timeout_s, env=os.environ | environment)
        results = [Path(folder, f"{rank}.json") for rank in range(RANKS)]
        assert all(result.exists() for result in results), (ended.stdout + ended.stderr)[-5000:]
        return _worst([json.loads(result.read_text(encoding="utf-8")) for result in results])


def _worst(by_rank: list[dict[str, list[str]]]) -> dict[str, Verdict]:
    assert all(found.keys() == by_rank[0].keys() for found in by_rank), "ranks ran other tests"
    verdicts = {}
    for test in by_rank[0]:
        outcomes = [found[test] for found in by_rank]
        worst = max((outcome for outcome, _ in outcomes), key=("passed skipped failed").find)
        reasons = dict.fromkeys(why for outcome, why in outcomes if outcome == worst and why)
        verdicts[test.removeprefix("tests/unit_tests/")] = Verdict(worst, tuple(reasons))
    return verdicts
