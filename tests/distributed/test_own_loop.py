"""Code of docs/megatron.md and docs/rl.md runs unchanged, and their statements hold."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import fresh_megatron
from megatron_laer.rules import REDUCES_BEFORE_WGRAD
from tests import processes
from tests.distributed.conftest import refusal
from tests.documents import ROOT, SCRIPT, blocks
from tests.messages import messages
from tests.parity.row import REPLICAS_PAY

OWN_LOOP = ROOT / "scripts" / "own_loop.py"
STEPS = 4
HOMES = {"sharding": "experts", "cluster": str(REPLICAS_PAY)}


def code_of(page: str, word: str) -> str:
    of_page = [block for block in blocks(ROOT / "docs" / page) if block.language == SCRIPT]
    (code,) = [block.text for block in of_page if word in block.text]
    return code


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("own") / "checkpoint"
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    words = (*launcher, OWN_LOOP, "--steps", STEPS, "--save", folder)
    return processes.python(*words, OMP_NUM_THREADS="1"), folder


def losses(output: str) -> dict[int, float]:
    return {
        int(step): float(loss) for step, loss in re.findall(r"step (\d+) \| loss (\S+)", output)
    }


def metric(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"fsep_{name}: (\S+)", output)]


@contextlib.contextmanager
def loaded(path: Path = OWN_LOOP) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("own_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with fresh_megatron([]):
        spec.loader.exec_module(module)
        yield module


@contextlib.contextmanager
def enabled_with(settings: dict[str, Any]) -> Iterator[None]:
    """Give these settings to scripts that enable FSEP, in place of theirs."""
    import megatron_laer

    enable, config = megatron_laer.enable, megatron_laer.FSEPConfig(**settings)
    with mock.patch.object(
        megatron_laer, "enable", lambda _, seed: enable(config, seed=seed), create=True
    ):
        yield


def run(
    words: str,
    settings: dict[str, Any] | None = None,
    changed: Callable[[ModuleType], contextlib.AbstractContextManager[None]] | None = None,
) -> str:
    """Run the script, with other settings, and with parts `changed`."""
    output = io.StringIO()
    with (
        loaded() as module,
        enabled_with(settings) if settings else contextlib.nullcontext(),
        changed(module) if changed else contextlib.nullcontext(),
        mock.patch.object(sys, "argv", [str(OWN_LOOP), *words.split()]),
        contextlib.redirect_stdout(output),
    ):
        module.main()
    return output.getvalue()


@contextlib.contextmanager
def two_ranks(settings: dict[str, Any] | None) -> Iterator[None]:
    """Make Megatron's process groups of two ranks, with FSEP of these settings if any."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    import megatron_laer

    dist.init_process_group("gloo")
    if settings is not None:
        megatron_laer.enable(megatron_laer.FSEPConfig(**settings), seed=1)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    try:
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()


def test_the_script_trains_and_goes_on_from_its_checkpoint_and_so_does_stock(
    ranks: RankPools, first_run: tuple[str, Path]
) -> None:
    output, _ = first_run
    assert list(losses(output)) == list(range(STEPS))
    # A plan from the routing of a step is in force in the next one.
    assert metric(output, "layout_version") == list(range(STEPS))
    words = f"--steps {STEPS} --load {first_run[1]}"
    fsep = ranks(2).run(run, words)[0]
    stock = losses(ranks(2).run(run, f"{words} --stock")[0])
    assert list(stock) == list(range(STEPS, 2 * STEPS))
    assert losses(fsep) == pytest.approx(stock, rel=1e-6)
    assert metric(fsep, "layout_version") == list(stock), "planning goes on where it was"

    at_home = ranks(2).run(run, words, HOMES | {"late_plan": "wait"})[0]
    assert losses(at_home) == pytest.approx(stock, rel=1e-6)
    loads = metric(at_home, "load_imbalance"), metric(at_home, "stock_load_imbalance")
    assert loads[0][-1] < loads[1][-1], "no replica was made, so nothing is shown"


