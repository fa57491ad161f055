"""A layer's state of a microbatch's passes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.weights.share import Share


def layer(passes: int) -> LayerState:
    share = Share.of_slices((), ())
    calls = {name: mock.Mock() for name in ("what_changed", "on_step_end", "launch_kernels")}
    return LayerState(
        index=0,
        name="mtp 1",
        number=1,
        is_mtp=True,
        home=HomeOrder.stock(4),
        geometry=mock.Mock(),
        streams=mock.Mock(),
        device=torch.device("cpu"),
        kinds=frozenset(),
        find_share=lambda: share,
        adapters=lambda: "",
        passes=passes,
        **calls,
    )


def test_reruns_come_by_microbatch_and_within_it_backwards() -> None:
    state = layer(passes=2)
    plans: list[Any] = ["1a", "1b", "2a", "2b"]
    for plan in plans:
        state.reruns.keep(plan)
    assert [state.reruns.take() for _ in plans] == ["1b", "1a", "2b", "2a"]
    assert not len(state.reruns) and state.reruns.take() is None


def test_a_checkpoint_inside_another_takes_its_plan_with_its_own_rerun() -> None:
    state = layer(passes=1)
    seen: list[Any] = []

    class Rerun(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(state.reruns.take())
            with torch.enable_grad():
                seen.append(state.reruns.take())
            return grad

    state.reruns.keep("plan")  # type: ignore[arg-type]
    with torch.no_grad():
        assert state.reruns.take() is None, "another microbatch's first pass"
    Rerun.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == ["plan", "plan"]
    assert not len(state.reruns)


def test_counts_of_a_microbatchs_passes_are_summed_and_a_repeated_step_begins_anew() -> None:
    state = layer(passes=2)
    state.begin_step(num_microbatches=2)
    counts = [np.full((1, 2), number, np.int64) for number in range(6)]
    begins, found = [], []
    for counts_NE in counts:
        begins.append(state.begins_step)
        found.append(state.count_pass(counts_NE))
    assert begins == [True, False, False, False, True, False]
    assert [each is None for each in found] == [True, False] * 3
    sums = [(each[0], each[1].tolist()) for each in found if each is not None]
    assert sums == [(0, [[1, 1]]), (1, [[5, 5]]), (0, [[9, 9]])]
    assert counts[4].tolist() == [[4, 4]], "what guard and metrics hold is left alone"
