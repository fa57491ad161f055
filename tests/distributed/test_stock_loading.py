"""A load of weights under stock's names is strict: errors are named on every rank, at once.

`test_stock_names.py` shows that a good load restores the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

import megatron_laer
from megatron_laer import session
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from megatron_laer.runtime.weights.states import WeightState
from tests.parity.flags import command_line

Chunk = torch.nn.Module
Given = tuple[str, torch.Tensor]

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner random"


def flags_of(data: str, extra: str = "") -> list[str]:
    return command_line(data, FSEP + extra, experts=4, steps=1)


def probed[T](flags: list[str], probe: Callable[[list[Chunk]], T]) -> T:
    """Train; return the probe's result on this rank after the first step."""
    found: T = train(flags, probe).probes[0]
    return found


def without(name: str) -> Callable[[list[Given]], Iterator[Given]]:
    return lambda given: (pair for pair in given if pair[0] != name)


def failing(given: list[Given]) -> Iterator[Given]:
    yield given[0]
    if dist.get_rank() == 1:
        raise KeyError("lm_head.weight")
    yield from given[1:]


EXPERT = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"
ROUTER = "decoder.layers.0.mlp.router.weight"
# Wrong input of one rank, and the error of every rank.
WRONG: dict[str, tuple[Callable[[list[Given]], Iterator[Given]], str]] = {
    "a dense one is missing": (without(ROUTER), f"rank 1: missing: '{ROUTER}'"),
    "an expert is missing": (without(EXPERT), f"rank 1: missing: '{EXPERT}'"),
    "all are missing": (
        lambda _: iter(()),
        "rank 1: missing: 'embedding.word_embeddings.weight', ",
    ),
    "one is unknown": (lambda given: iter([*given, ("x", given[0][1])]), "rank 1: 'x' is unknown"),
    "one comes twice": (
        lambda given: iter([*given, given[0]]),
        "rank 1: 'embedding.word_embeddings.weight' comes twice",
    ),
    "of a shape": (
        lambda given: ((name, t.T if name == EXPERT else t) for name, t in given),
        f"rank 1: '{EXPERT}' has the shape [64, 48], not [48, 64]",
    ),
    "no tensor": (
        lambda given: ((name, None if name == EXPERT else t) for name, t in given),  # type: ignore[misc]
        f"rank 1: '{EXPERT}' is a NoneType, and no tensor",
    ),
    "an error": (failing, "rank 1: named_tensors: KeyError: 'lm_head.weight'"),
}


def errors(flags: list[str]) -> dict[str, str]:
    def attempts(model: list[Chunk]) -> dict[str, str]:
        (chunk,) = model
        given = [
            (name, tensor.clone()) for name, tensor in megatron_laer.stock_named_parameters(chunk)
        ]
        calls: dict[str, Callable[[], object]] = {
            "list": lambda: megatron_laer.stock_named_parameters(model),  # type: ignore[arg-type]
            "size": lambda: megatron_laer.stock_named_parameters(chunk, expert_parallel_size=4),
            "sizes": lambda: megatron_laer.stock_named_parameters(
                chunk, expert_parallel_size=1 + dist.get_rank()
            ),
        }
        for name, (change, _) in WRONG.items():
            tensors = iter(given) if dist.get_rank() == 0 else change(given)
            calls[name] = functools.partial(
                megatron_laer.load_stock_named_parameters, chunk, tensors
            )
        said = {}
        for name, call in calls.items():
            with pytest.raises(ValueError) as raised:
                call()
            said[name] = str(raised.value)
        megatron_laer.load_stock_named_parameters(chunk, given)  # all ranks are still in step
        return said

    return probed(flags, attempts)


def test_wrong_calls_are_refused_on_every_rank_and_named(ranks: RankPools, text_data: str) -> None:
    for said in ranks(2).run(errors, flags_of(text_data)):
        assert "model is a list: " in said["list"]
        assert "expert_parallel_size=4 does not divide both the 2 ranks" in said["size"]
        assert "the 4 experts; what works: [1, 2]" in said["size"]
        assert "ask for the expert_parallel_size [1, 2]" in said["sizes"]
        for name, (_, message) in WRONG.items():
            assert said[name].startswith(message), name


def held_over_a_load(flags: list[str]) -> bool:
    """Return True if experts that are held over a step are gone after a load and its end."""

    def load(model: list[Chunk]) -> bool:
        (chunk,) = model
        coordinator = session.current_coordinator()
        assert coordinator is not None
        held = [*coordinator.experts._of_step.values()]
        assert any(experts.state.weights is WeightState.RESTORED for experts in held)
        given = [
            (name, tensor.clone()) for name, tensor in megatron_laer.stock_named_parameters(chunk)
        ]
        megatron_laer.load_stock_named_parameters(chunk, given)
        coordinator.experts.end_step(weights_changed=False)  # as if the optimizer were skipped
        return all(experts.state.weights is WeightState.SHARDED for experts in held)

    return probed(flags, load)


@pytest.mark.parametrize("sharding", ["rows", "experts"])
def test_experts_that_a_step_holds_are_not_used_after_a_load(
    ranks: RankPools, text_data: str, sharding: str
) -> None:
    flags = flags_of(text_data, f" --fsep-restore step --fsep-sharding {sharding}")
    assert ranks(2).run(held_over_a_load, flags) == [True, True]
