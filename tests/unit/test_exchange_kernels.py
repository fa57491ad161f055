"""Triton kernels of the exchange: in Triton's interpreter, and compiled, without a card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch for CUDA brings Triton")


def test_kernels_equal_torch_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.exchange_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "61 cases"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("parts", "out"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_kernels_compile_for_cards_that_are_not_here(
    capability: int, parts: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_laer.runtime.comm import kernels

    types = dict.fromkeys(("whole_CRK", "by_local_rank", "arrived", "target_nPK"), f"*{parts}")
    types |= {"parts_nPK": f"*{parts}", "out": f"*{out}", "csr": "*i64", "position_n": "*i64"}
    constants = {"RANKS": 64, "NODES": 8, "BLOCK": 1024}
    for kernel, switch in (
        (kernels._move_rows, "PACKS"),
        (kernels._gather_rows, None),
        (kernels._sum_replicas, "ADDS"),
    ):
        for value in (False, True) if switch else (False,):
            given = {name: size for name, size in constants.items() if name in kernel.arg_names}
            given |= {switch: value} if switch else {}
            signature = {
                name: "constexpr" if name in given else types.get(name, "i32")
                for name in kernel.arg_names
            }
            source = ASTSource(kernel, signature, given)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert compiled.asm["cubin"]
