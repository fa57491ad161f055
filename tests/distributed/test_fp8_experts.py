"""Experts in fp8 at home, and their replicas, by definitions in place of Transformer Engine."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.layout import ExpertLayout
from tests.checkpoints import assert_equal
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.replay import train_row
from tests.parity.rows import DIST_OPT
from tests.probes import running

FP8 = " --fp8-format hybrid --fp8-recipe tensorwise --bf16"
ALLOW = " --fsep-allow-unproven fp8-experts"
AT_HOME = " --expert-parallel-mode fsep" + ALLOW
RANDOM = FP8 + AT_HOME + " --fsep-planner random"
# Experts' parameters are fp8 bytes and scales themselves.
PARAMETERS = " --fp8-param-gather"
# Sizes are multiples of 32.
MX = " --fp8-format e4m3 --fp8-recipe mxfp8 --bf16 --hidden-size 64"
RANDOM_MX = MX + AT_HOME + " --fsep-planner random"
# Checkpoints have values along rows, exact along columns too unless they are subnormal there.
MX_PARAMETERS = PARAMETERS + " --reuse-grad-buf-for-mxfp8-param-ag"
HELD = " --fsep-restore step --fsep-plan-mode forecast"
# Tokens of each expert: none, one, fewer and more than the multiple, and the multiple.
TOKENS_E = [40, 1, 0, 16]


def replicas_and_homes(fp8_format: str, recipe: str, fp8_param: bool) -> list[bool]:
    """Compute every expert at home and as a replica, on the same tokens; compare all bits."""
    import torch.distributed as dist

    from tests import one_layer, te_fp8
    from tests.doubles.fp8_parameters import Fp8Parameter

    of_fp8 = {"fp8": fp8_format, "fp8_recipe": recipe, "gated_linear_unit": True}
    of_fp8 |= {"fp8_param": fp8_param}
    settings = {"sharding": "experts", "allow_unproven": ["fp8-experts"], "planner": "random"}
    one_layer.MODELS["fp8"] = of_fp8
    with te_fp8.replaced_on_cpu(), one_layer.one_layer("gloo", "fp8", **settings) as wrapped:
        layer, coordinator = wrapped.module, running()
        rank, home = dist.get_rank(), coordinator.geometry.home_slots
        assert (home, coordinator.geometry.replica_slots) == (2, 2)
        assert all(isinstance(p, Fp8Parameter) == fp8_param for p in layer.state.share.parameters)
        generator = torch.Generator().manual_seed(0)
        hidden_of = [
            torch.randn(tokens, one_layer.HIDDEN, generator=generator) for tokens in TOKENS_E
        ]
        probs_of = [torch.rand(tokens, generator=generator) for tokens in TOKENS_E]

        def run(experts: list[int], compute: Any) -> list[Any]:
            """Return the experts' outputs, and gradients of inputs and probabilities."""
            hidden = torch.cat([hidden_of[expert] for expert in experts]).requires_grad_()
            probs = torch.cat([probs_of[expert] for expert in experts]).requires_grad_()
            sizes = [TOKENS_E[expert] for expert in experts]
            output = compute(hidden, probs, sizes)
            (output.float() ** 2).sum().backward()
            found = output.detach(), hidden.grad, probs.grad
            return [*zip(*(part.split(sizes) for part in found), strict=True)]

        mine, others = [2 * rank, 2 * rank + 1], [2 - 2 * rank, 3 - 2 * rank]
        at_home = run(
            mine,
            lambda hidden, probs, sizes: layer._home_experts._at_home(
                hidden, torch.tensor(sizes), probs
            ),
        )
        own = [[part.main_grad.clone() for part in matrix] for matrix in layer.state.share.matrices]
        wrapped.zero_grad_buffer()

        layout = ExpertLayout.from_slots(2, 4, 4, [0, 1, 2, 3, 2, 3, 0, 1])
        restored = layer.state.experts_of_pass(layout, training=True)
        compute = layer._home_experts._compute
        with_replicas = run(
            others,
            lambda hidden, probs, sizes: restored.after_compute(
                compute(restored.dispatch(restored.gate(hidden)), probs, restored, sizes)
            ),
        )
        sums = [[part.main_grad for part in matrix] for matrix in layer.state.share.matrices]
        homes: list[Any] = [None, None]
        dist.all_gather_object(homes, at_home)
        expected = [parts for of_rank in homes for parts in of_rank]
        same = [
            torch.equal(got, wanted)
            for expert, parts in zip(others, with_replicas, strict=True)
            for got, wanted in zip(parts, expected[expert], strict=True)
        ]
        same += [
            torch.equal(got, wanted) and (bool(wanted.any()) or not TOKENS_E[expert])
            for got_h, wanted_h in zip(sums, own, strict=True)
            for expert, got, wanted in zip(mine, got_h, wanted_h, strict=True)
        ]
        return same


@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize(
    ("recipe", "fp8_param"),
    product(["tensorwise", "blockwise", "mxfp8"], [False, True]),
)
def test_a_replica_computes_bit_for_bit_as_its_home(
    ranks: RankPools, fp8_format: str, recipe: str, fp8_param: bool
) -> None:
    for same in ranks(2).run(replicas_and_homes, fp8_format, recipe, fp8_param):
        assert same == [True] * (2 * 3 + 2 * 2)


@pytest.mark.parametrize(
    "flags", [RANDOM + HELD, RANDOM + PARAMETERS, RANDOM_MX + HELD, RANDOM_MX + MX_PARAMETERS]
)
def test_a_resumed_run_has_the_same_bits(trained: Trainings, tmp_path: Path, flags: str) -> None:
    flags += DIST_OPT + " --ckpt-format torch_dist --override-opt_param-scheduler"
    whole = trained(f"{flags} --save {tmp_path} --save-interval 2", by=train_row, steps=4)
    rest = trained(f"{flags} --load {tmp_path} --ckpt-step 2", by=train_row, steps=4)
    assert rest.losses == whole.losses[2:]
    assert_equal(rest.weights, whole.weights)


@pytest.mark.parametrize("in_fp8", [FP8 + PARAMETERS, MX + MX_PARAMETERS])
def test_without_replicas_a_run_is_stock_bit_for_bit(trained: Trainings, in_fp8: str) -> None:
    stock, homes = (
        trained(in_fp8 + DIST_OPT + mode, by=train_row)
        for mode in ("", AT_HOME + " --fsep-planner static")
    )
    assert identical(homes, stock)


def only_the_last_experts(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".layers.1.mlp.experts." in name


def test_frozen_layers_before_trained_experts_are_taken(trained: Trainings) -> None:
    record = trained(RANDOM + DIST_OPT, None, only_the_last_experts, by=train_row, steps=2)
    assert len(record.losses) == 2 and all(norm > 0 for norm in record.grad_norms)
