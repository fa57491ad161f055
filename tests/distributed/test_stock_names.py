"""Under stock's names an FSEP model has stock's parameters, in stock's shapes, and loads them.

Both sides keep the weights that `cpu/weights.py` gives by name: the learning rate is zero.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

import megatron_laer
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.integrations import stock_names
from megatron_laer.integrations.stock_names import StockLayer
from megatron_laer.layer import slot_submodules
from megatron_laer.runtime.comm.blocks import gather_block
from tests import documents
from tests.distributed.test_stock_loading import probed
from tests.parity.flags import command_line

PAGE = documents.ROOT / "docs" / "checkpoints.md"

Chunk = torch.nn.Module
Given = tuple[str, torch.Tensor]

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner random"
STILL = " --lr 0 --min-lr 0"
MIXTRAL = " --group-query-attention --num-query-groups 2"
QWEN3 = " --bf16 --group-query-attention --num-query-groups 2 --kv-channels 16 --qk-layernorm"
SHARED = " --moe-shared-expert-intermediate-size 32"
TENSOR = " --tensor-model-parallel-size 2 --sequence-parallel"
STAGES = " --pipeline-model-parallel-size 2"
UNTIED, NO_BIAS = "--untie-embeddings-and-output-weights", "--disable-bias-linear"
# Attributes that tell converters how a parameter is cut.
MARKS = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride")


class Named(NamedTuple):
    name: str
    tensor: torch.Tensor
    marks: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model and its ranks; stock is compared under the expert-parallel `sizes`."""

    ranks: int = 2
    experts: int = 4
    expert_parallel: int = 2
    sizes: tuple[int, ...] = (2, 1)
    flags: str = ""
    without: str = ""

    def command(self, data: str, extra: str, expert_parallel: int | None = None) -> list[str]:
        return command_line(
            data,
            self.flags + STILL + extra,
            experts=self.experts,
            expert_parallel=expert_parallel or self.expert_parallel,
            global_batch=2 * self.ranks,
            steps=1,
            without=self.without,
        )


CASES = {
    "Mixtral": Case(flags=MIXTRAL),
    # No stock run with more than one expert-parallel rank can hold 5 experts.
    "Qwen3-MoE, E = 5": Case(experts=5, sizes=(1,), flags=QWEN3, without=UNTIED),
    # With one expert-parallel rank, Megatron's local layers cannot train an expert's bias.
    "biases of experts": Case(sizes=(2,), without=NO_BIAS),
    "shared experts, 4 ranks": Case(
        ranks=4, experts=8, expert_parallel=4, sizes=(2,), flags=MIXTRAL + SHARED
    ),
    "Mixtral, tensor parallel 2, expert data parallel 2": Case(
        ranks=4, sizes=(2, 1), flags=MIXTRAL + TENSOR
    ),
    "Qwen3-MoE in 2 pipeline stages of 2 chunks": Case(
        ranks=4,
        flags=QWEN3 + STAGES + " --num-layers 4 --num-layers-per-virtual-pipeline-stage 1",
        without=UNTIED,
    ),
}


def copied(parameters: Iterator[Given]) -> list[Named]:
    return [
        Named(
            name,
            tensor.detach().clone(),
            {mark: getattr(tensor, mark) for mark in MARKS if hasattr(tensor, mark)},
        )
        for name, tensor in parameters
    ]


def of_stock(flags: list[str]) -> list[list[Named]]:
    from megatron.core.utils import unwrap_model

    def read(model: list[Chunk]) -> list[list[Named]]:
        return [copied(unwrap_model(chunk).named_parameters()) for chunk in model]

    return probed(flags, read)


