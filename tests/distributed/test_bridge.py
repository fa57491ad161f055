"""Megatron-Bridge's own loop trains a small recipe with FSEP, and equals stock.

Needs a checkout of Megatron-Bridge 0.6 in the folder MEGATRON_BRIDGE_CHECKOUT, and its
dependencies: transformers, datasets, omegaconf and hydra-core.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu import weights
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, fresh_megatron, gather
from tests.bridge_stubs import importable
from tests.checkouts import checkout
from tests.parity.compare import distance
from tests.parity.row import FP32_BOUND

FIRST, SECOND, LAST = 4, 12, 16

CHECKOUT, pytestmark = checkout("MEGATRON_BRIDGE_CHECKOUT", "Megatron-Bridge 0.6")


@contextlib.contextmanager
def bridge() -> Iterator[None]:
    """Import Megatron-Bridge, which logs a lot and caches files."""
    logging.disable(logging.INFO)
    try:
        with importable(CHECKOUT):
            yield
            from megatron.bridge.training.utils import checkpoint_utils

            checkpoint_utils.read_run_config.cache_clear()
            checkpoint_utils.read_train_state.cache_clear()
    finally:
        logging.disable(logging.NOTSET)


def small_recipe(folder: Path, load: Path | None, iterations: int) -> Any:
    """Return a small OLMoE recipe in fp32, with layers that Megatron has without packages."""
    import torch
    from megatron.bridge.recipes.olmoe import olmoe_7b_pretrain_config
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def local_layers(config: Any) -> Any:
        return get_gpt_layer_local_spec(
            config.num_moe_experts, qk_layernorm=True, normalization=config.normalization
        )

    recipe = olmoe_7b_pretrain_config()
    vars(recipe.model).update(
        transformer_layer_spec=local_layers,
        transformer_impl="local",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=64,
        moe_ffn_hidden_size=64,
        kv_channels=16,
        num_query_groups=4,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_router_topk=2,
        seq_length=64,
        vocab_size=256,
        expert_model_parallel_size=2,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        moe_grouped_gemm=False,
        moe_permute_fusion=False,
        persist_layer_norm=False,
        pipeline_dtype=torch.float32,
    )
    recipe.mixed_precision = None
    vars(recipe.optimizer).update(
        bf16=False,
        lr=1e-3,
        min_lr=1e-4,
        use_precision_aware_optimizer=False,
        main_grads_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
    )
    vars(recipe.scheduler).update(lr_warmup_iters=0, lr_decay_iters=LAST)
    vars(recipe.train).update(train_iters=iterations, global_batch_size=8, micro_batch_size=2)
    vars(recipe.validation).update(eval_interval=SECOND, eval_iters=1)
    vars(recipe.dataset).update(seq_length=64, num_workers=0)
    recipe.tokenizer.vocab_size = recipe.model.vocab_size
    recipe.dist.distributed_backend = "gloo"
    vars(recipe.logger).update(log_interval=1, tensorboard_dir=str(folder / "tensorboard"))
    vars(recipe.checkpoint).update(
        save=str(folder), save_interval=iterations, load=str(load) if load else None
    )
    recipe.checkpoint.dist_ckpt_optim_fully_reshardable = True
    return recipe


@dataclass
class Run(Record):
    versions: list[int] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)


def train(folder: Path, load: Path | None, iterations: int, sharding: str | None) -> Run:
    with bridge():
        from megatron.bridge.training.callbacks import Callback
        from megatron.bridge.training.gpt_step import forward_step
        from megatron.bridge.training.pretrain import pretrain

        from megatron_laer import FSEPConfig, session
        from megatron_laer.integrations.bridge import FSEPCallback
        from megatron_laer.plugin.metrics_tracker import FSEPMetricsTracker

        seen = Run()
        model: list[Any] = []
        report = FSEPMetricsTracker.report

        class Observer(Callback):
            def on_train_step_end(self, context: Any) -> None:
                model[:] = context.model
                seen.losses.append(float(context.loss_dict["lm loss"]))
                seen.grad_norms.append(float(context.grad_norm))
                if (coordinator := session.current_coordinator()) is not None:
                    seen.versions.append(coordinator.layouts.version)

            def on_eval_end(self, context: Any) -> None:
                seen.eval_losses.append(float(context.total_loss_dict["lm loss"]))

            def on_train_end(self, context: Any) -> None:
                seen.weights = weights.assemble(gather(weights.read(context.model, "weight")))

        def observed(*args: Any, **kwargs: Any) -> str:
            seen.reports.append(report(*args, **kwargs))
            return seen.reports[-1]

        with fresh_megatron(model), mock.patch.object(FSEPMetricsTracker, "report", observed):
            recipe = small_recipe(folder, load, iterations)
            callbacks: list[Any] = [Observer()]
            if sharding is not None:
                settings = FSEPConfig(late_plan="wait", sharding=sharding)  # type: ignore[arg-type]
                callbacks.append(FSEPCallback(recipe, settings))
            pretrain(recipe, forward_step, callbacks=callbacks)
        return seen


@pytest.mark.parametrize("sharding", ["rows", "experts"])
def test_bridge_trains_with_fsep_like_stock_from_equal_weights(
    ranks: RankPools, tmp_path: Path, sharding: str
) -> None:
    def run(folder: str, load: str | None, iterations: int, mode: str | None = None) -> Run:
        path = None if load is None else tmp_path / load
        found: Run = ranks(2).run(train, tmp_path / folder, path, iterations, mode)[0]
        return found

    run("start", None, FIRST)
    stock = run("stock", "start", LAST)
    fsep = run("fsep", "start", SECOND, sharding)
    after = run("after", "fsep", LAST)  # stock goes on from FSEP's checkpoint
    assert len(fsep.losses) == SECOND - FIRST and len(after.losses) == LAST - SECOND
    journey = Record(
        losses=fsep.losses + after.losses,
        grad_norms=fsep.grad_norms + after.grad_norms,
        eval_losses=fsep.eval_losses[:1],
        weights=after.weights,
    )
    stock.eval_losses = stock.eval_losses[:1]  # evaluated at SECOND, and once more at the end
    apart = distance(journey, stock)
    print(apart)
    assert apart.within(FP32_BOUND)
    # A plan from the routing of a step is in force in the next one.
    assert fsep.versions == list(range(SECOND - FIRST))
    assert all("fsep_load_imbalance: " in line for line in fsep.reports)
    assert len(fsep.reports) == SECOND - FIRST
    assert not stock.reports and not after.reports
