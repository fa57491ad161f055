"""Patch that refuses optimizers of Megatron's registry with which experts cannot be trained.

Adam and SGD take any parameter. Those of the registry take whole matrices, which rows are not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_laer import session
from megatron_laer.plugin.patching import around
from megatron_laer.rules import RULES, problems_by


def check_installed(optimizer: str) -> None:
    """Raise ValueError for an optimizer whose package, emerging-optimizers, is missing."""
    from megatron.core.optimizer import HAVE_EMERGING_OPTIMIZERS

    if optimizer not in ("adam", "sgd") and not HAVE_EMERGING_OPTIMIZERS:
        raise ValueError(
            f"--optimizer {optimizer}: Megatron takes it from the package emerging-optimizers, and "
            "finds none of version 0.2 or newer; run pip install 'emerging-optimizers>=0.2', or "
            "give --optimizer adam or sgd"
        )


@around(
    "megatron.core.optimizer",
    "_create_emerging_optimizer",
    "Muon and Lion on rows are refused, and all others but Adam and SGD",
)
def _judge(original: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse, in loops without Megatron's arguments too, what the table of rules refuses."""
    current = session.current()
    assert current is not None
    is_shared = config.use_layer_wise_distributed_optimizer
    asked = {"fsep_sharding": current.sharding, "use_distributed_optimizer": is_shared}
    if problems := problems_by(RULES, SimpleNamespace(**vars(config) | asked)):
        raise ValueError(problems[0])
    return original(config, *args, **kwargs)


OPTIMIZER_PATCHES = (_judge,)
