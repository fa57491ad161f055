"""Triton kernels of the permutations: in Triton's interpreter, and compiled, without a card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch for CUDA brings Triton")

INTEGERS = (
    "starts_S ends_S first_row_S by_expert_S first_E1 pair_P token_P row_TE ends_T by_token_P"
).split()


def test_kernels_equal_torch_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.dispatch_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "22 cases"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", ["fp32", "bf16"])
def test_kernels_compile_for_cards_that_are_not_here(
    capability: int, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_laer.layer.dispatch import kernels

    types = dict.fromkeys(INTEGERS, "*i32") | {"map_TE": "*u8", "BLOCK": "constexpr"}
    types |= {"rows_PH": f"*{rows}", "sums_TH": f"*{rows}"}
    for kernel in (kernels._rows_of_expert, kernels._rows_of_token, kernels._sum_rows):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {"BLOCK": 256})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
