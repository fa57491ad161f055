"""Cards that compute no products in fp8, as they are refused."""

from __future__ import annotations

import pytest

from megatron_laer.precision import Precision, card_problem

A100, ADA, H100, B200, GEFORCE = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("recipe", "card", "cuda", "parts"),
    [
        ("mxfp8", H100, "13.0", ["10.0 to below 12.0", "card has 9.0", "tensorwise or blockwise"]),
        ("mxfp8", H100, "12.8", ["card has 9.0 with CUDA 12.8; give --fp8-recipe tensorwise"]),
        ("mxfp8", GEFORCE, "13.0", ["this card has 12.0", "tensorwise or blockwise"]),
        ("mxfp8", A100, "12.8", ["this card has 8.0", "leave out --fp8-format"]),
        ("mxfp8", B200, "12.8", []),
        ("blockwise", H100, "12.8", ["9.0 or higher and CUDA 12.9", "--fp8-recipe tensorwise"]),
        ("blockwise", ADA, "13.0", ["this card has 8.9", "give --fp8-recipe tensorwise"]),
        ("blockwise", H100, "12.9", []),
        ("tensorwise", A100, "13.0", ["8.9 or higher, and", "leave out --fp8-format"]),
        ("tensorwise", ADA, "12.4", []),
    ],
)
def test_a_card_that_computes_no_such_products_is_refused(
    recipe: str, card: tuple[int, int], cuda: str, parts: list[str]
) -> None:
    found = card_problem(Precision(recipe), card, cuda)
    if not parts:
        assert found is None and card_problem(Precision(recipe), card, None) is None
        return
    assert found is not None and found.startswith(f"--fp8-recipe {recipe} with --fsep-allow-")
    assert [part for part in parts if part not in found] == [], found
