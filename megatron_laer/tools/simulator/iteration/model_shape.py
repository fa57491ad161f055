"""Weights and FLOPs of a model's parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_laer.choices import Recompute
from megatron_laer.files.checks import quoted
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.precision import Precision
from megatron_laer.tools.model_flags import MOST_OF_MODEL, model_sizes, model_values, whole_number

_MAX_LAYERS = MOST_OF_MODEL["--num-layers"]
_FREQUENCY_PART = re.compile(r"\[([01](?:,[01])*)\](?:\*(\d{1,4}))?")


@dataclass(frozen=True)
class LatentAttention:
    """Ranks and head widths of multi-latent attention; query rank 0 means queries without LoRA."""

    query_rank: int
    key_value_rank: int
    head: int
    rotary: int
    value_head: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a MoE GPT that determine times, FLOPs and memory.

    Layers of multi-token prediction are last in `layer_has_experts`; `prediction_heads` counts them
    and the main one. Widths of queries, keys and values are over all heads; a width is 0 for none.
    `bytes_per_element` are of weights, tokens and gradients on the wire. The linear
    layers of attention, FFN and experts multiply in `precision`. With `flash_attention` scores stay
    on the chip.
    """

    hidden: int
    layer_has_experts: tuple[bool, ...]
    heads: int
    query_width: int
    key_value_width: int
    dense_ffn: int
    expert_ffn: int
    shared_ffn: int
    gated: bool
    num_experts: int
    topk: int
    sequence: int
    vocabulary: int
    prediction_heads: int
    bytes_per_element: int
    latent: LatentAttention | None = None
    precision: Precision = Precision.PARAMETERS
    flash_attention: bool = True

    @property
    def moe_layers(self) -> int:
        return sum(self.layer_has_experts)

    @property
    def expert_weights(self) -> int:
        return self._ffn_weights(self.expert_ffn)

    @property
    def head_weights(self) -> int:
        """Count the weights of the LM head; the embedding has as many."""
        return self.hidden * self.vocabulary

    @cached_property
    def attention_weights(self) -> int:
        latent = self.latent
        if latent is None:
            return self.hidden * 2 * (self.query_width + self.key_value_width)
        queries = self.heads * (latent.head + latent.rotary)
        ups = self.heads * (latent.head + latent.value_head)
        down = latent.query_rank or self.hidden
        return (
            (self.hidden * latent.query_rank if latent.query_rank else 0)
            + down * queries
            + self.hidden * (latent.key_value_rank + latent.rotary)
            + latent.key_value_rank * ups
            + self.heads * latent.value_head * self.hidden
        )

    def dense_weights(self, has_experts: bool) -> int:
        """Count the weights after attention that all tokens use: FFN, or router and shared ones."""
        if not has_experts:
            return self._ffn_weights(self.dense_ffn)
        return self._ffn_weights(self.shared_ffn) + self.hidden * self.num_experts

    def layer_weights(self, has_experts: bool) -> int:
        """Count the weights of a layer that all tokens use."""
        return self.attention_weights + self.dense_weights(has_experts)

    @property
    def core_flops_per_token(self) -> int:
        """Count the FLOPs of causal attention itself, scores and values: half of all pairs."""
        if self.latent is None:
            return 2 * self.sequence * self.query_width
        latent = self.latent
        return self.sequence * self.heads * (latent.head + latent.rotary + latent.value_head)

    @cached_property
    def flops_per_token(self) -> int:
        """Count a token's FLOPs in one forward pass: two per weight used, and attention's core."""
        weights = self.prediction_heads * self.head_weights
        for has_experts in self.layer_has_experts:
            weights += self.layer_weights(has_experts)
            weights += self.topk * self.expert_weights if has_experts else 0
        return 2 * weights + len(self.layer_has_experts) * self.core_flops_per_token

    def costs(self, cluster: Cluster, recompute: Recompute, pairs: float) -> CostModel:
        """Return the prices that the planner of a run has, with a rank's `pairs`."""
        return CostModel(
            cluster=cluster,
            hidden=self.hidden,
            ffn=self.expert_ffn,
            gated=self.gated,
            bytes_per_element=self.bytes_per_element,
            recompute=recompute,
            pairs_per_rank=round(pairs),
            precision=self.precision,
        )

    def check_tensor(self, ranks: int, flag: str) -> None:
        """Refuse tensor-parallel ranks that Megatron cannot share the heads between."""
        if self.heads % ranks:
            raise ValueError(
                f"{flag} {ranks}: the model's {self.heads} attention heads are no multiple of it; "
                "give a divisor"
            )

    def _ffn_weights(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width


def read_model(config: str) -> ModelShape:
    """Read the shape from a model configuration."""
    sizes = model_sizes(config, way_out="mend it")
    experts = sizes.num_experts
    assert experts is not None
    values = model_values(config)
    layers = whole_number(values, "--num-layers", least=1)
    extra = whole_number(values, "--mtp-num-layers", default=0)
    heads = whole_number(values, "--num-attention-heads", least=1)
    if "--kv-channels" not in values and sizes.hidden % heads:
        raise ValueError(
            f"has hidden-size {sizes.hidden}, which is no multiple of its num-attention-heads, "
            f"{heads}; mend one of them, or add kv-channels"
        )
    head = whole_number(values, "--kv-channels", default=max(sizes.hidden // heads, 1))
    groups = whole_number(values, "--num-query-groups", default=heads)
    topk = whole_number(values, "--moe-router-topk", least=1, default=2)
    if topk > experts:
        raise ValueError(f"--moe-router-topk {topk}: there are {experts} experts")
    sequence = whole_number(values, "--seq-length", least=1, default=4096)
    return ModelShape(
        hidden=sizes.hidden,
        layer_has_experts=(*_experts_by_layer(values, layers), *[True] * extra),
        heads=heads,
        query_width=heads * head,
        key_value_width=groups * head,
        dense_ffn=whole_number(values, "--ffn-hidden-size", default=4 * sizes.hidden),
        expert_ffn=sizes.ffn,
        shared_ffn=whole_number(values, "--moe-shared-expert-intermediate-size", default=0),
        gated=sizes.gated,
        num_experts=experts,
        topk=topk,
        sequence=sequence,
        vocabulary=whole_number(values, "--vocab-size", least=1, default=32000),
        prediction_heads=1 + extra,
        bytes_per_element=2 if "--bf16" in values or "--fp16" in values else 4,
        latent=_latent(values) if "--multi-latent-attention" in values else None,
        precision=sizes.precision,
        # cuDNN before 9.18 fuses no learned sinks (NVIDIA/TransformerEngine issue 2318).
        flash_attention=values.get("--softmax-type") != "learnable",
    )


def _latent(values: Mapping[str, str]) -> LatentAttention:
    # Megatron's own defaults.
    return LatentAttention(
        query_rank=whole_number(values, "--q-lora-rank", default=0),
        key_value_rank=whole_number(values, "--kv-lora-rank", default=32),
        head=whole_number(values, "--qk-head-dim", default=128),
        rotary=whole_number(values, "--qk-pos-emb-head-dim", default=64),
        value_head=whole_number(values, "--v-head-dim", default=128),
    )


def _experts_by_layer(values: Mapping[str, str], layers: int) -> list[bool]:
    text = values.get("--moe-layer-freq", "1").replace(" ", "")
    if text.isascii() and text.isdigit() and 1 <= int(text) <= _MAX_LAYERS:
        return [layer % int(text) == 0 for layer in range(layers)]
    parts = [_FREQUENCY_PART.fullmatch(part) for part in text.strip("()").split("+")]
    pattern = [
        digit == "1"
        for part in parts
        if part is not None
        for digit in part[1].split(",") * int(part[2] or 1)
    ]
    if None in parts or len(pattern) != layers or not any(pattern):
        raise ValueError(
            f"has moe-layer-freq {quoted(text)}; give a number, or lists such as ([0]*3+[1]*58) "
            f"that add up to the {layers} layers and hold a 1"
        )
    return pattern
