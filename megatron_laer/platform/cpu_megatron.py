"""What the CPU stand-in mends in Megatron: paths that work only with Transformer Engine or Apex.

Not here: `torch.cuda` (`cpu_torch.py`), which has to be replaced before Megatron is imported.
"""

import copy
import functools
from typing import Any

import torch


def mend() -> None:
    """Mend all of them. Imports `megatron.core`."""
    _mend_norm()
    _mend_optimizer_load()


def _mend_norm() -> None:
    from megatron.core.transformer import torch_norm

    stock = torch_norm.WrappedTorchNorm.__new__

    # Megatron's torch norm refuses sequence parallelism because nothing marks its parameters; with
    # the mark, their gradients are summed over the tensor-parallel group like the fused norms'.
    @functools.wraps(stock)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        norm = stock(cls, unsplit, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = staticmethod(new)


def _mend_optimizer_load() -> None:
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    stock_state_dict = optimizer.state_dict
    stock_load = optimizer.load_state_dict
    stock_set = optimizer._set_main_param_and_optimizer_states

    # Before a load Megatron reads the step from torch's Adam, which has none until its first step.
    # A text key passes through Adam's state_dict, and is gone before anyone else can see it.
    @functools.wraps(stock_state_dict)
    def state_dict(self: Any) -> Any:
        state = self.optimizer.state
        if state or not any(group["params"] for group in self.optimizer.param_groups):
            return stock_state_dict(self)
        state["not stepped yet"] = {"step": torch.zeros(())}
        try:
            return stock_state_dict(self)
        finally:
            state.clear()

    # Megatron gives all parameters one step tensor, which Adam would then count up once for each.
    # And its fp32 shards are views of parameters, which autograd protects from the copy.
    @functools.wraps(stock_load)
    @torch.no_grad()
    def load_state_dict(self: Any, loaded: Any) -> None:
        stock_load(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    # The step comes from the parameter groups; per parameter, checkpoints hold none or a stale one.
    # Megatron leaves alone what is no tensor.
    @functools.wraps(stock_set)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        stock_set(self, model_param, tensors | {"step": None})

    optimizer.state_dict = state_dict
    optimizer.load_state_dict = load_state_dict
    optimizer._set_main_param_and_optimizer_states = set_states
