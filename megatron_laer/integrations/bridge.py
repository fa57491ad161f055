"""Callback that adds FSEP to Megatron-Bridge's `pretrain` and `finetune`.

    from megatron_laer.integrations.bridge import FSEPCallback

    pretrain(recipe, forward_step, callbacks=[FSEPCallback(recipe, FSEPConfig(capacity=4))])

`bridge_config` reads Megatron-Bridge's configuration.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from megatron_laer import device
from megatron_laer.config import FSEPConfig, deterministic
from megatron_laer.integrations.bridge_config import settings_of
from megatron_laer.plugin.install_tracker import install_metrics
from megatron_laer.plugin.steps import training_step
from megatron_laer.plugin.switch import enable
from megatron_laer.support import RefusedError, arguments

logger = logging.getLogger(__name__)


class FSEPCallback:
    """Callback that turns FSEP on for the recipe's model, and marks training steps.

    Create it before `pretrain`, which creates the process groups and the model. Megatron-Bridge
    finds its methods by the names of events.

    Args:
        recipe: Megatron-Bridge's ConfigContainer, with all of the run's changes to it.
        config: settings of FSEP; the defaults if None. LoRA on experts has them at home.

    Raises:
        ValueError: settings that FSEP cannot run with, and alternatives.
    """

    def __init__(self, recipe: Any, config: FSEPConfig | None = None) -> None:
        config = config or FSEPConfig()
        if getattr(recipe.model, "deterministic_mode", False):
            config = deterministic(config)
        check_recipe(recipe, config)
        config, _ = arguments.with_needed_sharding(settings_of(recipe), config)
        enable(config, seed=recipe.rng.seed)
        self._step = contextlib.ExitStack()

    def on_train_start(self, context: Any) -> None:
        """Add FSEP's metrics to Megatron-Bridge's writers."""
        container = context.state.cfg
        settings = settings_of(container)
        install_metrics(
            container.logger.log_interval, settings.num_layers, settings.mtp_num_layers or 0
        )

    def on_train_step_start(self, context: Any) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        step = training_step(context.state.train_state.step, get_num_microbatches(), context.model)
        self._step.enter_context(step)

    def on_train_step_end(self, context: Any) -> None:
        self._step.close()


def check_recipe(recipe: Any, config: FSEPConfig) -> None:
    """Refuse settings that FSEP cannot run with, by the same table as Megatron's arguments.

    Raises:
        RefusedError: the setting, why it cannot work, and alternatives.
    """
    settings = settings_of(recipe)
    if found := arguments.problems(settings, config):
        raise RefusedError(
            "FSEP cannot run this recipe of Megatron-Bridge:\n  "
            + "\n  ".join(found)
            + "\nA flag is a field of that name, mostly of `model`; others are in `optimizer`, "
            "`ddp`, `dist`, `mixed_precision` and `comm_overlap`."
        )
    if settings.rank == 0:
        on_cuda = not device.cpu_installed()
        environment = os.environ | {name: str(value) for name, value in recipe.env_vars.items()}
        for warning in arguments.warnings(config, environment, on_cuda=on_cuda):
            logger.warning("FSEP: %s", warning)
