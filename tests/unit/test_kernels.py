"""Triton kernels of the exchange and of permutations: in Triton's interpreter, and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.processes import python

pytest.importorskip("triton", reason="PyTorch for CUDA brings Triton")

INTEGERS = (
    "starts_S ends_S first_row_S by_expert_S first_E1 pair_P token_P row_TE ends_T by_token_P"
).split()


@pytest.mark.parametrize(
    ("module", "cases"),
    [("exchange_kernels", 51), ("dispatch_kernels", 22), ("verify_kernels", 72)],
)
def test_kernels_equal_torch_in_tritons_interpreter(module: str, cases: int) -> None:
    printed = python("-m", f"tests.{module}", TRITON_INTERPRET="1", MEGATRON_LAER_DEVICE="auto")
    assert printed.strip() == f"{cases} cases"


def compile_for(
    capability: int, kernel: Any, types: dict[str, str], given: dict[str, int], odd: str = ""
) -> str:
    """Compile the kernel for pointers to aligned memory, but for an odd one; return its code."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {name: value for name, value in given.items() if name in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(given, "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, of) in enumerate(types.items())
        if of[0] == "*" and name != odd
    }
    source = ASTSource(kernel, types, given, aligned)
    made = compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    code: str = made.asm["ptx"]
    return code


# Each day every type for one of both cards.
@pytest.mark.parametrize(
    ("capability", "parts", "out"),
    [
        *((80, "bf16", "fp32"), (90, "bf16", "bf16"), (90, "fp32", "fp32")),
        pytest.param(90, "bf16", "fp32", marks=pytest.mark.nightly),
        pytest.param(80, "bf16", "bf16", marks=pytest.mark.nightly),
        pytest.param(80, "fp32", "fp32", marks=pytest.mark.nightly),
    ],
)
def test_kernels_compile_for_cards_that_are_not_here(
    capability: int, parts: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from megatron_laer.layer.dispatch import kernels as permutations
    from megatron_laer.runtime.comm import kernels as exchanges
    from megatron_laer.verify import kernels as sums
    from megatron_laer.verify.sums import MULTIPLIER, SHIFT

    types = dict.fromkeys(INTEGERS, "*i32") | {"map_TE": "*u8"}
    types |= {"rows_PH": f"*{out}", "sums_TH": f"*{out}"}
    for kernel in (
        permutations._rows_of_expert,
        permutations._rows_of_token,
        permutations._sum_rows,
    ):
        compile_for(capability, kernel, types, {"BLOCK": 256})
    given = {"BLOCK": 2048, "BLOCKS": 16, "MULTIPLIER": MULTIPLIER, "SHIFT": SHIFT}
    for bits in ("*u8", "*i16", "*i32", "*i64"):
        compile_for(capability, sums._bit_sums, {"bits": bits, "sums": "*i64"}, given, odd="bits")
    types = {"table": "*i64", "wire": f"*{parts}"}
    # Whatever the length of rows, there is code that moves 16 bytes at once.
    given = {"BLOCK": 1024}
    for value, columns in ((False, 8), (True, 8), (True, 1)):
        for kernel, held in ((exchanges._copy_segments, parts), (exchanges._sum_segments, out)):
            given |= {"COLUMNS": columns, "PACKS": value, "ADDS": value}
            code = compile_for(capability, kernel, types | {"held": f"*{held}"}, given)
            assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
    # There is none for the memory of tensors whose first one is not aligned.
    types["held"] = f"*{parts}"
    code = compile_for(capability, exchanges._copy_segments, types, given, odd="held")
    assert "ld.global.v4" not in code and "st.global.v4" in code
