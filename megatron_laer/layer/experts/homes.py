"""Compute of a layer whose experts are at home: stock's experts, then restored replicas.

Slots are in this order on every rank, so home tokens come first. Where no rank has a replica, a
pass is stock's own.

Legend: T tokens received, H hidden.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_laer.environment import GROUPED_TENSORS
from megatron_laer.layer.experts.adapters import Adapter, find_adapter
from megatron_laer.layer.experts.built_parts import ADAPTED_AT_HOME, BuiltParts
from megatron_laer.layer.experts.home_moves import move_home
from megatron_laer.layer.experts.restored_compute import RestoredCompute
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.runtime.weights.share import Packers, Share

_OTHER_PRODUCTS = (
    "its experts take Transformer Engine's grouped tensors (use_grouped_tensor, or a "
    f"{GROUPED_TENSORS} other than 0), whose bits replicas would not have: leave both out"
)


class HomeExperts:
    """Stock's module of h home experts, and the compute of replicas.

    No module, so that names of parameters stay stock's.
    """

    def __init__(self, experts: torch.nn.Module, num_home: int, compute: RestoredCompute) -> None:
        self._experts = experts
        self._num_home = num_home
        self._compute = compute
        self.built_parts = BuiltParts(experts, ADAPTED_AT_HOME)
        self._problem: str | None = None
        self._is_moved = False
        parts = ["weight", "bias"] if compute.has_bias else ["weight"]
        self._built = [
            [self._parameters(linear.name, part) for part in parts] for linear in compute.linears
        ]

    @cached_property
    def share(self) -> Share:
        """Parameters of home experts, with adapters that were added before the first use."""
        try:
            self._compute.adapt(self._find_adapters())
        except ValueError as error:
            self._problem = f"adapters of its experts: {error}"
        return self._as_share()

    def move(self, home: HomeOrder, groups: FSEPGroups, device: torch.device) -> None:
        """Send stock's initial values to the experts' homes, before there are adapters."""
        move_home(self._as_share(), home, groups, device)
        self._is_moved = True

    def _as_share(self) -> Share:
        matrices: list[tuple[torch.nn.Parameter, ...]] = []
        packers: list[Packers | None] = []
        for layer, (built, adapter) in enumerate(
            zip(self._built, self._compute.adapters, strict=True)
        ):
            matrices += built
            # Neither biases nor adapters are quantised.
            packers += [*self._compute.packers[layer : layer + 1], None][: len(built)]
            if adapter is not None:
                matrices += adapter.homes
        return Share.of_homes(matrices, packers if self._compute.packers else ())

    def what_changed(self) -> str | None:
        """Describe changes of the experts that replicas do not follow; None if there are none."""
        adapters = [adapter for adapter in self._compute.adapters if adapter is not None]
        wrappers = {wrapper for adapter in adapters for wrapper in adapter.wrappers}
        return self._problem or self._other_products() or self.built_parts.what_changed(wrappers)

    @property
    def adapters(self) -> str:
        """Describe the adapters as they must be on all ranks; empty without any."""
        found = [adapter.summary() for adapter in self._compute.adapters if adapter is not None]
        return "; ".join(found)

    def initialise(self, layer_name: str, seed: int) -> None:
        """Do nothing: stock has initialised its parameters."""

    def __call__(
        self, input_TH: torch.Tensor, probs_T: torch.Tensor, plan: MicrobatchPlan
    ) -> torch.Tensor:
        restored, tokens_C = plan.restored, plan.quotas.tokens_C
        home_C, replica_C = tokens_C[: self._num_home], tokens_C[self._num_home :]
        tokens_per_expert = torch.tensor(home_C)
        if not restored.index.placed.has_replicas:
            output_TH = self._at_home(input_TH, tokens_per_expert, probs_T)
            return restored.after_compute(output_TH)
        sizes = [sum(home_C), sum(replica_C)]
        home_TH, replica_TH = input_TH.split(sizes)
        home_T, replica_T = probs_T.split(sizes)
        # Homes first, since replicas are still arriving.
        homes_TH = self._at_home(home_TH, tokens_per_expert, home_T)
        replicas_TH = self._compute(replica_TH, replica_T, restored, replica_C)
        output_TH = torch.cat([homes_TH, replicas_TH])
        return restored.after_compute(output_TH)

    def _at_home(
        self, input_TH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_T: torch.Tensor
    ) -> torch.Tensor:
        output_TH, bias = self._experts(input_TH, tokens_per_expert, probs_T)
        assert bias is None
        output: torch.Tensor = output_TH
        return output

    def _find_adapters(self) -> list[Adapter | None]:
        grouped = not isinstance(self._experts, SequentialMLP)
        found = [
            find_adapter(self._linears(linear.name), grouped=grouped)
            for linear in self._compute.linears
        ]
        if self._is_moved and any(found):
            raise ValueError(
                "--fsep-homes gives experts other homes than stock's, by whose numbers adapters "
                "would be initialised and saved; leave it out"
            )
        return found

    def _other_products(self) -> str | None:
        asked = os.environ.get(GROUPED_TENSORS, "0") != "0"
        parts = () if isinstance(self._experts, SequentialMLP) else self._experts.modules()
        others = any(asked or getattr(part, "use_grouped_tensor", False) for part in parts)
        return _OTHER_PRODUCTS if others else None

    def _linears(self, name: str) -> list[torch.nn.Module]:
        """Return a linear layer of each home expert, or the grouped one of all of them."""
        experts: Any = self._experts
        if isinstance(experts, SequentialMLP):
            return [getattr(expert, name) for expert in experts.local_experts]
        return [getattr(experts, name)]

    def _parameters(self, linear: str, part: str) -> tuple[torch.nn.Parameter, ...]:
        found = self._linears(linear)
        if isinstance(self._experts, SequentialMLP):
            return tuple(module.get_parameter(part) for module in found)
        return tuple(found[0].get_parameter(f"{part}{home}") for home in range(self._num_home))
