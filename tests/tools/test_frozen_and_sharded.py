"""Times and bytes of dense layers that Megatron-FSDP shards, and of adapters on frozen weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_laer.choices import Sharding
from megatron_laer.tools.simulator.iteration.chunk import backward, forward, run
from megatron_laer.tools.simulator.iteration.clocks import Clocks
from megatron_laer.tools.simulator.iteration.methods import FSEP
from megatron_laer.tools.simulator.iteration.model_shape import Lora
from megatron_laer.tools.traces.workloads import WorkloadShape, workload_trace
from tests.tools.test_iteration import ALONE, layer, ran, spent
from tests.tools.test_iteration_work import TINY, predicted

MICROBATCHES = 4


@pytest.mark.parametrize(("seconds", "exposed"), [(14, 14), (15, 15 + 1), (20, 20 + 6)])
def test_weights_are_gathered_behind_the_layer_before(seconds, exposed):
    """A layer takes 2 + 1 + 10 + 1 seconds in forward, and the first one has none before."""
    layers = [layer([10], unshard_s=seconds)] * 2
    assert spent(ran(ALONE, *layers))["data_parallel"] == exposed


def test_backward_gathers_again_and_shares_the_links_with_gradients():
    """In backward a layer takes 1 + 10 + 1 + 4 seconds, after which its gradients leave."""
    alone = [layer([10], unshard_s=6)] * 3
    assert spent(ran(ALONE, *alone, passes=(backward,)))["data_parallel"] == 6
    # The second layer's reduce begins at 6 + 16 + 16 and takes until 48, while the third layer's
    # weights are on their way since 22 until 28: apart. Gathers of 20 end at 20, 40 and 60: both.
    apart = [layer([10], unshard_s=6, scatter_s=10)] * 3
    assert spent(ran(ALONE, *apart, passes=(backward,)))["data_parallel"] == 6
    both = [layer([10], unshard_s=20, scatter_s=10)] * 2
    # The second gather runs from 20 to 40, the reduce from 36 on: 4 seconds are shared.
    assert spent(ran(ALONE, *both, passes=(backward,)))["data_parallel"] == 20 + (44 - 36)


def test_a_forward_after_a_forward_gathers_again():
    clocks = Clocks(1, 1)
    for _ in range(2):
        run(forward(clocks, [layer([10], unshard_s=3)], ALONE))
    assert spent(clocks)["data_parallel"] == 2 * 3


def found_with(model=TINY, **run):
    trace = workload_trace("W1", WorkloadShape(8, 8, 2, 8192), steps=4)
    return predicted(trace, model, [FSEP], sharding=Sharding.EXPERTS, replicas=4, **run)[FSEP]


def data_parallel_bytes(found):
    return sum(kinds["data_parallel"] for kinds in found.bytes_by_kind.values())


def test_each_strategy_has_its_bytes_and_none_is_faster_than_the_one_before():
    linear = sum(TINY.attention_weights + TINY.dense_weights(has) for has in TINY.layer_has_experts)
    of_step = linear * 31 / 32
    plain = found_with()
    strategies = ("optim", "optim_grads", "optim_grads_params")
    found = [found_with(dense_sharding=strategy) for strategy in strategies]
    more = [data_parallel_bytes(each) - data_parallel_bytes(plain) for each in found]
    gradients, weights = 4 * (MICROBATCHES - 1), 2 * (2 * MICROBATCHES - 1)
    assert more == pytest.approx(
        [0, gradients * of_step, (gradients + weights) * of_step], abs=of_step / 1e6
    )
    seconds = [plain.iteration_s] + [each.iteration_s for each in found]
    assert seconds == sorted(seconds) and seconds[0] == seconds[1]
    exposed = [each.exposed_s["data_parallel"] for each in found]
    assert exposed[2] > exposed[0]
    late = [
        found_with(dense_sharding=strategy, overlaps_data_parallel=False).exposed_s["data_parallel"]
        for strategy in strategies
    ]
    assert late[0] < late[1] < late[2]


def test_only_adapters_are_reduced_and_bases_need_no_second_product():
    share = 1 / 8
    rank = round(share * TINY.expert_weights / (3 * TINY.hidden + 3 * TINY.expert_ffn))
    adapted = replace(TINY, lora=Lora(rank))
    share = adapted.expert_adapters / TINY.expert_weights
    assert 0.05 < share < 0.5
    whole, found = found_with(), found_with(adapted)

    def moved(of, kind):
        return sum(kinds.get(kind, 0.0) for kinds in of.bytes_by_kind.values())

    assert moved(whole, "reduce") > 0
    assert moved(found, "reduce") == pytest.approx(share * moved(whole, "reduce"))
    assert moved(found, "restore") == pytest.approx((1 + share) * moved(whole, "restore"))
    assert data_parallel_bytes(found) < data_parallel_bytes(whole) / 2
    # One product of backward for two.
    assert found.compute_s["experts"] / whole.compute_s["experts"] == pytest.approx(2 / 3, abs=0.1)
    assert found.compute_s["optimizer"] < whole.compute_s["optimizer"] / 2
    attention = replace(TINY, lora=Lora(rank, ("linear_qkv",)))
    assert moved(found_with(attention), "reduce") == 0
