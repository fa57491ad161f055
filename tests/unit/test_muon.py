"""Owners of matrices under Muon, and refusals of optimizers that need whole matrices."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_laer import disable, enable
from megatron_laer.layer.experts.slices import SliceSpec
from megatron_laer.plugin import command_line, optimizers
from megatron_laer.runtime.comm.blocks import shares
from megatron_laer.support import RefusedError
from tests.unit.validated_arguments import fsep_arguments


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 12))
def test_shares_give_every_task_to_one_rank_and_balance_the_costs(
    costs: list[int], num_ranks: int
) -> None:
    tasks_N = shares(costs, num_ranks)
    assert len(tasks_N) == num_ranks
    assert sorted(task for tasks in tasks_N for task in tasks) == list(range(len(costs)))
    cost_N = [sum(costs[task] for task in tasks) for tasks in tasks_N]
    # The most loaded rank had the least before its last task.
    assert max(cost_N) - min(cost_N) <= max(costs, default=0)
    assert sorted(len(tasks) for tasks in shares([7] * 6, 4)) == [1, 1, 2, 2]


def expert_slice(rows: int, *, bias: bool = False) -> torch.nn.Parameter:
    """Make a parameter as FSEP's experts have it, on rank 0 of 2."""
    spec = SliceSpec.for_rank(
        "linear_fc1", 4, rows, 6, rank=0, num_ranks=2, init_method=torch.nn.init.zeros_
    )
    return (spec.of_bias() if bias else spec).new_parameter(torch.float32, torch.device("cpu"))


MATRIX, VECTOR, CONVOLUTION = (torch.nn.Parameter(torch.zeros(s)) for s in [(2, 2), 2, (2, 1, 4)])


def test_slices_go_where_stocks_experts_go_and_nothing_else_changes_its_place() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import layer_wise_optimizer

    def goes_to_adam(name: str, parameter: torch.nn.Parameter) -> bool:
        (rule,) = optimizer._EMERGING_OPTIMIZERS[name].default_param_overrides
        return bool(rule.matches(parameter, "name"))

    kinds = (MATRIX, expert_slice(8), VECTOR, CONVOLUTION, expert_slice(8, bias=True))
    for turn, expected in ((enable, [False, False, True, True, True]), (disable, None)):
        turn()
        found = [goes_to_adam("muon", parameter) for parameter in kinds]
        assert found == (expected or [False, True, True, True, True])
        assert found == [goes_to_adam("lion", parameter) for parameter in kinds]
        shared = map(layer_wise_optimizer.is_managed_by_layer_wise_optimizer, kinds)
        assert list(shared) == [not adam for adam in found]


def test_other_optimizers_of_the_registry_are_refused() -> None:
    from megatron.core.optimizer.emerging_optimizers import _create_emerging_optimizer

    enable()
    try:
        with pytest.raises(ValueError, match="optimizer='soap': it needs whole matrices"):
            _create_emerging_optimizer(None, [], "soap", [], None)
    finally:
        disable()


def test_replicas_need_bf16_and_slices_of_one_size() -> None:
    assert optimizers._problem_of_dtype(SimpleNamespace(bf16=True)) is None
    assert "give --bf16" in str(optimizers._problem_of_dtype(SimpleNamespace(bf16=False)))

    def problem(rows: int, replicas: int) -> str | None:
        chunk = SimpleNamespace(parameters=lambda: [MATRIX, expert_slice(8), expert_slice(rows)])
        groups = SimpleNamespace(expt_dp=SimpleNamespace(size=lambda: replicas))
        return optimizers._problem_of_replicas([chunk], groups, 2)

    assert problem(8, 2) is None and problem(9, 1) is None
    assert "[9] rows" in str(problem(9, 2))


@pytest.mark.parametrize(
    ("optimizer", "is_refused"),
    [("muon", True), ("dist_muon", True), ("lion", True), ("sgd", False)],
)
def test_a_missing_package_is_named_before_anything_is_built(
    optimizer: str, is_refused: bool
) -> None:
    args = fsep_arguments(optimizer)
    with (
        mock.patch("megatron.core.optimizer.HAVE_EMERGING_OPTIMIZERS", False),
        mock.patch.object(command_line.arguments, "check"),
        mock.patch.object(command_line, "enable") as turned_on,
        mock.patch.object(command_line, "install_metrics"),
    ):
        validate = command_line._with_fsep_validation(lambda args: args)
        if not is_refused:
            assert validate(args) is args
            return
        with pytest.raises(RefusedError, match="pip install 'emerging-optimizers"):
            validate(args)
        turned_on.assert_not_called()