def warnings_without_steps(config: dict[str, Any], trains: bool) -> list[str]:
    """Return the plugin's warnings on this rank while the script runs without training steps."""
    import torch

    import megatron_laer

    def without_step(*_: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def evaluate(step: int, model: list[torch.nn.Module], _: Any) -> tuple[float, bool]:
        model[0].eval()
        with torch.no_grad():
            module.forward_step(module.batches(step), model[0])
        return 0.0, True

    with (
        loaded() as module,
        messages(logging.WARNING) as lines,
        mock.patch.object(sys, "argv", [str(OWN_LOOP), "--steps", "3"]),
        enabled_with(config),
        mock.patch.object(megatron_laer, "training_step", without_step, create=True),
    ):
        if not trains:
            module.train_step = evaluate
        module.main()
    return lines


def build_delayed(settings: dict[str, Any], overlaps: bool) -> None:
    """Build the script's model with weight gradients behind the dispatch."""
    with loaded() as own:
        config, ddp = own.TransformerConfig, own.DistributedDataParallelConfig

        def delayed(**given: Any) -> Any:
            made = config(**given)
            # Not by the constructor, which asks for Transformer Engine.
            made.overlap_dispatch_backward_with_experts_wgrad = True
            return made

        own.TransformerConfig = delayed
        own.DistributedDataParallelConfig = lambda **given: ddp(
            **given | {"overlap_grad_reduce": overlaps}
        )
        with two_ranks(settings):
            own.build_model()


def test_reduces_before_delayed_gradients_are_refused_as_by_flags(ranks: RankPools) -> None:
    message = refusal(ranks(2).run_raw(build_delayed, HOMES, True), "ValueError")
    assert f"  {REDUCES_BEFORE_WGRAD.setting}: " in message
    for settings, overlaps in ((HOMES, False), ({"sharding": "rows"}, True)):
        ranks(2).run(build_delayed, settings, overlaps)


@pytest.mark.parametrize(
    ("config", "trains", "warnings"),
    [({}, True, 1), ({}, False, 0), ({"planner": "static"}, True, 0)],
    ids=["planned", "evaluated", "not planned"],
)
def test_a_loop_that_needs_steps_and_has_none_is_told_so_once(
    ranks: RankPools, config: dict[str, Any], trains: bool, warnings: int
) -> None:
    first, second = ranks(2).run(warnings_without_steps, config, trains)
    assert len(first) == warnings and second == []
    for line in first:
        assert "without steps" in line and "megatron_laer.training_step(" in line


@contextlib.contextmanager
def bare_layer(settings: dict[str, Any] | None, **numbered: int) -> Iterator[Any]:
    """Build a MoE layer by itself, stock's without settings."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    with fresh_megatron([]), two_ranks(settings):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=4,
            num_moe_experts=4,
            moe_ffn_hidden_size=32,
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type="none",
            expert_model_parallel_size=2,
            add_bias_linear=False,
        )
        spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
        yield spec.submodules.mlp(config=config, **numbered)


def use_unnumbered_layer() -> None:
    import torch

    with bare_layer({"planner": "static"}) as layer:
        layer.eval()(torch.ones(4, 2, 32))


def test_a_layer_that_nobody_numbers_is_refused(ranks: RankPools) -> None:
    message = refusal(ranks(2).run_raw(use_unnumbered_layer), "ValueError")
    assert "layer_number=None" in message and "pass layer_number=" in message


def gradients_of_layer(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Return the gradients of a layer without Megatron's wrapper, and those of its input."""
    import torch

    torch.manual_seed(1)
    with bare_layer(settings, layer_number=1) as layer:
        random = torch.Generator().manual_seed(5)
        hidden = torch.rand(16, 2, 32, generator=random).requires_grad_()
        output, _ = layer(hidden)
        output.square().sum().backward()
        return {"input": hidden.grad, **{name: of.grad for name, of in layer.named_parameters()}}


def test_experts_at_home_have_stocks_gradients_without_a_wrapper(ranks: RankPools) -> None:
    at_home = {"planner": "random", "sharding": "experts"}
    stock, fsep = (ranks(2).run(gradients_of_layer, settings) for settings in (None, at_home))
    for mine, theirs in zip(fsep, stock, strict=True):
        assert mine.keys() == theirs.keys()
        for name, grad in theirs.items():
            assert mine[name] == pytest.approx(grad, rel=1e-5, abs=1e-6), name
