"""One whole MoE layer, forward and backward: FSEP's against stock Megatron's on the same card.

`python -m benchmarks.gpu.layer`. The process stands in for rank 0 of N (`lone_rank`), and routing
is forced to balance on both sides. Parameters have the float32 gradient buffers of Megatron's
data-parallel wrapper. On both sides home experts' products are Transformer Engine's where that is
installed, fused with the accumulation of gradients. Times are for a layer alone, where FSEP can
hide its exchanges only behind the layer's own products.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import lone_rank
from benchmarks.gpu.recipe import has_transformer_engine
from benchmarks.gpu.report import LABELLED, Part, Setting, run_part
from benchmarks.gpu.sizes import Model, models
from benchmarks.gpu.timing import Times, elapsed_ms

SIDES = ("stock", "fsep")
_WARM_UP, _ROUNDS, _TURNS = 3, 10, 2
_ONE = "--one"


def measure(setting: Setting) -> Part:
    """Measure both sides in turn, each time in a process of its own.

    A process can be rank 0 of one N only, and memory of one side would count for the other.
    """
    part = Part()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    chosen = models(setting.dry)
    for turn in range(1 if setting.dry else _TURNS):
        for model in chosen:
            for side in SIDES:
                if setting.budget.spent:
                    part.left_out.append(f"{side} at {model.name}, turn {turn + 1}: no time left")
                    continue
                module = ["-m", *[LABELLED] * setting.dry, "benchmarks.gpu.layer"]
                words = [sys.executable, *module, _ONE, side, model.name]
                done = subprocess.run(
                    words + ["--dry-run"] * setting.dry, capture_output=True, text=True
                )
                if done.returncode:
                    print(done.stderr[-3000:], file=sys.stderr)
                    part.problems.append(f"{side} at {model.name}: see the log of this part")
                    continue
                of_model = found.setdefault(model.name, {})
                of_model.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
    part.tables["One MoE layer beside stock's"] = rows(found)
    return part


def rows(found: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Return the table of times over all turns, ratios to stock, and memory peaks."""
    table = []
    for model, sides in found.items():
        all_ms = {
            side: {
                which: Times.of([ms for turn in turns for ms in turn[which]])
                for which in ("forward", "backward")
            }
            for side, turns in sides.items()
        }
        for side, times in all_ms.items():
            whole_ms = sum(each.median_ms for each in times.values())
            stock_ms = sum(each.median_ms for each in all_ms.get("stock", {}).values())
            table.append(
                {
                    "model": model,
                    "side": side,
                    "experts by": sides[side][0]["experts"],
                    "rows": sides[side][0]["rows"],
                    **times["forward"].cells("forward "),
                    **times["backward"].cells("backward "),
                    "of stock's time": whole_ms / stock_ms if stock_ms else "",
                    "peak MiB": max(turn["peak_bytes"] for turn in sides[side]) / 2**20,
                }
            )
    return table


def measure_one(side: str, model: Model, dry: bool) -> dict[str, Any]:
    from megatron_laer import launch

    lone_rank.install(model.ranks)
    launch.prepare()

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    import megatron_laer

    if side == "fsep":
        # A rank whose peers are copies of itself has nothing to compare.
        settings = megatron_laer.FSEPConfig(
            node_size=min(8, model.ranks), late_plan="wait", verify="off"
        )
        megatron_laer.enable(settings, seed=1)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=model.ranks, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    device = torch.device("cuda", torch.cuda.current_device())
    grouped = has_transformer_engine(dry=dry)
    layer = _build(model, grouped).to(device)
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    torch.cuda.reset_peak_memory_stats()
    computed: list[int] = []
    times = _times(layer, model, device, computed, rounds=2 if dry else _ROUNDS)
    megatron_laer.disable()
    how = "grouped GEMM" if grouped else "a loop"
    if side == "fsep":
        how += ", replicas by --fsep-set gemm=loop"
    peak = torch.cuda.max_memory_allocated()
    return {**times, "experts": how, "rows": computed[-1], "peak_bytes": peak}


def _build(model: Model, grouped: bool) -> torch.nn.Module:
    """Build Megatron's MoE layer of these sizes; FSEP's if FSEP is on."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=model.hidden,
        num_attention_heads=model.hidden // 32,
        num_moe_experts=model.experts,
        moe_ffn_hidden_size=model.ffn,
        ffn_hidden_size=model.ffn,
        moe_router_topk=model.topk,
        moe_router_load_balancing_type="none",
        moe_router_force_load_balancing=True,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=grouped,
        moe_permute_fusion=grouped,
        gradient_accumulation_fusion=grouped,
        expert_model_parallel_size=model.ranks,
        expert_tensor_parallel_size=1,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    make = gpt_layer_specs.get_gpt_layer_local_submodules
    if grouped:
        make = gpt_layer_specs.get_gpt_layer_with_transformer_engine_submodules
    builder = make(num_experts=model.experts, moe_grouped_gemm=grouped).mlp
    layer: torch.nn.Module = builder(config=config, layer_number=1)
    return layer


def _times(
    layer: torch.nn.Module, model: Model, device: torch.device, computed: list[int], rounds: int
) -> dict[str, list[float]]:
    """Return the times of each step; `computed` receives the rows of the experts."""
    import megatron_laer

    shape = model.tokens, 1, model.hidden
    hidden = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(shape, device=device, dtype=torch.bfloat16)
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    experts: Any = layer.experts
    experts.register_forward_pre_hook(lambda _, given: computed.append(len(given[0])))
    outputs: list[torch.Tensor] = []
    for step in range(_WARM_UP + rounds):
        with megatron_laer.training_step(step, 1):
            forward_ms = elapsed_ms(lambda: outputs.append(layer(hidden)[0]))
            backward_ms = elapsed_ms(lambda: outputs.pop().backward(grad))
        if step >= _WARM_UP:
            times["forward"].append(forward_ms)
            times["backward"].append(backward_ms)
        hidden.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
    return times


def main(arguments: Sequence[str]) -> int:
    """Measure everything, or one model's side for the process that measures everything."""
    if arguments[:1] != [_ONE]:
        return run_part(__doc__, measure, arguments)
    parser = argparse.ArgumentParser()
    parser.add_argument(_ONE, nargs=2, dest="one")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    side, name = options.one
    (model,) = [model for model in models(options.dry_run) if model.name == name]
    print(json.dumps(measure_one(side, model, options.dry_run)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
