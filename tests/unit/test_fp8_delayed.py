"""Delayed scaling by Transformer Engine, on replacements of its quantiser and modules.

Letters: C slots, R rows of a matrix, K columns, T tokens.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_laer.choices import Unproven
from megatron_laer.cpu import fp8 as definitions
from megatron_laer.cpu.fp8_delayed import LinearScalings, Scaling, ScalingContext
from megatron_laer.cpu.fp8_experts import EmulatedGemm
from megatron_laer.layer.experts import fp8
from megatron_laer.layer.experts.fp8 import te, te_delayed
from megatron_laer.layer.experts.slot_linear import slot_linear
from megatron_laer.support import fp8_experts
from tests.slot_gemm import fixed_experts, poisoned_memory
from tests.unit.test_fp8_back_end import COLUMNS, GPU, KINDS, ROWS, Storage, Tensor, grouped_gemm

HOMES = 2
# The second home's expert is in two slots, and one slot has no tokens.
HOMES_C, TOKENS_C = [1, 0, 1, 0], [3, 0, 16, 40]
OPTIONS: dict[str, Any] = {"dtype": torch.bfloat16}
# Pass of Transformer Engine's checkpoints: "first" or "re-run".
PHASE: dict[str, str] = {}


class Quantiser:
    """Replacement of `Float8Quantizer`: its scale is given, and its amax a maximum of all calls."""

    def __init__(
        self,
        scale: torch.Tensor,
        amax: torch.Tensor,
        fp8_dtype: str,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
    ) -> None:
        self.scale, self.amax, self.kind = scale, amax, fp8_dtype
        self.set_usage(rowwise=rowwise, columnwise=columnwise)

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, matrix: torch.Tensor) -> Tensor:
        assert matrix.is_contiguous() and matrix.shape[1] % 16 == 0 and self.rowwise
        self.amax.copy_(torch.maximum(self.amax, matrix.abs().amax().float()))
        values, scale = definitions.by_scale(matrix, self.scale.view(1), KINDS[self.kind])
        made = Tensor(
            shape=matrix.shape,
            dtype=matrix.dtype,
            data=values.view(torch.uint8),
            fp8_scale_inv=scale,
            fp8_dtype=self.kind,
        )
        if self.columnwise:
            made.update_usage(columnwise_usage=True)
        return made


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    from megatron.core import fp8_utils

    modules = {
        te_delayed.Delayed._module: SimpleNamespace(Float8Quantizer=Quantiser, Float8Tensor=Tensor),
        f"{te.TENSORS}.storage.float8_tensor_storage": SimpleNamespace(Float8TensorStorage=Storage),
        te_delayed.Delayed._checkpoints: SimpleNamespace(
            is_fp8_activation_recompute_enabled=lambda: "pass" in PHASE,
            in_fp8_activation_recompute_phase=lambda: PHASE.get("pass") == "re-run",
        ),
        "transformer_engine_torch": SimpleNamespace(
            DType=SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2")
        ),
    }
    found = importlib.import_module
    monkeypatch.setattr(
        te.importlib, "import_module", lambda name, *a: modules.get(name) or found(name, *a)
    )
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda _: SimpleNamespace())
    monkeypatch.setattr(te.grouped, "grouped_gemm", lambda: grouped_gemm)
    monkeypatch.setattr(te.grouped.GEMM.__class__, "problem", lambda *_: None)
    return SimpleNamespace(
        fp8="hybrid", fp8_recipe="delayed", params_dtype=torch.bfloat16, fp8_amax_history_len=1
    )


def home_state(config: Any, home: int) -> LinearScalings:
    layer = SimpleNamespace(config=config, is_first_microbatch=True)
    made = LinearScalings(layer, definitions.E4M3, definitions.E5M2)
    for operand, scale in zip(made._all, (20.0, 90.0, 0.5), strict=True):
        operand.scale.fill_(scale * (home + 1))
    return made


def quantiser(of: Scaling) -> Quantiser:
    kind = "e4m3" if of.dtype == definitions.E4M3 else "e5m2"
    return Quantiser(of.scale, torch.zeros(1), kind)


def modules_of(states: list[LinearScalings], grouped: bool) -> list[Any]:
    """Return Transformer Engine's modules with these scales: one of all homes, or one of each."""

    def module(group: list[LinearScalings], **more: Any) -> Any:
        forward = [
            made
            for state in group
            for made in (quantiser(state.input), quantiser(state.weight), None)
        ]
        backward = [made for state in group for made in (quantiser(state.grad), None)]
        quantizers = {"scaling_fwd": forward, "scaling_bwd": backward}
        return SimpleNamespace(
            quantizers=quantizers, _fp8_workspaces={}, is_first_microbatch=True, **more
        )

    if grouped:
        return [module(states, num_gemms=len(states))]
    return [module([state]) for state in states]


