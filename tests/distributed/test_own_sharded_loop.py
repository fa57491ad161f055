"""Megatron-FSDP in a loop of one's own: it trains as without, and is refused as by flags."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.rules import STRATEGIES, WITH_FSDP, Rule
from tests.distributed.conftest import refusal
from tests.distributed.test_own_loop import (
    HOMES,
    loaded,
    losses,
    metric,
    run,
    two_ranks,
)

AT_HOME = HOMES | {"late_plan": "wait"}
# Classes of configurations in the script.
DDP, MODEL, OPTIMIZER = "DistributedDataParallelConfig", "TransformerConfig", "OptimizerConfig"
# Fields of configurations by arguments of other names.
RENAMED = {
    "ddp_average_in_collective": "average_in_collective",
    "fp8_format": "fp8",
    "use_nccl_ub": "nccl_ub",
}
# Settings that no configuration of Megatron Core has.
OF_MEGATRONS_LOOP = {
    "--log-params-norm",
    "--async-save",
    "--non-persistent-save-interval",
    "--ckpt-format",
}


@contextlib.contextmanager
def sharded(module: ModuleType, strategy: str) -> Iterator[None]:
    """Let the script wrap its model by Megatron-FSDP."""
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    def wrapped(config: Any, *args: Any) -> Any:
        model = FullyShardedDataParallel(config, *args)
        config.no_sync_func = model.no_sync  # as in Megatron's loop
        return model

    def configured(name: str, **more: Any) -> Any:
        known = getattr(module, name)
        return mock.patch.object(module, name, lambda **settings: known(**settings | more))

    with (
        mock.patch.object(module, "DistributedDataParallel", wrapped),
        configured(DDP, use_megatron_fsdp=True, data_parallel_sharding_strategy=strategy),
        configured(MODEL, gradient_accumulation_fusion=False),
    ):
        yield


@pytest.fixture(scope="module")
def stocks(ranks: RankPools) -> dict[int, float]:
    """Return the losses of stock without Megatron-FSDP, which with it has a fault of its own."""
    return losses(ranks(2).run(run, "--steps 4 --stock")[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loop_of_ones_own_trains_with_megatron_fsdp_as_without(
    ranks: RankPools, stocks: dict[int, float], strategy: str
) -> None:
    fsep = ranks(2).run(run, "--steps 4", AT_HOME, partial(sharded, strategy=strategy))[0]
    assert losses(fsep) == pytest.approx(stocks, rel=1e-6)
    loads = metric(fsep, "load_imbalance"), metric(fsep, "stock_load_imbalance")
    assert loads[0][-1] < loads[1][-1], "no replica was made, so nothing is shown"


def refused_value(rule: Rule) -> Any:
    words = str(rule.example).split()
    return words[words.index(rule.flag) + 1] if rule.flag in words else rule.example


def messages() -> dict[str, str]:
    """Return the refusal of each setting that a configuration has, on this rank."""
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    found = {}
    with loaded() as own, sharded(own, STRATEGIES[-1]), two_ranks(AT_HOME):
        (model,) = own.build_model()
        optimizer = own.OptimizerConfig(lr=1e-3, use_distributed_optimizer=True)
        for rule in PARTNERS:
            of = {MODEL: model.config, DDP: model.ddp_config, OPTIMIZER: optimizer}
            field = RENAMED.get(rule.argument, rule.argument)
            name = next((name for name, config in of.items() if hasattr(config, field)), None)
            if name is None:
                continue
            # Not by the constructor, which knows more of settings that go together.
            of[name] = copy.copy(of[name])
            setattr(of[name], field, refused_value(rule))
            try:
                if name == OPTIMIZER:
                    own.get_megatron_optimizer(of[OPTIMIZER], [model])
                else:
                    FullyShardedDataParallel(of[MODEL], of[DDP], torch.nn.Linear(2, 2))
            except Exception as error:
                found[rule.flag] = f"{type(error).__name__}: {error}"
    return found


PARTNERS = [rule for rule in WITH_FSDP if rule.argument != "use_megatron_fsdp"]


def test_the_same_settings_are_refused_as_by_flags_before_training(ranks: RankPools) -> None:
    by_rank = ranks(2).run(messages)
    assert by_rank[0] == by_rank[1]
    assert {rule.flag for rule in PARTNERS} - {*by_rank[0]} == OF_MEGATRONS_LOOP
    for rule in PARTNERS:
        if rule.flag not in OF_MEGATRONS_LOOP:
            text, value = by_rank[0][rule.flag], refused_value(rule)
            assert text.startswith("ValueError: FSEP cannot run this model:\n  "), (rule.flag, text)
            assert f"\n  {rule.flag}{'' if value is True else f' {value}'}" in text, text


def test_rows_are_refused_in_a_loop_of_ones_own(ranks: RankPools) -> None:
    by_optim = partial(sharded, strategy="optim")
    results = ranks(2).run_raw(run, "--steps 1", {"sharding": "rows"}, by_optim)
    assert "--use-megatron-fsdp with --fsep-sharding rows: " in refusal(results, "ValueError")
