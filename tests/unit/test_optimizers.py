"""Refusals of optimizers that need whole matrices."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest

from megatron_laer import FSEPConfig, disable, enable
from megatron_laer.plugin import command_line
from megatron_laer.support import RefusedError
from tests.unit.validated_arguments import fsep_arguments


@pytest.mark.parametrize(
    ("name", "sharding", "shared", "said"),
    [
        ("soap", "auto", False, "--optimizer soap: the optimizer needs whole"),
        ("muon", "rows", False, "^--optimizer muon with --fsep-sharding rows: .*give --fsep-shar"),
        ("lion", "rows", False, "^--optimizer lion with --fsep-sharding rows: .*give --fsep-shar"),
        ("muon", "experts", True, "^--optimizer muon with --use-distributed-optimizer without --b"),
    ],
)
def test_a_loop_of_ones_own_is_refused_what_its_optimizer_cannot_do(
    name: str, sharding: str, shared: bool, said: str
) -> None:
    from megatron.core import optimizer

    settings = SimpleNamespace(
        optimizer=name, use_layer_wise_distributed_optimizer=shared, bf16=False
    )
    enable(FSEPConfig(sharding=sharding))  # type: ignore[arg-type]
    try:
        with pytest.raises(ValueError, match=said):
            optimizer._create_emerging_optimizer(settings, [], name, [], None)
    finally:
        disable()


@pytest.mark.parametrize("optimizer", ["muon", "dist_muon", "lion", "sgd"])
def test_a_missing_package_is_named_before_anything_is_built(
    optimizer: str,
) -> None:
    args = fsep_arguments(optimizer)
    with (
        mock.patch("megatron.core.optimizer.HAVE_EMERGING_OPTIMIZERS", False),
        mock.patch.object(command_line.arguments, "check"),
        mock.patch.object(command_line, "enable") as turned_on,
        mock.patch.object(command_line, "install_metrics"),
    ):
        validate = command_line._validate.replace(lambda args: args)
        if optimizer == "sgd":
            assert validate(args) is args
            return
        with pytest.raises(RefusedError, match="pip install 'emerging-optimizers"):
            validate(args)
        turned_on.assert_not_called()
