"""Megatron's flex dispatcher on the true buffers of DeepEP and HybridEP, in Megatron's loop.

Two ranks with a card each, which must reach each other's memory. These tests have not been run yet.
"""

from __future__ import annotations

import pytest
import torch

from megatron_laer.device import CPU_FLAGS
from tests.gpu.two_ranks import RECOMPUTE, Train, trainer

FLEX = " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend "
OVERLAP = " --moe-shared-expert-overlap"
MODEL = f"--moe-router-dtype fp32 --fsep-capacity 6 {' '.join(CPU_FLAGS[2:])}"  # all but gloo


@pytest.fixture(autouse=True)
def needs_two_cards() -> None:
    """Import DeepEP here, since every session collects this file."""
    pytest.importorskip("deep_ep")
    if torch.cuda.device_count() < 2:
        pytest.skip("a rank needs a card of its own")


@pytest.fixture(scope="module")
def train(text_data: str) -> Train:
    return trainer(text_data, MODEL)


@pytest.mark.parametrize("extra", ["", RECOMPUTE, OVERLAP], ids=["plain", "recompute", "overlap"])
@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_it_trains_as_the_all_to_all_dispatcher_does(
    backend: str, extra: str, train: Train
) -> None:
    import deep_ep

    if backend == "hybridep" and not hasattr(deep_ep, "HybridEPBuffer"):
        pytest.skip("this deep_ep has no HybridEP; its branch hybrid-ep has")
    (plain, _), (flex, _) = train(extra), train(f"{extra}{FLEX}{backend}")
    assert flex == pytest.approx(plain, rel=5e-3)
    assert flex[-1] < 0.9 * flex[0]