def noted(modules: list[Any]) -> list[float]:
    """Return the amaxes of inputs and gradients, by home."""
    each = [
        (module.quantizers["scaling_fwd"][3 * gemm], module.quantizers["scaling_bwd"][2 * gemm])
        for module in modules
        for gemm in range(getattr(module, "num_gemms", 1))
    ]
    return [float(part.amax) for pair in each for part in pair]


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "sequential"])
def test_replicas_have_their_homes_scales_and_add_to_their_amax(config: Any, grouped: bool) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(ROWS, COLUMNS, **OPTIONS) for _ in range(HOMES)]
    input_TK, grad_TR = (torch.randn(sum(TOKENS_C), size, **OPTIONS) for size in (COLUMNS, ROWS))
    placeholder = torch.zeros(len(TOKENS_C), ROWS, COLUMNS, **OPTIONS)
    states = [home_state(config, home) for home in range(HOMES)]
    modules = modules_of(states, grouped)
    mine: Any = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    mine.attach(modules)
    defined = EmulatedGemm(config, ROWS, COLUMNS)
    defined.attach([SimpleNamespace(scalings=state) for state in states])
    found = []
    for gemm in (mine, defined):
        payload = torch.stack([gemm.pack(weights[home], home) for home in HOMES_C])
        given, weight = input_TK.clone().requires_grad_(), placeholder.clone().requires_grad_()
        experts = fixed_experts(payload, placeholder)
        with poisoned_memory():
            output = slot_linear(given, weight, experts, 0, TOKENS_C, gemm.for_slots(HOMES_C))
            # Forward's end changes the scale of tokens, and backward has those of forward.
            before = [state.input.scale.clone() for state in states]
            for state in states:
                state.input.scale.mul_(3.0)
            grads = torch.autograd.grad(output, (given, weight), grad_TR)
            for state, scale in zip(states, before, strict=True):
                state.input.scale.copy_(scale)
        found.append((payload, output, *grads))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    expected = [
        float(operand.amaxes[0]) for state in states for operand in (state.input, state.grad)
    ]
    assert noted(modules) == expected and min(expected) > 0


def test_a_rerun_has_the_scales_of_its_first_pass_and_adds_to_no_amax(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    states = [home_state(config, home) for home in range(HOMES)]
    modules = modules_of(states, grouped=True)
    of_layer: Any = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    of_layer.attach(modules)
    payload = torch.stack([of_layer.pack(torch.randn(ROWS, COLUMNS, **OPTIONS)) for _ in TOKENS_C])
    passes = [torch.randn(sum(TOKENS_C), COLUMNS, **OPTIONS) for _ in range(2)]
    first, again = [], []
    for input_TK in passes:  # two microbatches are in flight, and each ends with new scales
        monkeypatch.setitem(PHASE, "pass", "first")
        first.append(of_layer.for_slots(HOMES_C).forward(input_TK, payload, TOKENS_C))
        for state in states:
            state.input.scale.mul_(3.0)
    assert min(noted(modules)[::2]) > 0
    for module in modules:
        for quantise in filter(None, module.quantizers["scaling_fwd"]):
            quantise.amax.zero_()
    for input_TK in passes:
        monkeypatch.setitem(PHASE, "pass", "re-run")
        gemm = of_layer.for_slots(HOMES_C)
        again.append(gemm.forward(input_TK, payload, TOKENS_C))
        monkeypatch.delitem(PHASE, "pass")
        grad_CRK = torch.zeros(len(TOKENS_C), ROWS, COLUMNS)
        gemm.weight_grad(torch.ones(sum(TOKENS_C), ROWS, **OPTIONS), input_TK, TOKENS_C, grad_CRK)
        assert grad_CRK[2].any()
    assert all(map(torch.equal, first, again)) and noted(modules)[::2] == [0.0] * HOMES
    in_force = of_layer.for_slots(HOMES_C).forward(passes[0], payload, TOKENS_C)
    assert not torch.equal(first[0], in_force)


def test_first_passes_without_a_rerun_leave_no_scales_to_the_next_step(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [home_state(config, home) for home in range(HOMES)]
    gemm: Any = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    gemm.attach(modules_of(states, grouped=True))
    payload = torch.stack([gemm.pack(torch.randn(ROWS, COLUMNS, **OPTIONS)) for _ in TOKENS_C])
    input_TK = torch.randn(sum(TOKENS_C), COLUMNS, **OPTIONS)

    def output(of_pass: str) -> Any:
        monkeypatch.setitem(PHASE, "pass", of_pass)
        return gemm.for_slots(HOMES_C).forward(input_TK, payload, TOKENS_C)

    left = output("first")
    gemm.end_step()
    for state in states:
        state.input.scale.mul_(3.0)
    first = output("first")
    assert torch.equal(output("re-run"), first) and not torch.equal(first, left)


def test_definitions_too_forget_first_passes_at_the_end_of_a_step(config: Any) -> None:
    contexts, state = ScalingContext(), home_state(config, 0)
    contexts.add(state, config)
    gemm = EmulatedGemm(config, ROWS, COLUMNS, contexts)
    gemm.attach([SimpleNamespace(scalings=state)])
    with torch.no_grad(), contexts.checkpointed():
        contexts.passes([state], state.kept_scales)
        gemm.for_slots([0])
    assert state.kept_scales and gemm._kept_scales
    gemm.end_step()
    assert not state.kept_scales and not gemm._kept_scales
    with torch.no_grad(), contexts.checkpointed():
        assert len(contexts._awaited_first) == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tp_only_amax_red", True, "tp_only_amax_red=True"),
        ("disable_parameter_transpose_cache", True, "disable_parameter_transpose_cache=True"),
        ("fp8_wgrad", False, "--no-fp8-wgrad"),
        ("cuda_graph_impl", "transformer_engine", "--cuda-graph-impl"),
    ],
)
def test_fields_that_change_scales_are_refused(
    config: Any, name: str, value: Any, said: str
) -> None:
    assert fp8_experts.problems(config, [Unproven.FP8_EXPERTS]) == []
    setattr(config, name, value)
    (problem,) = fp8_experts.problems(config, [Unproven.FP8_EXPERTS])
    assert problem.startswith(f"{said} with ") and "tensorwise" in problem
    config.fp8_recipe = "tensorwise"
    assert fp8_experts.problems(config, [Unproven.FP8_EXPERTS]) == []


