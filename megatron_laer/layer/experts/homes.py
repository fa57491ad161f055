"""Compute of a layer whose experts are at home: stock's experts, then restored replicas.

Slots are in this order on every rank, so home tokens come first. Where no rank has a replica, a
pass is stock's own.

Legend: T tokens received, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_laer.layer.experts.built_parts import ADAPTED_AT_HOME, BuiltParts
from megatron_laer.layer.experts.main_grads import MegatronMainGrads
from megatron_laer.layer.experts.restored_compute import RestoredCompute
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.layer import Homes, Packer


class HomeExperts:
    """Stock's module of h home experts, and the compute of replicas.

    No module, so that names of parameters stay stock's.
    """

    def __init__(self, experts: torch.nn.Module, num_home: int, compute: RestoredCompute) -> None:
        self._experts = experts
        self._num_home = num_home
        self._compute = compute
        self.built_parts = BuiltParts(experts, ADAPTED_AT_HOME)

    @property
    def share(self) -> Homes:
        parts = ["weight", "bias"] if self._compute.has_bias else ["weight"]
        packers: list[Packer | None] = []
        for packer in self._compute.packers:
            packers += [packer, None][: len(parts)]  # biases are not quantised
        return Homes(
            tuple(
                tuple(self._parameter(linear.name, part, home) for home in range(self._num_home))
                for linear in self._compute.linears
                for part in parts
            ),
            MegatronMainGrads(),
            tuple(packers),
        )

    def initialise(self, layer_name: str, seed: int) -> None:
        """Do nothing: stock has initialised its parameters."""

    def __call__(
        self, input_TH: torch.Tensor, probs_T: torch.Tensor, plan: MicrobatchPlan
    ) -> torch.Tensor:
        restored, tokens_C = plan.restored, plan.quotas.tokens_C
        home_C, replica_C = tokens_C[: self._num_home], tokens_C[self._num_home :]
        tokens_per_expert = torch.tensor(home_C)
        if not restored.index.has_replicas:
            output_TH = self._at_home(input_TH, tokens_per_expert, probs_T)
            return restored.after_compute(output_TH, backward_follows=plan.backward_follows)
        sizes = [sum(home_C), sum(replica_C)]
        home_TH, replica_TH = input_TH.split(sizes)
        home_T, replica_T = probs_T.split(sizes)
        at_home = partial(self._at_home, home_TH, tokens_per_expert, home_T)
        replicas = partial(self._compute, replica_TH, replica_T, restored, replica_C)
        if input_TH.requires_grad or not torch.is_grad_enabled():
            parts_TH = [at_home(), replicas()]  # in this order replicas have more time to arrive
        else:
            # Without tokens' gradients to wait for, the reduce starts with the replicas' backward.
            # Autograd runs that last, so that no kernel adds to a main gradient during the reduce.
            parts_TH = [replicas(), at_home()][::-1]
        output_TH = torch.cat(parts_TH)
        return restored.after_compute(output_TH, backward_follows=plan.backward_follows)

    def _at_home(
        self, input_TH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_T: torch.Tensor
    ) -> torch.Tensor:
        output_TH, bias = self._experts(input_TH, tokens_per_expert, probs_T)
        assert bias is None
        output: torch.Tensor = output_TH
        return output

    def _parameter(self, linear: str, part: str, home: int) -> torch.nn.Parameter:
        experts: Any = self._experts
        if isinstance(experts, SequentialMLP):
            parameter = getattr(getattr(experts.local_experts[home], linear), part)
        else:
            parameter = getattr(getattr(experts, linear), f"{part}{home}")
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter
