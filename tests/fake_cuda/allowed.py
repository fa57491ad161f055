"""Findings on the labelled device that are right, or not this package's: kind and place of each.

They are those of the steady state, from the end of the first step to the last one.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.fake_cuda.findings import Finding, Kind

Place = tuple[Kind, str]

DOWNLOAD: Place = (Kind.WAIT, "megatron_laer/runtime/comm/copies.py:Download._read")
"""Counts of each layer, sizes of token exchanges by node, and a step's new layouts."""

GATHER: Place = (Kind.WAIT, "megatron_laer/runtime/comm/collectives.py:gather_integers")
"""Counts of announced layouts before a step, and sums of `--fsep-set verify`."""

_ADD_UP = "megatron_laer/runtime/comm/collectives.py:add_up"
VERIFIED: frozenset[Place] = frozenset({GATHER, (Kind.WAIT, _ADD_UP)})
"""Sums of `--fsep-set verify` before the optimizer's step, by default of the first two."""

IN_FLOAT64: Place = (Kind.COLLECTIVE, _ADD_UP)
"""Such sums of gradients and outputs, found at the first of a shape."""

HYBRID_EP: Place = (Kind.WAIT, "megatron_laer/layer/dispatch/flex.py:SlotFlexDispatcher.end_step")
"""HybridEP's counts, compared at the end of a step."""

_PIPELINE = "megatron/core/pipeline_parallel"
_DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py"
_TRAINING = "megatron/training/training.py"
_RERUN = "megatron/core/rerun_state_machine.py:RerunStateMachine"
_UTILS = "megatron/training/utils/common_utils.py"

# Megatron's own, and its loader's batches, which are pinned where there is a card.
STOCK: frozenset[Place] = frozenset(
    {
        (Kind.COLLECTIVE, f"{_TRAINING}:pretrain"),  # of the start time, in float64
        (Kind.PAGEABLE, f"{_PIPELINE}/schedules.py:forward_step"),
        (Kind.PAGEABLE, f"{_PIPELINE}/combined_1f1b.py:combined_forward_backward_step"),
        (Kind.WAIT, f"{_PIPELINE}/p2p_communication.py:P2PCommunicator._communicate"),
        (Kind.WAIT, "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32"),
        # Of given routing; and with --moe-permute-fusion Transformer Engine's kernel on a card.
        (Kind.WAIT, "megatron/core/transformer/moe/router_replay.py:RouterReplay.get_replay_topk"),
        (Kind.WAIT, "megatron/core/transformer/moe/moe_utils.py:sort_chunks_by_idxs"),
        (Kind.WAIT, "megatron/core/timers.py:Timer.start"),
        (Kind.WAIT, "megatron/core/timers.py:Timer.stop"),
        (Kind.WAIT, "megatron/core/utils.py:local_multi_tensor_l2_norm"),
        (Kind.WAIT, f"{_RERUN}._reduce_any"),
        (Kind.WAIT, f"{_RERUN}.validate_result"),
        (Kind.WAIT, f"{_TRAINING}:train"),
        (Kind.WAIT, f"{_TRAINING}:training_log"),
        (Kind.WAIT, f"{_UTILS}:logical_and_across_model_parallel_group"),
        (Kind.WAIT, f"{_UTILS}:reduce_max_stat_across_model_parallel_group"),
    }
)


DEEP_EP: frozenset[Place] = frozenset(
    {
        (Kind.WAIT, f"{_DISPATCHER}:_DeepepManager._indices_to_multihot"),
        (Kind.WAIT, f"{_PIPELINE}/schedules.py:custom_backward"),
    }
)
"""Megatron's choices by a mask, forward and backward, where no fused kernel replaces them."""

_FSDP = "megatron/core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py"
FSDP_REDUCE: frozenset[Place] = frozenset(
    {(Kind.WAIT, f"{_FSDP}:GradReducePipeline._bucket_group_gradient_reduce")}
)
"""A blocking copy of Megatron-FSDP's where it reduces."""

_GRAPHS = "megatron/core/transformer/cuda_graphs.py:TECudaGraphHelper"
CAPTURE: frozenset[Place] = frozenset(
    {
        (Kind.WAIT, f"{_GRAPHS}._start_capturing"),
        (Kind.WAIT, f"{_GRAPHS}._finish_capturing"),
        (
            Kind.WAIT,
            "megatron/core/transformer/transformer_layer.py:"
            "TransformerLayer.get_layer_static_inputs",
        ),
    }
)
"""Megatron's waits when it captures graphs, once in a run."""


def split(found: Iterable[Finding]) -> tuple[set[Place], set[Place]]:
    """Return the places of this package and Megatron's, without those of tests."""
    places = {(finding.kind, finding.place) for finding in found}
    ours = {place for place in places if is_ours(place)}
    return ours, {place for place in places if place[1].startswith("megatron/")}


def is_ours(place: Place) -> bool:
    """Return whether it is in this package, except in replacements for the CPU."""
    return place[1].startswith("megatron_laer/") and not place[1].startswith("megatron_laer/cpu/")
