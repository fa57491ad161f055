"""Memory of the rank and stage that need most, by part.

The allocator's loss is not included, nor communicators of other groups than the experts'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_laer.choices import Recompute
from megatron_laer.planner.state_bytes import RankWeights, state_bytes
from megatron_laer.tools.simulator.iteration.methods import Method
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.pipeline import in_flight, order
from megatron_laer.tools.simulator.iteration.run_shape import RunShape

_GRADIENT_BYTES = 4  # of the main gradient, in fp32
_LOGIT_BYTES = 4
# Transformer Engine keeps each quantised weight for a step, along its rows and along its columns.
_QUANTISED_BYTES = 2


@dataclass(frozen=True)
class Weights:
    """Number of weights on a rank of one stage: of experts, as slices or whole, and all others.

    `linear` are the dense ones but for the embedding and the LM head.
    """

    dense: float
    expert: float
    linear: float


def stage_weights(model: ModelShape, run: RunShape, method: Method, stage: int) -> Weights:
    layers = _layers_of(model, run, stage)
    linear = dense = sum(_linear_weights(model, layer) for layer in layers)
    if stage == 0:
        dense += model.head_weights
    if stage == run.stages - 1:
        dense += model.head_weights
    expert = sum(layers) * method.experts_held * model.expert_weights
    return Weights(dense / run.tensor, expert, linear / run.tensor)


def memory_bytes(
    model: ModelShape, run: RunShape, method: Method, most_pairs: float
) -> dict[str, float]:
    """Return bytes by part on the stage that needs most; `most_pairs` are the busiest rank's."""
    of_stages = [_stage_bytes(model, run, method, stage, most_pairs) for stage in range(run.stages)]
    return max(of_stages, key=lambda parts: sum(parts.values()))


def _stage_bytes(
    model: ModelShape, run: RunShape, method: Method, stage: int, most_pairs: float
) -> dict[str, float]:
    weights = stage_weights(model, run, method, stage)
    layers = _layers_of(model, run, stage)
    element = method.restored * model.bytes_per_element
    with_experts = sum(layers)
    directions = 1 if method.form is None else method.form.directions
    restored = method.schedule.restored_layers(with_experts * directions)
    gradients = method.schedule.gradient_layers(with_experts) * element * model.expert_weights
    if method.schedule.holds_step:  # sums over all microbatches, for every layer
        gradients += with_experts * method.restored * model.expert_weights * _GRADIENT_BYTES
    sizes = stage, run.stages, run.chunks, run.microbatches
    held = in_flight(order(*sizes, by_parts=method.schedule.by_parts)) / run.chunks
    working = _layer_activations(model, run, True, most_pairs)
    if run.recompute == Recompute.NONE:
        kept = sum(_layer_activations(model, run, each, most_pairs) for each in layers)
        working = 0.0
    else:
        kept = len(layers) * run.tokens * model.hidden * model.bytes_per_element
        if run.recompute == Recompute.COMPUTE:
            # Dispatched tokens and outputs stay, since they are not exchanged again.
            kept += with_experts * 2 * most_pairs * model.hidden * model.bytes_per_element
    logits = run.tokens * model.vocabulary * _LOGIT_BYTES * 2 if stage == run.stages - 1 else 0.0
    parts = {
        **_state_bytes(model, run, method, stage),
        "restored_experts": restored * _restored_bytes(method, model),
        "restored_gradients": gradients,
        "activations": kept * held + working,
        "logits": logits,
    }
    if model.precision.is_quantised:
        parts["quantised_weights"] = _QUANTISED_BYTES * (weights.linear + weights.expert)
    return {**parts, **method.fixed_bytes}


def _restored_bytes(method: Method, model: ModelShape) -> float:
    """Return the bytes of a layer's restored experts in one form."""
    whole, form = model.expert_weights * model.bytes_per_element, method.form
    return float(method.restored * (whole if form is None else form.expert_bytes))


def _linear_weights(model: ModelShape, has_experts: bool) -> int:
    return model.attention_weights + model.dense_weights(has_experts)


def _state_bytes(model: ModelShape, run: RunShape, method: Method, stage: int) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer state."""
    weights = stage_weights(model, run, method, stage)
    found = state_bytes(
        RankWeights(weights.linear, weights.dense - weights.linear, weights.expert),
        None,
        ranks=run.data_parallel if run.shards_optimizer else 1,
        expert_ranks=method.replicas * run.replicas if run.shards_optimizer else 1,
        bytes_per_weight=model.bytes_per_element,
        bytes_per_gradient=_GRADIENT_BYTES,
    )
    return dict(found._asdict())


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


def _layers_of(model: ModelShape, run: RunShape, stage: int) -> Sequence[bool]:
    by_chunk = run.layers_by_chunk(len(model.layer_has_experts))
    numbers = (by_chunk[chunk * run.stages + stage] for chunk in range(run.chunks))
    return [model.layer_has_experts[layer] for of_chunk in numbers for layer in of_chunk]
