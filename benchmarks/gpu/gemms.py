"""Every GEMM back end of `--fsep-set gemm` against `loop`, at the experts' sizes of public models.

`python -m benchmarks.gpu.gemms`. Forward is both matrices' output; backward is the gradients of
input and weights of both, the latter in float32. Shares are of a plain matrix product's operations
per second on the same card.

Legend: C slots, T rows, R output features, K input features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.report import Part, Setting, run_part
from benchmarks.gpu.sizes import Model, models, splits
from benchmarks.gpu.timing import Times, in_turn, matmul_tflops
from megatron_laer.layer.experts.gemm import SlotGemm, gemm_names, slot_gemm

_MATMUL, _DRY_MATMUL = 8192, 64
# Limit relative to the largest value; a rounding to bfloat16 is 0.004.
_MOST_DIFFERENT = 0.02
_PASSES = ("forward", "backward")

# A model's sizes, a split, a pass, and the times of each back end.
Case = tuple[Model, str, str, dict[str, Times]]


def measure(setting: Setting) -> Part:
    """Measure every back end that works here."""
    part = Part()
    cases = [(model, split) for model in models(setting.dry) for split in ("even", "skewed")]
    share_s = setting.budget.left_s / (2 * len(cases) + 1)
    plain = matmul_tflops(
        setting.device, _DRY_MATMUL if setting.dry else _MATMUL, setting.dtype, min(share_s, 3.0)
    )
    found: list[Case] = []
    differences: list[dict[str, Any]] = []
    for model, split in cases:
        if setting.budget.spent:
            part.left_out.append(f"{model.name}, {split} split: the time was spent")
            continue
        widths = (model.hidden, model.ffn, 2 * model.ffn)
        gemms = {}
        for name in gemm_names():
            problem = slot_gemm(name).problem(setting.device, setting.dtype, widths)
            if problem is None:
                gemms[name] = slot_gemm(name)
            elif (told := f"back end {name}: {problem}") not in part.left_out:
                part.left_out.append(told)
        layer = _Experts(model, splits(model.slots, model.rows)[split], setting)
        for name, gemm in gemms.items():
            difference = layer.difference(gemm)
            differences.append({"model": model.name, "split": split, "back end": name} | difference)
            if not max(difference.values()) <= _MOST_DIFFERENT:  # written so that NaN is one
                part.problems.append(f"{name} at {model.name}, {split}, differs from loop")
        for which in _PASSES:
            runs = {name: layer.run(gemm, which) for name, gemm in gemms.items()}
            found.append((model, split, which, in_turn(runs, share_s)))
        del layer
    part.tables["GEMM back ends beside loop"] = rows(found, plain)
    part.tables["Largest difference from loop, of the largest value"] = differences
    return part


def rows(found: Sequence[Case], plain_tflops: float) -> list[dict[str, Any]]:
    """Return the table of times, ratios to `loop`, and shares of a plain product's speed."""
    return [
        {
            "model": model.name,
            "slots": model.slots,
            "rows": model.rows,
            "split": split,
            "pass": which,
            "back end": name,
            **of_name.cells(),
            "of loop's time": of_name.median_ms / times["loop"].median_ms,
            "share of a plain product": operations(model, which)
            / of_name.median_ms
            / 1e9
            / plain_tflops,
        }
        for model, split, which, times in found
        for name, of_name in times.items()
    ]


def operations(model: Model, which: str) -> float:
    """Return the multiplications and additions of a pass over the gated experts' two matrices."""
    forward = 2.0 * model.rows * 3 * model.hidden * model.ffn
    return forward if which == "forward" else 2 * forward


class _Experts:
    """Tensors of the experts' two products."""

    def __init__(self, model: Model, rows_C: list[int], setting: Setting) -> None:
        self.rows_C = rows_C

        def make(*shape: int, dtype: torch.dtype = setting.dtype) -> torch.Tensor:
            return torch.randn(shape, device=setting.device, dtype=dtype)

        shapes = (2 * model.ffn, model.hidden), (model.hidden, model.ffn)
        self.weights = [make(model.slots, *shape) for shape in shapes]
        self.inputs = [make(model.rows, columns) for _, columns in shapes]
        self.grads = [make(model.rows, rows) for rows, _ in shapes]
        self.outs = [make(model.slots, *shape, dtype=torch.float32) for shape in shapes]

    def run(self, gemm: SlotGemm, which: str) -> Callable[[], list[torch.Tensor]]:
        return lambda: self.forward(gemm) if which == "forward" else self.backward(gemm)

    def forward(self, gemm: SlotGemm) -> list[torch.Tensor]:
        pairs = zip(self.inputs, self.weights, strict=True)
        return [gemm.forward(input_TK, weight_CRK, self.rows_C) for input_TK, weight_CRK in pairs]

    def backward(self, gemm: SlotGemm) -> list[torch.Tensor]:
        found = []
        for parts in zip(self.grads, self.inputs, self.weights, self.outs, strict=True):
            grad_TR, input_TK, weight_CRK, out_CRK = parts
            found.append(gemm.input_grad(grad_TR, weight_CRK, self.rows_C))
            gemm.weight_grad(grad_TR, input_TK, self.rows_C, out_CRK)
        return [*found, *self.outs]

    def difference(self, gemm: SlotGemm) -> dict[str, float]:
        """Return the largest difference from `loop` in each pass, relative to the largest value."""
        found = {}
        for which in _PASSES:
            # Copies, since the next pass overwrites the gradients of weights.
            expected = [each.clone() for each in self.run(slot_gemm("loop"), which)()]
            for out_CRK in self.outs:
                out_CRK.fill_(float("nan"))
            pairs = zip(self.run(gemm, which)(), expected, strict=True)
            found[which] = max(
                float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
                for mine, theirs in pairs
            )
        return found


if __name__ == "__main__":
    sys.exit(run_part(__doc__, measure))
