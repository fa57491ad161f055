"""Lion's updates of slices, and refusals of optimizers that need whole matrices."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_laer import FSEPConfig, disable, enable
from megatron_laer.layer.experts.slices import SliceSpec
from megatron_laer.plugin import command_line
from megatron_laer.support import RefusedError
from tests.unit.validated_arguments import fsep_arguments


def expert_slice(*, bias: bool = False) -> torch.nn.Parameter:
    """Make a parameter as FSEP's experts have it, on rank 0 of 2."""
    spec = SliceSpec.for_rank(
        "linear_fc1", 4, 8, 6, rank=0, num_ranks=2, init_method=torch.nn.init.zeros_
    )
    return (spec.of_bias() if bias else spec).new_parameter(torch.float32, torch.device("cpu"))


MATRIX, VECTOR, CONVOLUTION = (torch.nn.Parameter(torch.zeros(s)) for s in [(2, 2), 2, (2, 1, 4)])


def test_slices_go_where_stocks_experts_go_and_nothing_else_changes_its_place() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import layer_wise_optimizer

    def goes_to_adam(parameter: torch.nn.Parameter) -> bool:
        (rule,) = optimizer._EMERGING_OPTIMIZERS["lion"].default_param_overrides
        return bool(rule.matches(parameter, "name"))

    kinds = (MATRIX, expert_slice(), VECTOR, CONVOLUTION, expert_slice(bias=True))
    for turn, expected in ((enable, [False, False, True, True, True]), (disable, None)):
        turn()
        found = [goes_to_adam(parameter) for parameter in kinds]
        assert found == (expected or [False, True, True, True, True])
        shared = map(layer_wise_optimizer.is_managed_by_layer_wise_optimizer, kinds)
        assert list(shared) == [not adam for adam in found]


def test_other_optimizers_of_the_registry_are_refused() -> None:
    from megatron.core.optimizer.emerging_optimizers import _create_emerging_optimizer

    settings = SimpleNamespace(optimizer="soap", use_layer_wise_distributed_optimizer=False)
    enable()
    try:
        with pytest.raises(ValueError, match="--optimizer soap: the optimizer needs whole"):
            _create_emerging_optimizer(settings, [], "soap", [], None)
    finally:
        disable()


@pytest.mark.parametrize(
    ("sharding", "shared", "said"),
    [
        ("rows", False, "^--optimizer muon with --fsep-sharding rows: .*give --fsep-sharding exp"),
        (
            "experts",
            True,
            "^--optimizer muon with --use-distributed-optimizer without --bf16: .*give",
        ),
    ],
)
def test_a_loop_of_ones_own_is_refused_what_muon_cannot_do(
    sharding: str, shared: bool, said: str
) -> None:
    from megatron.core.optimizer.emerging_optimizers import _create_emerging_optimizer

    settings = SimpleNamespace(
        optimizer="muon", use_layer_wise_distributed_optimizer=shared, bf16=False
    )
    enable(FSEPConfig(sharding=sharding))  # type: ignore[arg-type]
    try:
        with pytest.raises(ValueError, match=said):
            _create_emerging_optimizer(settings, [], "muon", [], None)
    finally:
        disable()


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