def of_fsep(flags: list[str], sizes: tuple[int, ...]) -> dict[int, list[list[Named]]]:
    """Return an FSEP model's parameters under stock's names, for each expert-parallel size.

    Also write them back into a model of zeros, in reverse order, and check that this restores it.
    """

    def read(model: list[Chunk]) -> dict[int, list[list[Named]]]:
        found: dict[int, list[list[Named]]] = {}
        for size in sizes:
            found[size] = []
            for chunk in model:
                named = copied(
                    megatron_laer.stock_named_parameters(chunk, expert_parallel_size=size)
                )
                found[size].append(named)
                before = [parameter.detach().clone() for parameter in chunk.parameters()]
                for parameter in chunk.parameters():
                    parameter.data.zero_()
                megatron_laer.load_stock_named_parameters(
                    chunk,
                    ((name, tensor.double()) for name, tensor, _ in reversed(named)),
                    expert_parallel_size=size,
                )
                for (name, after), kept in zip(chunk.named_parameters(), before, strict=True):
                    assert torch.equal(after, kept), name
        return found

    return probed(flags, read)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_shapes_and_values_are_stocks_and_come_back(
    ranks: RankPools, text_data: str, case: Case
) -> None:
    pool = ranks(case.ranks)
    fsep = pool.run(of_fsep, case.command(text_data, FSEP), case.sizes)
    for size in case.sizes:
        stock = pool.run(of_stock, case.command(text_data, "", expert_parallel=size))
        for rank, (expected, found) in enumerate(zip(stock, fsep, strict=True)):
            for chunk, (theirs, ours) in enumerate(zip(expected, found[size], strict=True)):
                where = f"expert-parallel size {size}, rank {rank}, chunk {chunk}"
                assert [p.name for p in ours] == [p.name for p in theirs], where
                for mine, yours in zip(ours, theirs, strict=True):
                    what = f"{where}, {mine.name}"
                    assert mine.tensor.dtype == yours.tensor.dtype, what
                    assert torch.equal(mine.tensor, yours.tensor), what
                    assert mine.marks == yours.marks, what


def under_grouped_names(flags: list[str]) -> tuple[list[Named], list[Named]]:
    """Return an FSEP model's parameters under both grouped names; write back the first ones."""

    def read(model: list[Chunk]) -> tuple[list[Named], list[Named]]:
        (chunk,) = model
        sequence = copied(megatron_laer.stock_named_parameters(chunk))
        grouped = copied(megatron_laer.stock_named_parameters(chunk, grouped=True))
        for parameter in chunk.parameters():
            parameter.data.zero_()
        megatron_laer.load_stock_named_parameters(
            chunk, ((name, tensor) for name, tensor, _ in grouped), grouped=True
        )
        for before, (name, after) in zip(
            sequence, megatron_laer.stock_named_parameters(chunk), strict=True
        ):
            assert torch.equal(after, before.tensor), name
        return grouped, sequence

    return probed(flags, read)


def test_grouped_names_are_those_that_converters_look_for(ranks: RankPools, text_data: str) -> None:
    flags = CASES["biases of experts"].command(text_data, FSEP)
    for grouped, sequence in ranks(2).run(under_grouped_names, flags):
        pattern = r"(decoder\.layers\.\d+\.mlp\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)"
        in_sequence = {
            re.sub(pattern, r"\1.local_experts.\4.\2.\3", name): tensor
            for name, tensor, _ in grouped
        }
        assert in_sequence.keys() == {named.name for named in sequence}
        for name, tensor, _ in sequence:
            assert torch.equal(in_sequence[name], tensor), name
        # Transformer Engine's grouped linear layer registers them so.
        experts = "decoder.layers.0.mlp.experts"
        assert [name for name, _, _ in grouped if name.startswith(experts)] == [
            f"{experts}.{linear}.{kind}{expert}"
            for linear in ("linear_fc1", "linear_fc2")
            for expert in range(2)
            for kind in ("weight", "bias")
        ]


@pytest.mark.parametrize(("builder", "is_grouped"), [(TEGroupedMLP, True), (SequentialMLP, False)])
def test_the_module_spec_decides_between_the_names(builder: type, is_grouped: bool) -> None:
    for spec in (builder, functools.partial(builder, submodules=None)):
        assert slot_submodules.stock_is_grouped(mock.Mock(experts=spec)) == is_grouped


