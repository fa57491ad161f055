"""Bandwidth of the project's kernels, as a share of a plain copy's on the same card.

`python -m benchmarks.gpu.kernels`. A kernel's bytes are those of its arguments and results, once
each.

Legend: T tokens, E experts, C slots of a rank, S of all, P pairs, H columns; R rows of a matrix,
r of a rank, K columns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.report import Part, Setting, run_part
from benchmarks.gpu.sizes import Model, models
from benchmarks.gpu.timing import Times, copy_gb_per_s, in_turn
from megatron_laer.choices import ExchangeAlgorithm, Split
from megatron_laer.layer.dispatch import permutation
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from megatron_laer.runtime.comm.segments import Chain, Table

_COPY_BYTES, _DRY_COPY_BYTES = 2**30, 2**16


@dataclass(frozen=True)
class Kernel:
    """A kernel, and a function that makes its arguments for a model's sizes."""

    name: str
    run: Callable[..., Any]
    make: Callable[[Model, Setting], tuple[Any, ...]]


def measure(setting: Setting) -> Part:
    part = Part()
    share_s = setting.budget.left_s / (len(KERNELS) * len(models(setting.dry)) + 2)
    copied = copy_gb_per_s(
        setting.device, _DRY_COPY_BYTES if setting.dry else _COPY_BYTES, min(share_s, 5.0)
    )
    found: list[tuple[str, str, int, Times]] = []
    for model in models(setting.dry):
        for kernel in KERNELS:
            if setting.budget.spent:
                part.left_out.append(f"{kernel.name} at {model.name}: the time was spent")
                continue
            run = partial(kernel.run, *kernel.make(model, setting))
            moved = _bytes(run.args) + _bytes(run())
            times = in_turn({kernel.name: run}, min(share_s, 2.0))
            found.append((kernel.name, model.name, moved, times[kernel.name]))
    part.tables["Kernels beside a plain copy"] = rows(found, copied)
    return part


def rows(found: list[tuple[str, str, int, Times]], copied_gb_per_s: float) -> list[dict[str, Any]]:
    """Return the table of kernels: their bandwidth and its share of a copy's."""
    return [
        {
            "kernel": name,
            "sizes of": model,
            "MB": moved / 1e6,
            **times.cells(),
            "GB/s": moved / times.median_ms / 1e6,
            "share of a copy": moved / times.median_ms / 1e6 / copied_gb_per_s,
        }
        for name, model, moved, times in found
    ]


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0


def _triton(name: str) -> Callable[..., Any]:
    """Return a function of the permutations' Triton kernels, imported at the first call."""

    def call(*given: Any) -> Any:
        return getattr(import_module("megatron_laer.layer.dispatch.kernels"), name)(*given)

    return call


def _of_send_rows(model: Model, setting: Setting) -> tuple[Any, ...]:
    layout = ExpertLayout.random(model.ranks, model.slots, model.experts, (1,))
    generator = torch.Generator().manual_seed(1)
    scores_TE = torch.rand(model.tokens, model.experts, generator=generator)
    map_TE = torch.zeros(model.tokens, model.experts, dtype=torch.bool)
    map_TE.scatter_(1, scores_TE.topk(model.topk, dim=1).indices, True)
    counts_NE = np.tile(map_TE.sum(0).numpy(), (model.ranks, 1))
    solved = solve_quotas(Split.EXACT, counts_NE, layout, min(8, model.ranks))
    quotas = RankQuotas.of(layout, solved.rank_row(0), solved.rank_columns(0))
    sizes = permutation.run_sizes(layout.num_slots, model.experts)
    runs = torch.from_numpy(quotas.runs).to(setting.device).split(sizes)
    return map_TE.to(setting.device), quotas.num_sent, *runs[:5]


def _of_sum_rows(model: Model, setting: Setting) -> tuple[Any, ...]:
    device = setting.device
    rows_PH = torch.randn(model.rows, model.hidden, device=device, dtype=setting.dtype)
    token_P = torch.randperm(model.rows, device=device) % model.tokens
    ends_T = torch.bincount(token_P, minlength=model.tokens).cumsum(0).int()
    by_token_P = token_P.argsort(stable=True).int()
    return rows_PH, ends_T, by_token_P


def _of_gather(model: Model, setting: Setting) -> tuple[Any, ...]:
    hidden_TH = torch.randn(model.tokens, model.hidden, device=setting.device, dtype=setting.dtype)
    token_P = torch.randperm(model.rows, device=setting.device) % model.tokens
    return hidden_TH, 0, token_P.int()  # as in training


def _reduce(model: Model, setting: Setting) -> Chain:
    """Return the flat reduce of rank 0 with rows of every expert."""
    layout = ExpertLayout.random(model.ranks, model.slots, model.experts, (1,))
    geometry = Geometry(model.ranks, model.experts, model.slots, model.ranks)
    way = way_of(geometry, ExchangeAlgorithm.FLAT)
    parts = way, Placed(layout, geometry), None, 0, ((model.hidden, 1),), setting.device
    chain = Chain(*parts, back=True)
    chain.table.place([torch.empty(0, device=setting.device)])  # of one matrix, at the first place
    return chain


def _of_pack(model: Model, setting: Setting) -> tuple[Any, ...]:
    slots_CRK = _matrices(model.slots, model.hidden, model, setting)
    chain = _reduce(model, setting)
    sent = torch.empty_like(slots_CRK).flatten(0, 1)
    return chain.table, chain.moves[0].leaves, [slots_CRK.flatten(0, 1)], sent


def _of_sum_replicas(model: Model, setting: Setting) -> tuple[Any, ...]:
    chain = _reduce(model, setting)
    mine = model.hidden // model.ranks
    parts_SrK = _matrices(model.ranks * model.slots, mine, model, setting)
    main_grad_ErK = torch.zeros(
        model.experts, mine, model.ffn, device=setting.device, dtype=torch.float32
    )
    given = parts_SrK.flatten(0, 1), [main_grad_ErK.flatten(0, 1)]
    return chain.table, chain.moves[0].arrives, *given


def _add_replicas(*given: Any) -> None:
    Table.add(*given, adds=True)


def _matrices(number: int, rows: int, model: Model, setting: Setting) -> torch.Tensor:
    shape = number, rows, model.ffn
    return torch.randn(shape, device=setting.device, dtype=setting.dtype)


KERNELS = (
    Kernel("rows of the send buffer", _triton("send_rows"), _of_send_rows),
    Kernel("gather of tokens", torch.index_select, _of_gather),
    Kernel("sum of tokens' rows", _triton("sum_rows"), _of_sum_rows),
    # These choose between kernel and torch by themselves.
    Kernel("rows of slots to send", Table.pack, _of_pack),
    Kernel("sum of replicas to main gradients", _add_replicas, _of_sum_replicas),
)


if __name__ == "__main__":
    sys.exit(run_part(__doc__, measure))
