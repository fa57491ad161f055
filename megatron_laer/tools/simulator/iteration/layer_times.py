"""Seconds of a layer's work, at a set of rates.

Bytes of memory-bound operations are counted by hand: the operation that makes a tensor writes it,
and the one that uses it reads it.

Legend: N ranks, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_laer.choices import Dispatch, Recompute
from megatron_laer.planner.clusters import DENSE_OPERATIONS, MOE_OPERATIONS, SLOT_OPERATIONS
from megatron_laer.planner.geometry import Geometry
from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.chunk import LayerTimes, MoETimes
from megatron_laer.tools.simulator.iteration.clocks import INTER, INTRA
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.iteration.work import LayerWork, Seconds

# Passes over H elements per token and layer: two norms (a read and a write each) and two residual
# sums (two reads and a write each).
_HIDDEN_PASSES = 2 * 2 + 2 * 3
# Passes over H elements per (token, expert) pair on its own rank, and on the computing one: rows
# are put in order (a read and a write), there and back.
_PERMUTED_PASSES, _SORTED_PASSES = 4, 4
# Backward's bytes over forward's: a gradient read and written, and most inputs read.
_BACKWARD_PASSES = 2
# Bytes per logit in fp32: written, read for the maximum and the sum, and its gradient written.
_LOGIT_BYTES = 16
# Passes over attention's scores forward and backward, unless they stay on the chip. Scores are
# written, masked by the softmax (read and written) and read. Their gradient is written, goes
# through the softmax's backward (two reads and a write) and is read twice, the scores once. These
# give the times of standard attention in FlashAttention-3's paper.
_SCORE_PASSES, _SCORE_PASSES_BACKWARD = 4, 7
# Operations of a layer in forward and backward, of each rank whose tokens Megatron's All-to-All
# dispatcher sorts, and of rows through nodes (`python -m benchmarks.launches`).
_RANK_OPERATIONS, _NODE_OPERATIONS = 6, 64
# Speed of attention's core over the fastest GEMM's, forward and backward. It reaches 185 and 150
# TFLOP/s on an A100, and cuDNN's 539 and 516 on an H100, by FlashAttention's papers. GEMMs reach
# 237 and 685.
_CORE_FORWARD, _CORE_BACKWARD = 0.78, 0.69
# Backward has two GEMMs for each of forward's: of the input's gradient, and of the weight's.
_BACKWARD_GEMMS = 2
# Parts without experts, in order; the host's time follows.
_ALONE = ("attention", "tensor", "dense")


@dataclass(frozen=True)
class Timing:
    """Seconds of work for one model, run and set of rates; `LayerWork` is at `nominal` rates."""

    model: ModelShape
    run: RunShape
    rates: Rates
    nominal: Rates

    def layer(
        self,
        layer: int,
        work: LayerWork | None,
        schedule: Schedule,
        ends: tuple[bool, bool] = (True, True),
        data_parallel_s: tuple[float, float] = (0.0, 0.0),
    ) -> LayerTimes:
        """Return the times of one microbatch in one layer; `work` is None for a dense layer.

        `ends` say whether it is the first and the last of an iteration. These exchange weights and
        gradients over data-parallel ranks, and those that are held over a step. By parts the host
        has no time while tokens travel, but that of both directions together.
        """
        has_experts, by_parts = self.model.layer_has_experts[layer], schedule.by_parts
        first, last = ends
        times = zip(self._attention(), [self._tensor()] * 2, self._dense(has_experts), strict=True)
        ahead_s, back_s = (dict(zip(_ALONE, of, strict=True)) for of in times)
        if self.run.recompute == Recompute.COMPUTE:
            for kind in ("attention", "dense"):
                back_s[kind] += ahead_s[kind]
        device_s = [sum(ahead_s.values()), sum(back_s.values())]
        moe = None
        if work is not None:
            holds = schedule.holds_step
            moe = self._moe(work, first or not holds, not holds, last or not holds)
            for direction, compute_N in enumerate((moe.forward_N, moe.backward_N)):
                exposed_N = 0 if by_parts else 2 * moe.tokens_N
                device_s[direction] += float((compute_N + exposed_N).max())
        ahead_s["host"], back_s["host"] = self._host(work, device_s, by_parts)
        return LayerTimes(
            name=f"layer {layer + 1}",
            alone_s=(ahead_s, back_s),
            moe=moe,
            again=self.run.recompute == Recompute.FULL,
            attention_again=self.run.attention_again,
            gather_s=data_parallel_s[0] if first else 0.0,
            scatter_s=data_parallel_s[1] if last else 0.0,
        )

    def head_seconds(self) -> tuple[float, float]:
        """Return the time of LM head and loss for a microbatch, forward and backward."""
        model, tokens = self.model, self.run.tokens
        gemm_s = self._gemm(2.0 * model.prediction_heads * model.head_weights, is_linear=False)
        passes = model.prediction_heads * tokens * model.vocabulary * _LOGIT_BYTES
        memory_s = self.rates.layer_memory_seconds(passes / 2)
        return gemm_s + memory_s, self._backward(gemm_s) + memory_s

    def _host(
        self, work: LayerWork | None, device_s: Sequence[float], by_parts: bool
    ) -> tuple[float, float]:
        """Return the time by which the host is later than the device, forward and backward."""
        host = self.rates.cluster.host
        if host is None:
            return 0.0, 0.0
        forward_s = host.forward_seconds(_operations(work))
        backward_s = 2 * forward_s
        if self.run.recompute == Recompute.COMPUTE:
            backward_s += forward_s
        if work is not None and work.restore is not None:
            forward_s += host.replicas_s
        if by_parts:
            later_s = max(forward_s + backward_s - sum(device_s), 0.0) / 2
            return later_s, later_s
        return max(forward_s - device_s[0], 0.0), max(backward_s - device_s[1], 0.0)

    def send_seconds(self) -> float:
        run = self.run
        if run.stages == 1:
            return 0.0
        cluster = self.rates.cluster
        link = cluster.inter if run.ranks * run.replicas >= run.node_size else cluster.intra
        size = run.tokens * self.model.hidden * self.model.bytes_per_element
        return size / link.bytes_per_s + link.latency_s

    def _backward[T: (float, Seconds)](self, gemm_s: T) -> T:
        """Return the time of backward's GEMMs."""
        return gemm_s * (_BACKWARD_GEMMS * self.rates.cluster.backward_gemm_factor)

    def _gemm(self, flops_per_token: float, *, is_linear: bool = True) -> float:
        tensor = self.run.tensor
        tokens = self.run.tokens * tensor
        return self.rates.gemm_seconds(tokens, flops_per_token / tensor, is_linear=is_linear)

    def _quantising(self, inputs: int, outputs: int, rows: float) -> tuple[float, float]:
        """Return the time to quantise rows of linear layers' inputs, and gradients of outputs."""
        passes = self.model.precision.row.operand_bytes(self.model.bytes_per_element)
        forward_s, backward_s = (
            self.rates.layer_memory_seconds(rows * width * passes) for width in (inputs, outputs)
        )
        return forward_s, backward_s

    def _attention(self) -> tuple[float, float]:
        model, rates = self.model, self.rates
        gemm_s = self._gemm(2.0 * model.attention_weights)
        core = model.core_flops_per_token * self.run.tokens / rates.best_flops_per_s
        backward_s = self._backward(gemm_s)
        if not model.flash_attention:
            # Separate GEMMs over all pairs, not only the causal half, with scores in memory.
            core_s = 2 * core
            scores = self.run.tokens * model.heads * model.sequence * model.bytes_per_element
            pass_s = rates.layer_memory_seconds(scores)
            backward_s += self._backward(core_s)
            backward_s += _SCORE_PASSES_BACKWARD * pass_s
            return gemm_s + core_s + _SCORE_PASSES * pass_s, backward_s
        # Backward of the core has five GEMMs for two: flash attention recomputes the scores.
        return gemm_s + core / _CORE_FORWARD, backward_s + 2.5 * core / _CORE_BACKWARD

    def _dense(self, has_experts: bool) -> tuple[float, float]:
        model, rates, tokens = self.model, self.rates, self.run.tokens
        gemm_s = self._gemm(2.0 * model.dense_weights(has_experts))
        elements = _HIDDEN_PASSES * model.hidden
        elements += 2 * (model.query_width + model.key_value_width)
        if has_experts:
            elements += _PERMUTED_PASSES * model.topk * model.hidden
            width = model.shared_ffn
        else:
            width = model.dense_ffn
        elements += (3 if model.gated else 2) * width
        memory_s = rates.layer_memory_seconds(elements * tokens * model.bytes_per_element)
        # Attention's projections, and the FFN.
        inputs, outputs = _ffn_widths(model, width)
        inputs += model.hidden + model.query_width
        outputs += model.query_width + 2 * model.key_value_width + model.hidden
        quantising = self._quantising(inputs, outputs, tokens)
        backward_s = self._backward(gemm_s) + _BACKWARD_PASSES * memory_s + quantising[1]
        return gemm_s + memory_s + quantising[0], backward_s

    def _tensor(self) -> float:
        run = self.run
        size = run.tokens * run.tensor * self.model.hidden * self.model.bytes_per_element
        # An all-gather before attention and a reduce-scatter after it.
        return 2 * self.rates.ring_seconds(size, run.tensor, run.node_size)

    def _tokens(self, work: LayerWork) -> Seconds:
        """Return each rank's time of one exchange of tokens."""
        run, rates, passing = self.run, self.rates, work.passing
        cluster = rates.cluster
        token_bytes = self.model.hidden * self.model.bytes_per_element
        tokens_N = passing.seconds(work, token_bytes, cluster)
        meets = passing.group or run.ranks
        if not work.leaves_nodes:
            meets = min(meets, run.node_size)
        node_size = math.gcd(run.node_size, meets)
        forwards = 2 if run.recompute == Recompute.FULL else 1
        collective_s = rates.collective_seconds(meets, node_size)
        if passing.prices.dispatch == Dispatch.FLEX:
            return tokens_N + collective_s
        in_node_s = rates.collective_seconds(node_size, node_size)
        shape = Geometry(meets, meets, 1, node_size)
        return tokens_N + passing.prices.latency_seconds(shape, collective_s, in_node_s, forwards)

    def _moe(
        self, work: LayerWork, restores: bool, restores_backward: bool, reduces: bool
    ) -> MoETimes:
        """Return the times of experts; a form that serves one direction is restored for both."""
        model, rates, recompute = self.model, self.rates, self.run.recompute
        scale = self.nominal.best_flops_per_s / rates.best_flops_per_s
        gemm_s_N = 2.0 * model.expert_weights * work.unit_s_N * scale
        elements = (3 if model.gated else 2) * model.expert_ffn + _SORTED_PASSES * model.hidden
        memory_s = rates.layer_memory_seconds(elements * model.bytes_per_element)
        memory_s_N = work.pairs_N * memory_s
        quantising = self._quantising(*_ffn_widths(model, model.expert_ffn), 1.0)
        forward_N = gemm_s_N + memory_s_N + work.pairs_N * quantising[0]
        backward_N = self._backward(gemm_s_N) + _BACKWARD_PASSES * memory_s_N
        backward_N += work.pairs_N * quantising[1]
        if recompute == Recompute.COMPUTE:
            backward_N += forward_N

        tokens_N = self._tokens(work)
        first_s = again_s = None
        directions = 1
        if work.restore is not None:
            seconds, directions = work.restore.seconds(rates), work.restore.directions
            first_s = seconds if restores else None
            again_s = seconds if restores_backward else None
        reduce = work.reduce if reduces else None
        return MoETimes(
            forward_N=forward_N,
            backward_N=backward_N,
            tokens_N=tokens_N,
            within_node=not work.leaves_nodes,
            gate_s=self._gate(work),
            restore_s=first_s,
            backward_restore_s=again_s if directions == 1 else self._restore(first_s, again_s),
            reduce_s=None if reduce is None else reduce.seconds(rates),
            change_s=None if work.change is None else work.change.seconds(rates),
            group=work.passing.group,
            tokens_link=INTER if work.leaves_nodes else INTRA,
            exchange_link=INTER if work.exchanges_leave_nodes else INTRA,
            directions=directions,
            after_rerun_s=first_s if directions > 1 and recompute == Recompute.FULL else None,
        )

    def _restore(self, own_s: float | None, of_rerun_s: float | None) -> float | None:
        """Return the time of backward's first restore, whose form forward has not.

        A re-run of forward begins with forward's. Without its exchanges of tokens both are needed
        at once.
        """
        recompute = self.run.recompute
        if recompute == Recompute.COMPUTE and own_s is not None:
            return own_s + (of_rerun_s or 0.0)
        return of_rerun_s if recompute == Recompute.FULL or own_s is None else own_s

    def _gate(self, work: LayerWork) -> float:
        run, rates, host = self.run, self.rates, self.rates.cluster.host
        counting = work.passing.group or run.ranks
        seconds = rates.collective_seconds(counting, run.node_size) + work.solve_s
        # Groups have a fixed placement, with nothing to decide.
        if host is not None and work.passing.group is None:
            seconds += host.gate.seconds(run.ranks, work.slots, self.model.num_experts)
        return seconds


def _operations(work: LayerWork | None) -> float:
    """Return the operations of a layer in forward and backward; None has no experts."""
    if work is None:
        return DENSE_OPERATIONS
    passing, found = work.passing, DENSE_OPERATIONS + MOE_OPERATIONS
    found += SLOT_OPERATIONS * work.used_slots
    if passing.sorts_chunks:
        found += _RANK_OPERATIONS * (work.passing.group or 0)
    if passing.prices.dispatch == Dispatch.NODE:
        found += _NODE_OPERATIONS
    return found


def _ffn_widths(model: ModelShape, width: int) -> tuple[int, int]:
    """Return the inputs' and the outputs' widths of an FFN's two linear layers; 0 for none."""
    if width == 0:
        return 0, 0
    return model.hidden + width, (2 if model.gated else 1) * width + model.hidden
