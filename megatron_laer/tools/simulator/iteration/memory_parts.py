"""Memory of the rank and stage that need most, by part.

The allocator's loss is not included, nor communicators of other groups than the experts'.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_laer.choices import Recompute
from megatron_laer.planner.state_bytes import GRADIENT_BYTES, RankWeights, StateBytes, state_bytes
from megatron_laer.tools.simulator.iteration.methods import Method
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.pipeline import in_flight
from megatron_laer.tools.simulator.iteration.run_shape import RunShape

_LOGIT_BYTES = 4
# Transformer Engine keeps each quantised weight for a step, along its rows and along its columns.
_QUANTISED_BYTES = 2


def stage_state(model: ModelShape, run: RunShape, method: Method, stage: int) -> StateBytes:
    """Return the bytes of weights, gradients and optimizer state on a rank of one stage."""
    return state_bytes(
        _stage_weights(model, run, method, stage),
        None,
        ranks=run.data_parallel if run.shards_optimizer else 1,
        expert_ranks=method.replicas * run.replicas if run.shards_optimizer else 1,
        bytes_per_weight=model.bytes_per_element,
    )


def _stage_weights(model: ModelShape, run: RunShape, method: Method, stage: int) -> RankWeights:
    """Count the weights on a rank of one stage; experts are slices or whole."""
    layers = _stage_layers(model, run, stage)
    ends = (stage == 0) + (stage == run.stages - 1)  # embedding and LM head
    return RankWeights(
        sum(map(model.layer_weights, layers)) / run.tensor,
        ends * model.head_weights / run.tensor,
        sum(layers) * method.experts_held * model.expert_weights,
    )


def _stage_layers(model: ModelShape, run: RunShape, stage: int) -> list[bool]:
    """Return for each layer of a stage whether it has experts."""
    numbers = run.stage_layers(len(model.layer_has_experts), stage)
    return [model.layer_has_experts[layer] for layer in numbers]


def memory_bytes(
    model: ModelShape,
    run: RunShape,
    method: Method,
    most_pairs: float,
    kept_pairs: Sequence[float] | None = None,
) -> dict[str, float]:
    """Return bytes by part on the stage that needs most.

    `most_pairs` are the busiest rank's in a layer. `kept_pairs` are those of each stage's busiest
    rank, as a mean over layers, which are seldom busiest on one rank. Without them it is
    `most_pairs`.
    """
    kept_pairs = kept_pairs or [most_pairs] * run.stages
    of_stages = [
        _stage_bytes(model, run, method, stage, most_pairs, kept)
        for stage, kept in enumerate(kept_pairs)
    ]
    return max(of_stages, key=lambda parts: sum(parts.values()))


def _stage_bytes(
    model: ModelShape,
    run: RunShape,
    method: Method,
    stage: int,
    most_pairs: float,
    kept_pairs: float,
) -> dict[str, float]:
    state = stage_state(model, run, method, stage)
    layers, schedule, form = _stage_layers(model, run, stage), method.schedule, method.form
    with_experts, hidden_bytes = sum(layers), model.hidden * model.bytes_per_element
    expert_bytes = model.expert_weights * model.bytes_per_element
    restored = schedule.restored_layers(with_experts * (1 if form is None else form.directions))
    gradients = schedule.gradient_layers(with_experts) * method.restored * expert_bytes
    if schedule.holds_step:  # sums over all microbatches, for every layer
        gradients += with_experts * method.restored * model.expert_weights * GRADIENT_BYTES
    sizes = stage, run.stages, run.chunks, run.microbatches
    held = in_flight(*sizes, by_parts=schedule.by_parts) / run.chunks
    if run.recompute == Recompute.NONE:
        kept = sum(_layer_activations(model, run, each, kept_pairs) for each in layers)
        working = 0.0
    else:
        kept = len(layers) * run.tokens * hidden_bytes
        working = _layer_activations(model, run, True, most_pairs)
        if run.recompute == Recompute.COMPUTE:
            # Dispatched tokens and outputs stay, since they are not exchanged again.
            kept += with_experts * 2 * kept_pairs * hidden_bytes
    logits = run.tokens * model.vocabulary * _LOGIT_BYTES * 2 if stage == run.stages - 1 else 0.0
    one_bytes = expert_bytes if form is None else form.expert_bytes
    parts = {
        **state._asdict(),
        "restored_experts": float(restored * method.restored * one_bytes),
        "restored_gradients": gradients,
        "activations": kept * held + working,
        "logits": logits,
    }
    if model.precision.is_quantised:
        weights = _stage_weights(model, run, method, stage)
        parts["quantised_weights"] = _QUANTISED_BYTES * (weights.layers + weights.experts)
    return {**parts, **method.fixed_bytes}


def _layer_activations(
    model: ModelShape, run: RunShape, has_experts: bool, most_pairs: float
) -> float:
    """Return the bytes that a layer keeps for backward of one microbatch.

    Per token: inputs and outputs of both norms, queries, keys, values and attention's output.
    FFN: outputs of its first matrix and of the activation. Experts also keep their input rows
    and their outputs, for the gradient of the probabilities.
    """
    per_token = 4 * model.hidden + 2 * (model.query_width + model.key_value_width)
    width = model.shared_ffn if has_experts else model.dense_ffn
    per_token += (3 if model.gated else 2) * width
    elements: float = run.tokens * per_token
    if has_experts:
        per_pair = 2 * model.hidden + (3 if model.gated else 2) * model.expert_ffn
        elements += most_pairs * per_pair
    return elements * model.bytes_per_element
