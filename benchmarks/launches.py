"""Counts the kernels that an FSEP layer launches per microbatch, forward and backward.

    python -m benchmarks.launches [--before DIR] [--json OUT]

It needs no GPU. One rank of N runs Megatron's MoE layer with FSEP on the CPU, with torch's fake
process groups. Every operation that would launch a kernel is counted: an ATen operation as one,
views and memory as none. A launch of a Triton kernel, which Triton's interpreter executes, is one
too. The router is omitted, since its choice is given. The activation, which torch compiles into one
kernel on CUDA, counts with all its operations here.

`--before` names a checkout of another commit, with its native core built, for a second table.

Legend: N ranks, C slots per rank, E experts, K experts of a token, T tokens of a rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, FFN = 64, 128


class Case(NamedTuple):
    """One shape of a layer, its restore algorithm (`exchange`) and sharding.

    `sharding` is a word of `--fsep-sharding`, or `stock` for Megatron's own layer. With `balanced`,
    all experts have as many tokens.
    """

    capacity: int
    ranks: int
    experts: int
    topk: int
    tokens: int
    exchange: str = "flat"
    sharding: str = "rows"
    balanced: bool = False

    def __str__(self) -> str:
        sizes = f"C {self.capacity}, N {self.ranks}, E {self.experts}, K {self.topk}"
        how = f"{self.sharding}, {'balanced' if self.balanced else 'skewed'}"
        return f"{sizes}, T {self.tokens}, {self.exchange}, {how}"


_SHAPES = ((2, 32, 8, 2, 512), (5, 64, 256, 8, 256), (16, 64, 256, 8, 256))
CASES = (
    *(Case(*shape, exchange) for shape in _SHAPES for exchange in ("flat", "node")),
    Case(8, 64, 256, 8, 8192),  # for the memory kept for backward
    Case(*_SHAPES[1], sharding="experts"),
)
BALANCED = tuple(
    Case(*_SHAPES[1], sharding=sharding, balanced=True) for sharding in ("stock", "experts", "rows")
)
_NODE_SIZE = 8

# Operations that launch nothing: they make views or request memory.
_LAUNCH_NOTHING = frozenset(
    "view detach expand select slice t transpose unbind permute alias split split_with_sizes "
    "_unsafe_view unsqueeze squeeze as_strided empty new_empty empty_like empty_strided "
    "new_empty_strided _reshape_alias lift_fresh resize_ is_pinned chunk unfold diagonal "
    "record_stream _local_scalar_dense".split()
)
# A slot without tokens has zeros written in place of a product.
_GEMMS = frozenset({"mm", "addmm", "bmm", "matmul", "_grouped_mm", "zero_"})


def kind_of(operation: str) -> str | None:
    """Return the kind of an operation, "namespace::name"; None if it launches nothing."""
    namespace, name = operation.split("::")
    if namespace == "c10d":
        return "collectives"
    if namespace == "profiler" or name in _LAUNCH_NOTHING:
        return None
    return "GEMMs" if name in _GEMMS else "rest"


def main(argv: Sequence[str] | None = None) -> int:
    """Count in one process per case and checkout, and print a table."""
    # Not at the top: workers run this file with the modules of earlier commits.
    from benchmarks.command_line import add_json, checkout, parser_of, write_json

    parser = parser_of("benchmarks.launches", __doc__)
    parser.add_argument("--before", type=checkout, help="a checkout of another commit")
    add_json(parser, "where to write all counts")
    args = parser.parse_args(argv)
    checkouts = {"now": ROOT} if args.before is None else {"before": args.before, "now": ROOT}
    results = {
        str(case): {label: count(case, folder) for label, folder in checkouts.items()}
        for case in (*CASES, *BALANCED)
    }
    print("\n".join(table(results)))
    write_json(args.json, results)
    return 0


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| case | commit | replicas of the hottest | launches but GEMMs and collectives | "
        "of it reduce | GEMMs | collectives | kept for backward, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, by_commit in results.items():
        for label, found in by_commit.items():
            kinds = Counter[str](found["kinds"])
            lines.append(
                f"| {case} | {label} | {found['replicas']} | {kinds['rest']} | "
                f"{kinds['reduce']} | {kinds['GEMMs']} | {kinds['collectives']} | "
                f"{found['saved_MB']:.2f} |"
            )
    return lines


def count(case: Case, checkout: Path = ROOT) -> Any:
    """Count a case's launches in a process of its own, with the package of a checkout."""
    # Triton decides at import whether it interprets.
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "MEGATRON_LAER_DEVICE": "cpu",
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(case)]
    done = subprocess.run(
        command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _count(case: Case) -> dict[str, Any]:
    """Run forward and backward of one layer twice, and count the second time."""
    from megatron_laer import launch

    launch.prepare()
    import torch

    counts_NE = counts_of(case)
    routing_TE = routing_of(case, counts_NE[0])
    layer = build(case)
    probs_TE = torch.rand(case.tokens, case.experts) * routing_TE
    hidden = torch.randn(case.tokens, 1, HIDDEN, dtype=torch.bfloat16)
    with gathering(torch.from_numpy(counts_NE)), counting() as counter:
        take_kernels_of_cuda(lambda: counter.add("triton::kernel"))
        for _ in range(2):
            counter.found.clear()
            inputs = [part.detach().requires_grad_() for part in (hidden, probs_TE)]
            layer.route = lambda *_, inputs=inputs, **__: (inputs[1], routing_TE)
            with _saved() as saved:
                output, _ = layer(inputs[0])
            output.backward(output.detach())
    found = {f"{part} {name}": number for (part, name), number in counter.found.items()}
    kinds = Counter[str]()
    for (part, name), number in counter.found.items():
        kinds[kind_of(name) or ""] += number
        if part.startswith("reduce") and kind_of(name) == "rest":
            kinds["reduce"] += number
    return {
        "replicas": _replicas(case, counts_NE),
        "kinds": kinds,
        "saved_MB": sum(saved.values()) / 1e6,
        "operations": found,
    }


def counts_of(case: Case, seed: int = 0) -> Any:
    """Draw each rank's tokens per expert, int64 [N, E], from one skewed distribution."""
    import numpy as np

    if case.balanced:
        return np.full((case.ranks, case.experts), case.tokens * case.topk // case.experts)
    rng = np.random.default_rng(seed)
    share_E = rng.dirichlet(np.full(case.experts, 0.3))
    rows = [rng.multinomial(case.tokens * case.topk, share_E) for _ in range(case.ranks)]
    return np.minimum(rows, case.tokens)


def routing_of(case: Case, counts_E: Any) -> Any:
    """Make a map [T, E] with these tokens per expert, and at most K experts per token."""
    import torch

    experts = torch.arange(case.experts).repeat_interleave(torch.from_numpy(counts_E))
    routing_TE = torch.zeros(case.tokens, case.experts, dtype=torch.bool)
    routing_TE[torch.arange(len(experts)) % case.tokens, experts] = True
    return routing_TE


def build(case: Case, **settings: Any) -> Any:
    """Build the MoE layer of rank 0 of N as Megatron does, with main gradients in fp32.

    `settings` are FSEP's, in place of those here.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import megatron_laer

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.ranks)
    if case.sharding != "stock":
        options: dict[str, Any] = {"capacity": case.capacity, "restore_algorithm": case.exchange}
        if "sharding" in megatron_laer.FSEPConfig.__dataclass_fields__:  # not in early commits
            options["sharding"] = case.sharding
        options |= {"plan_mode": "exact", "node_size": _NODE_SIZE, "scheduler": "off"} | settings
        megatron_laer.enable(megatron_laer.FSEPConfig(**options), seed=1)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=case.ranks, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=case.experts,
        moe_ffn_hidden_size=FFN,
        moe_router_topk=case.topk,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bf16=True,
        params_dtype=torch.bfloat16,
        expert_model_parallel_size=case.ranks,
        moe_token_dispatcher_type="alltoall",
        expert_tensor_parallel_size=1,
        add_bias_linear=False,
    )
    spec = get_gpt_layer_local_spec(num_experts=case.experts, moe_grouped_gemm=False)
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=case.tokens)
    layer = model.decoder.layers[0].mlp
    for parameter in layer.experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    return layer


def _replicas(case: Case, counts_NE: Any) -> int:
    from megatron_laer.choices import Sharding
    from megatron_laer.planner.construct import construct_layout
    from megatron_laer.planner.geometry import Geometry

    if case.sharding == "stock":
        return 1
    sharding = Sharding(case.sharding)
    shape = case.ranks, case.experts, case.capacity, _NODE_SIZE
    static = Geometry(*shape, sharding).static_layout
    return int(construct_layout(counts_NE, static, _NODE_SIZE, sharding).replicas_E.max())


@contextmanager
def _saved() -> Iterator[dict[int, int]]:
    """Collect the bytes that autograd keeps, except hidden states and results of the experts."""
    import torch

    found: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        if tensor.dim() == 0 or tensor.shape[-1] not in (HIDDEN, FFN, 2 * FFN):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@contextmanager
def gathering(counts_NE: Any) -> Iterator[None]:
    """Replace the counts that gathers return, and their words; keep the other values behind."""
    import torch
    import torch.distributed as dist

    gather = dist.all_gather_into_tensor

    def all_gather_into_tensor(output: Any, payload: Any, *args: Any, **kwargs: Any) -> Any:
        work = gather(output, payload, *args, **kwargs)
        with _uncounted():
            rows = output.view(len(counts_NE), -1)
            rows.copy_(payload.expand_as(rows))
            num_ranks, num_experts = counts_NE.shape
            rows[:, :num_experts] = counts_NE
            if words := rows.shape[1] - num_experts - 3:  # none in earlier commits
                bytes_NWX = counts_NE.view(num_ranks, words, -1)
                shifts_X = 8 * torch.arange(bytes_NWX.shape[2])
                rows[:, num_experts:-3] = (bytes_NWX << shifts_X).sum(dim=2)
        return work

    dist.all_gather_into_tensor = all_gather_into_tensor
    assert torch.is_grad_enabled()
    try:
        yield
    finally:
        dist.all_gather_into_tensor = gather


def _uncounted() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def take_kernels_of_cuda(on_launch: Callable[[], None]) -> None:
    """Use Triton's kernels where CUDA would, and call `on_launch` at each launch.

    A commit without `segments.kernels_of` is counted without kernels.
    """
    try:
        _ = import_module("megatron_laer.runtime.comm.segments").kernels_of
    except (ModuleNotFoundError, AttributeError):
        return
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def counted(*args: Any, **kwargs: Any) -> Any:
        on_launch()
        with _uncounted():
            return run(*args, **kwargs)

    GridExecutor.__call__ = counted
    for module in ("layer.dispatch.row_map", "runtime.comm.segments", "verify.sums"):
        import_module(f"megatron_laer.{module}").kernels_of = lambda package, _: import_module(
            f"{package}.kernels"
        )


@contextmanager
def counting() -> Iterator[Any]:
    """Count operations by name and by the exchange that they belong to."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found = Counter[tuple[str, str]]()
            self.part = ""

        def add(self, name: str) -> None:
            if kind_of(name) is not None:
                self.found[self.part, name] += 1

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            name = func._schema.name
            self.add(name)
            return func(*args, **(kwargs or {}))

    count = Count()
    profiler: Any = torch.autograd.profiler
    named = profiler.record_function

    @contextmanager
    def record_function(label: str, *_: Any) -> Iterator[None]:
        before, count.part = count.part, label
        yield
        count.part = before

    profiler.record_function, profiler._is_profiler_enabled = record_function, True
    try:
        with count:
            yield count
    finally:
        profiler.record_function, profiler._is_profiler_enabled = named, False


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(_count(Case(*json.loads(sys.argv[2])))))
    else:
        from benchmarks.command_line import program

        program("python -m benchmarks.launches", main)
