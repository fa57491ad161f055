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
from megatron_laer.rules import STRATEGIES, WITH_FSDP
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
# Classes of configurations in the script, and the names of arguments that they have by others.
DDP, MODEL, OPTIMIZER = "DistributedDataParallelConfig", "TransformerConfig", "OptimizerConfig"
RENAMED = {"ddp_average_in_collective": "average_in_collective"}
# Partners of which no configuration of Megatron Core has a field.
OF_MEGATRONS_LOOP = {"log_params_norm", "async_save", "non_persistent_save_interval", "ckpt_format"}

# By argument: the class that has it, and its value.
REFUSED: dict[str, tuple[str, Any]] = {
    "data_parallel_sharding_strategy": (DDP, "no_shard"),
    "ddp_average_in_collective": (DDP, True),
    "megatron_fsdp_grad_comm_dtype": (DDP, torch.bfloat16),
    "megatron_fsdp_main_params_dtype": (DDP, torch.bfloat16),
    "num_distributed_optimizer_instances": (DDP, 2),
    "nccl_ub": (DDP, True),
    "fsdp_double_buffer": (DDP, True),
    "megatron_fsdp_max_pool_double_buffer": (DDP, True),
    "megatron_fsdp_enable_fine_grained_param_gather": (DDP, True),
    "init_model_with_meta_device": (MODEL, True),
    "pipeline_model_parallel_size": (MODEL, 2),
    "overlap_moe_expert_parallel_comm": (MODEL, True),
    "delay_wgrad_compute": (MODEL, True),
    "overlap_dispatch_backward_with_experts_wgrad": (MODEL, True),
    "cuda_graph_impl": (MODEL, "local"),
    "fp16": (MODEL, True),
    "fp8": (MODEL, "hybrid"),
    "gradient_accumulation_fusion": (MODEL, True),
    "optimizer": (OPTIMIZER, "sgd"),
    "optimizer_cpu_offload": (OPTIMIZER, True),
    "use_precision_aware_optimizer": (OPTIMIZER, True),
}
# Flags that are not spelt as their argument, or beginnings of a refusal.
SPELT = {
    "nccl_ub": "--use-nccl-ub",
    "fp8": "--fp8-format hybrid",
    "gradient_accumulation_fusion": "--use-megatron-fsdp with fused gradient",
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


def messages() -> dict[str, str]:
    """Return the refusal of each setting on this rank."""
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    found = {}
    with loaded() as own, sharded(own, STRATEGIES[-1]), two_ranks(AT_HOME):
        (model,) = own.build_model()
        optimizer = own.OptimizerConfig(optimizer="adam", use_distributed_optimizer=True)
        for argument, (name, value) in REFUSED.items():
            of = {MODEL: model.config, DDP: model.ddp_config, OPTIMIZER: optimizer}
            # Not by the constructor, which knows more of settings that go together.
            of[name] = copy.copy(of[name])
            setattr(of[name], RENAMED.get(argument, argument), value)
            try:
                if name == OPTIMIZER:
                    own.get_megatron_optimizer(of[OPTIMIZER], [model])
                else:
                    FullyShardedDataParallel(of[MODEL], of[DDP], torch.nn.Linear(2, 2))
            except Exception as error:
                found[argument] = f"{type(error).__name__}: {error}"
    return found


def test_the_same_settings_are_refused_as_by_flags_before_training(ranks: RankPools) -> None:
    partners = {rule.argument for rule in WITH_FSDP if rule.next_to} - {"use_megatron_fsdp"}
    assert partners - OF_MEGATRONS_LOOP < {*REFUSED}
    by_rank = ranks(2).run(messages)
    assert by_rank[0] == by_rank[1]
    for argument, (_, value) in REFUSED.items():
        text, flag = by_rank[0][argument], "--" + argument.replace("_", "-")
        given = flag if value is True else f"{flag} {value}"
        assert text.startswith("ValueError: FSEP cannot run this model:\n  "), text
        assert f"\n  {SPELT.get(argument, given)}" in text, text


def test_rows_are_refused_in_a_loop_of_ones_own(ranks: RankPools) -> None:
    by_optim = partial(sharded, strategy="optim")
    results = ranks(2).run_raw(run, "--steps 1", {"sharding": "rows"}, by_optim)
    assert "--use-megatron-fsdp with --fsep-sharding rows: " in refusal(results, "ValueError")
