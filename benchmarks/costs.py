"""Costs of layouts on the paper's cluster with Mixtral-8x7B's experts."""

from __future__ import annotations

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel


def paper_costs(restore_algorithm: ExchangeAlgorithm = ExchangeAlgorithm.FLAT) -> CostModel:
    """Return the costs of Mixtral-8x7B's experts on the paper's cluster, in bf16."""
    return CostModel(
        cluster=load_cluster("a100-4x8-ib800"),
        hidden=4096,
        ffn=14336,
        gated=True,
        bytes_per_element=2,
        restore_algorithm=restore_algorithm,
    )
