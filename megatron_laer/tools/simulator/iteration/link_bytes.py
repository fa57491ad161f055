"""Bytes of an iteration on the links, received by a rank on average."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_laer.choices import Recompute
from megatron_laer.planner.wire_form import backward_restores
from megatron_laer.tools.simulator.iteration.clocks import INTER, INTRA
from megatron_laer.tools.simulator.iteration.iterate import WorkOf
from megatron_laer.tools.simulator.iteration.memory_parts import trained_weights
from megatron_laer.tools.simulator.iteration.methods import Method
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.rates import ring_neighbours
from megatron_laer.tools.simulator.iteration.run_shape import RunShape

_GRADIENT_BYTES = 4


def link_bytes(
    method: Method, model: ModelShape, run: RunShape, work: WorkOf
) -> dict[str, dict[str, float]]:
    """Return bytes by link class and kind of exchange.

    Weights that an operation hands on to the next count as restored, so restores are at most these.
    """
    found = {link: dict.fromkeys(("tokens", "restore", "reduce"), 0.0) for link in (INTRA, INTER)}

    def add(kind: str, intra: float, inter: float) -> None:
        for link, received in ((INTRA, intra), (INTER, inter)):
            found[link][kind] = found[link].get(kind, 0.0) + received

    token_bytes = model.hidden * model.bytes_per_element
    passes = 6 if run.recompute == Recompute.FULL else 4
    holds = method.schedule.holds_step
    for layer, has_experts in enumerate(model.layer_has_experts):
        if not has_experts:
            continue
        for microbatch in range(run.microbatches):
            of = work(layer, microbatch)
            assert of is not None
            share = token_bytes * passes / run.stages
            prices = of.passing.prices
            intra = of.mean_intra * prices.intra_rows
            inter = of.mean_inter * prices.inter_rows
            add("tokens", intra * share, inter * share)
            exchanges = []
            if of.restore is not None and (not holds or microbatch == 0):
                directions = of.restore.directions
                passing = 1 + backward_restores(directions, run.recompute)
                exchanges += [("restore", of.restore)] * (directions if holds else passing)
            if of.change is not None:
                exchanges.append(("restore", of.change))
            if of.reduce is not None and (not holds or microbatch == run.microbatches - 1):
                exchanges.append(("reduce", of.reduce))
            for kind, exchange in exchanges:
                add(
                    kind,
                    exchange.mean_intra_bytes / run.stages,
                    exchange.mean_inter_bytes / run.stages,
                )
    for stage in range(run.stages):
        weights = trained_weights(model, run, method, stage)
        each = model.bytes_per_element if run.shards_optimizer else _GRADIENT_BYTES
        repeated = 0.0  # of what Megatron-FSDP exchanges in each microbatch, not once a step
        if run.shards_gradients:
            repeated += (run.microbatches - 1) * _GRADIENT_BYTES
        if run.shards_weights:
            repeated += (2 * run.microbatches - 1) * each
        for elements, size, copies, stride in (
            (weights.dense, _GRADIENT_BYTES + each, run.data_parallel, run.tensor),
            (weights.linear, repeated, run.data_parallel, run.tensor),
            (
                weights.expert,
                _GRADIENT_BYTES + each,
                method.replicas * run.replicas,
                run.ranks // method.replicas,
            ),
        ):
            received = elements * size * (copies - 1) / copies / run.stages
            far = _leaving(copies, run.node_size, stride)
            add("data_parallel", received * (1 - far), received * far)
    gathered = passes * run.microbatches * len(model.layer_has_experts) / run.stages
    size = gathered * run.tokens * (run.tensor - 1) * token_bytes
    far = _leaving(run.tensor, run.node_size, 1)
    add("tensor", size * (1 - far), size * far)
    sends = 2 * run.microbatches * (run.stages * run.chunks - 1) / run.stages
    sent = sends * run.tokens * token_bytes
    crosses = run.ranks * run.replicas >= run.node_size
    add("pipeline", 0.0 if crosses else sent, sent if crosses else 0.0)
    return found


def _leaving(ranks: int, node_size: int, stride: int) -> float:
    near = ring_neighbours(node_size, stride)
    return 1 / near if ranks > near else 0.0


def totals(by_kind: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {link: sum(of.values()) for link, of in by_kind.items()}
