"""Every GEMM back end computes what a linear layer per slot does, and back ends go by name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megatron_laer.experts.gemm import gemm_names, slot_gemm
from tests.documents import ROOT
from tests.slot_gemm import TOKENS_C, check_back_end

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", gemm_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens_C", [TOKENS_C, [0, 0, 0], [5]], ids=["some", "none", "one slot"])
def test_a_back_end_equals_a_linear_layer_per_slot(
    name: str, dtype: torch.dtype, tokens_C: Sequence[int]
) -> None:
    check_back_end(name, dtype, CPU, tokens_C)


@pytest.mark.parametrize("name", gemm_names())
def test_a_back_end_is_documented(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_a_back_end_is_found_by_the_name_of_its_file() -> None:
    assert "loop" in gemm_names()
    with pytest.raises(ValueError, match=r"'lop' is no GEMM back end; take one of: .*loop"):
        slot_gemm("lop")
