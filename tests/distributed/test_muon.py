"""Replicas share Muon's updates of home experts as stock does."""

from __future__ import annotations

from typing import Any
from unittest import mock

from megatron_laer.cpu.training import Record, train
from megatron_laer.plugin import pretraining
from tests.distributed.conftest import Trainings
from tests.parity.compare import distance
from tests.parity.row import AT_HOME, BF16_BOUND, FSEP
from tests.parity.rows import MUON_BF16, RANDOM


def train_with_layout(flags: list[str]) -> tuple[Record, set[bool]]:
    """Train with the buffers that Megatron lays out for its distributed Muon.

    In 0.19 Megatron makes them only for models that a function builds. Return True if it did.
    """
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    def by_function(args: Any) -> dict[str, Any]:
        container = pretrain_cfg_container_from_args(args)
        return {"cfg_container": container, "model_provider": pretraining.build_gpt}

    def has_layout(model: Any) -> set[bool]:
        buffers = [*model[0].buffers, *model[0].expert_parallel_buffers]
        return {buffer.params[0].is_managed_by_layer_wise_optimizer for buffer in buffers}

    with mock.patch("pretrain_gpt.pretrain_arguments", by_function):
        record = train(flags, has_layout)
    return record, record.probes[0]


def test_replicas_share_updates_by_megatrons_layout_of_buffers_too(trained: Trainings) -> None:
    flags = MUON_BF16 + " --use-distributed-optimizer"
    (stock, of_stock), (homes, of_homes) = (
        trained(flags + mode, by=train_with_layout, size=4, steps=12)
        for mode in ("", FSEP + AT_HOME + RANDOM)
    )
    assert of_stock == of_homes == {True, False}, "Muon's parameters have buffers of their own"
    found = distance(homes, stock)
    assert found.within(BF16_BOUND), found