def test_scales_saved_by_another_number_of_ranks_are_refused() -> None:
    def saved(**more: Any) -> str | None:
        given = {"fp8": "hybrid", "fp8_recipe": "delayed", "expert_model_parallel_size": 4, **more}
        return fp8_experts.resume_problem(SimpleNamespace(**given), 2)

    assert "give --expert-model-parallel-size 4 or --fp8-recipe tensorwise" in str(saved())
    assert saved(expert_model_parallel_size=2) is None
    assert saved(fp8_recipe="tensorwise") is None and saved(fp8=None) is None
    assert fp8_experts.resume_problem(None, 2) is None


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "sequential"])
def test_later_microbatches_send_the_bytes_of_the_first(config: Any, grouped: bool) -> None:
    states = [home_state(config, home) for home in range(HOMES)]
    modules = modules_of(states, grouped)
    gemm: Any = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    gemm.attach(modules)
    weight_RK = torch.randn(ROWS, COLUMNS, **OPTIONS)
    first = gemm.pack(weight_RK, 1)
    module, name = (modules[0], "weight1") if grouped else (modules[1], "weight")
    module._fp8_workspaces[name] = quantiser(states[1].weight)(weight_RK)
    module.is_first_microbatch = False
    states[1].weight.scale.mul_(2.0)
    assert torch.equal(gemm.pack(weight_RK, 1), first)
    module.is_first_microbatch = True  # the next step's first, which has the new scale
    assert not torch.equal(gemm.pack(weight_RK, 1), first)


def test_a_parameter_in_fp8_is_sent_as_it_is(config: Any) -> None:
    states = [home_state(config, home) for home in range(HOMES)]
    modules = modules_of(states, grouped=True)
    gemm: Any = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    gemm.attach(modules)
    of_optimizer: Any = quantiser(states[1].weight)(torch.randn(ROWS, COLUMNS, **OPTIONS))
    states[1].weight.scale.mul_(2.0)
    values_RK, scale = gemm._form.unpack(gemm.pack(of_optimizer, 1))
    assert torch.equal(values_RK, of_optimizer._data)
    assert torch.equal(scale, of_optimizer._scale_inv)


def test_before_their_first_forward_modules_have_a_scale_of_one(config: Any) -> None:
    module = SimpleNamespace(
        quantizers={"scaling_fwd": [], "scaling_bwd": []},
        _fp8_workspaces={},
        is_first_microbatch=True,
    )
    gemm: Any = fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)
    gemm.attach([module])
    weight_RK = torch.randn(ROWS, COLUMNS, **OPTIONS)
    values_RK, scale = gemm._form.unpack(gemm.pack(weight_RK))
    assert torch.equal(values_RK.view(definitions.E4M3), weight_RK.to(definitions.E4M3))
    assert float(scale) == 1.0


def test_an_unknown_signature_is_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Quantiser, "__init__")
    with pytest.raises(ValueError, match=r"Float8Quantizer of Tr.* has no amax, .*; install"):
        fp8.quantised_gemm(config, ROWS, COLUMNS, GPU)


@pytest.mark.parametrize(
    ("algorithm", "scales"), [("most_recent", [64.0, 112.0, 448.0]), ("max", [64.0, 64.0, 64.0])]
)
def test_a_scale_follows_from_the_amaxes_before(algorithm: str, scales: list[float]) -> None:
    scaling, found = Scaling(definitions.E4M3, history=3), []
    for largest in (7.0, 4.0, 1.0):
        scaling.quantised(torch.tensor([[largest, -largest / 2]]))
        scaling.quantised(torch.tensor([[0.5]]))
        scaling.update(algorithm, margin=0)
        found.append(float(scaling.scale))
    assert found == scales
    scaling.update("most_recent", margin=0)  # nothing was seen
    assert float(scaling.scale) == scales[-1]
