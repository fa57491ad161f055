"""Patch of Megatron's data-parallel wrapper: the stream of its gradients' hooks, and refusals.

Autograd runs the wrapper's hook of a parameter on the stream on which the wrapper was built. In
Megatron's own loop that is a side stream. `main_grads.order_hooks` orders it behind sums of which
autograd knows nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_laer import session
from megatron_laer.plugin.patching import around
from megatron_laer.rules import REDUCES_BEFORE_WGRAD, problems_by
from megatron_laer.runtime.comm.collectives import raise_everywhere
from megatron_laer.runtime.comm.streams import has_streams
from megatron_laer.runtime.weights.main_grads import note_hook_stream
from megatron_laer.support.model import refuse


@around(
    "megatron.core.distributed.distributed_data_parallel",
    "DistributedDataParallel.__init__",
    "hooks of home experts' gradients wait for the sums over replicas; unfit homes, and reduces"
    " before the gradients, are refused",
)
def _note_stream(
    original: Any, ddp: Any, config: Any, ddp_config: Any, *args: Any, **kwargs: Any
) -> None:
    current, coordinator = session.current(), session.current_coordinator()
    if current is not None and coordinator is not None:
        settings = vars(ddp_config) | vars(config) | {"fsep_sharding": current.sharding}
        # Megatron's arguments were judged before; a loop of one's own has none.
        refuse(problems_by([REDUCES_BEFORE_WGRAD], SimpleNamespace(**settings)))
    # The model is complete, with its adapters, and neither data nor checkpoints are read.
    if current is not None and current.config.homes is not None:
        raise_everywhere(None if coordinator is None else coordinator.problem_of_model())
    original(ddp, config, ddp_config, *args, **kwargs)
    parameters = [*ddp.module.parameters()]
    if parameters and has_streams(parameters[0].device):
        note_hook_stream(parameters, torch.cuda.current_stream(parameters[0].device))


DATA_PARALLEL_PATCHES = (_note_stream,)