def one_layer_is_held(flags: list[str]) -> int:
    """Return the number of restored matrices; check that those of other layers are freed."""

    def read(model: list[Chunk]) -> int:
        alive: list[weakref.ref[torch.Tensor]] = []
        layers = []

        def gathering(slice_ErK: torch.Tensor, *args: Any) -> torch.Tensor:
            if len(layers) % 2 == 0:
                assert [block for block in alive if block() is not None] == []
            block = gather_block(slice_ErK, *args)
            layers.append(slice_ErK.shape)
            alive.append(weakref.ref(block))
            return block

        with mock.patch.object(stock_names, "gather_block", gathering):
            for _, tensor in megatron_laer.stock_named_parameters(model[0]):
                del tensor  # otherwise it would be held while the next one is made
        return len(layers)

    return probed(flags, read)


def test_one_layer_at_a_time_is_restored(ranks: RankPools, text_data: str) -> None:
    flags = CASES["Mixtral"].command(text_data, FSEP)
    assert ranks(2).run(one_layer_is_held, flags) == [4, 4]


def one_layer_is_loaded(flags: list[str]) -> int:
    """Return the number of layers whose blocks were filled, each after the last one was freed."""

    def read(model: list[Chunk]) -> int:
        given = [
            (name, tensor.clone())
            for name, tensor in megatron_laer.stock_named_parameters(model[0])
        ]
        alive: list[weakref.ref[torch.Tensor]] = []
        make, layers = StockLayer.empty_blocks, []

        def making(layer: StockLayer, *args: Any) -> list[torch.Tensor]:
            assert [block for block in alive if block() is not None] == []
            blocks = make(layer, *args)
            alive.extend(map(weakref.ref, blocks))
            layers.append(layer)
            return blocks

        with mock.patch.object(StockLayer, "empty_blocks", making):
            megatron_laer.load_stock_named_parameters(model[0], given)
        return len(layers)

    return probed(flags, read)


def test_one_layer_at_a_time_is_loaded(ranks: RankPools, text_data: str) -> None:
    flags = CASES["Mixtral"].command(text_data, FSEP)
    assert ranks(2).run(one_layer_is_loaded, flags) == [2, 2]


def page_runs(flags: list[str]) -> list[str]:
    code = "".join(
        block.text for block in documents.blocks(PAGE) if block.language == documents.SCRIPT
    )
    sent: list[Given] = []

    def run(model: list[Chunk]) -> list[str]:
        optimizer = mock.Mock()
        exec(
            code,
            {
                "model": model,
                "send": lambda name, tensor: sent.append((name, tensor.clone())),
                "received": lambda _: sent,
                "optimizer": optimizer,
            },
        )
        optimizer.reload_model_params.assert_called_once()
        return [name for name, _ in sent]

    return probed(flags, run)


def test_the_pages_code_runs_with_fsep_and_without(ranks: RankPools, text_data: str) -> None:
    case = CASES["Mixtral"]
    fsep = ranks(2).run(page_runs, case.command(text_data, FSEP))
    stock = ranks(2).run(page_runs, case.command(text_data, ""))
    assert fsep == stock
    assert "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight" in fsep[0]


def after_a_step(flags: list[str]) -> dict[str, torch.Tensor]:
    def read(model: list[Chunk]) -> dict[str, torch.Tensor]:
        return {
            name: tensor
            for name, tensor, _ in copied(megatron_laer.stock_named_parameters(model[0]))
            if ".experts." not in name
        }

    return probed(flags, read)


def test_weights_that_are_still_being_gathered_are_waited_for(
    ranks: RankPools, text_data: str
) -> None:
    overlap = " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    flags = CASES["Mixtral"].command(text_data, FSEP + overlap + " --lr 1e-2 --min-lr 1e-2")
    first, second = ranks(2).run(after_a_step, flags)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
