"""The tables of docs/predict.md: clusters, and each model as Megatron and FSEP build it.

    python -m tests.configurations

prints them, in a process of its own, since it patches torch and Megatron. Megatron parses a model's
flags, validates them, and builds the model with FSEP as one of `RANKS` ranks. Its tensors have
shapes and no memory, and its process groups send nothing. A test looks for each line on the page.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_laer.device import CPU_FLAGS
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.tools.model_flags import model_flags
from megatron_laer.tools.recipes.command_lines import without
from tests.documents import ROOT

_CONFIGS = ROOT / "configs"
MODELS = sorted(
    (path.stem for path in _CONFIGS.glob("models/*.yaml")),
    key=lambda name: (name.startswith("tiny-"), name),
)
CLUSTERS = sorted(path.stem for path in _CONFIGS.glob("clusters/*.yaml"))
FACTS = Path(__file__).with_name("configurations.yaml")
# Divides the rows of every model's experts, so that each rank has as many parameters.
RANKS = 8
PARTS = ("embedding", "output", "mtp")
KINDS = ("all", "active")
HEAD = (
    "| configuration | parameters | active | published | counted as published | `check-recipe` "
    "| proved by |",
    f"|{'---|' * 7}",
)
_RUN_FLAGS = (
    "--micro-batch-size 1 --train-iters 1 --lr 1e-4 --expert-tensor-parallel-size 1 "
    f"--expert-model-parallel-size {RANKS} --expert-parallel-mode fsep --fsep-sharding rows "
    # Weights are not drawn, and there is no tokenizer to give a vocabulary.
    "--no-initialization --tokenizer-type NullTokenizer"
).split()
_UNITS = {"B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Sizes:
    """Number of parameters of a model, by part; "" is outside all `PARTS`.

    Every token uses the `dense` ones, and the share `used` = K/E of the `routed` ones.
    """

    dense: Counter[str]
    routed: Counter[str]
    used: float

    def count(self, kind: str, left_out: Collection[str] = ()) -> int:
        """Count all parameters, or the active ones of one token, without some parts."""
        dense, routed = (
            sum(count for part, count in counts.items() if part not in left_out)
            for counts in (self.dense, self.routed)
        )
        return dense + (routed if kind == "all" else round(routed * self.used))


def facts() -> dict[str, dict[str, Any]]:
    read: dict[str, dict[str, Any]] = yaml.safe_load(FACTS.read_text(encoding="utf-8"))
    return read


def number(published: str) -> tuple[float, float]:
    """Return the value of a text such as 30.5B, and the value of a unit of its last digit."""
    digits, unit = published[:-1], _UNITS[published[-1]]
    decimals = len(digits.partition(".")[2])
    return float(digits) * unit, unit / 10**decimals


def counted(name: str) -> Sizes:
    with _built(name) as (args, model):
        found = Sizes(Counter(), Counter(), args.moe_router_topk / args.num_experts)
        for parameter_name, parameter in model.named_parameters():
            part = parameter_name.split(".")[0].removesuffix("_layer")
            part = part if part in PARTS else ""
            is_slice = ".mlp.experts." in parameter_name
            counts = found.routed if is_slice else found.dense
            counts[part] += parameter.numel() * (RANKS if is_slice else 1)
        sizes = (args.moe_ffn_hidden_size, args.hidden_size)
        assert found.routed and all(size % RANKS == 0 for size in sizes), (name, sizes)
    return found


@contextlib.contextmanager
def _built(name: str) -> Iterator[tuple[Any, Any]]:
    """Yield Megatron's arguments and the model of one rank, and remove all traces afterwards."""
    from megatron_laer.launch import prepare

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ["MEGATRON_LAER_DEVICE"] = "cpu"
    prepare()

    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training import arguments, global_vars
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_laer.cpu.training import fresh_megatron
    from megatron_laer.plugin.pretraining import build_gpt

    chunks: list[Any] = []
    flags = without(model_flags(name), facts().get(name, {}).get("built_without", ()))
    before, sys.argv = sys.argv, ["x", *flags, *CPU_FLAGS, *_RUN_FLAGS]
    try:
        with fresh_megatron(chunks):
            args = arguments.parse_args()
            arguments.validate_args(args)
            args.padded_vocab_size = args.vocab_size + -args.vocab_size % 128
            global_vars.set_args(args)
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
            parallel_state.initialize_model_parallel(
                expert_model_parallel_size=RANKS,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=False,
            )
            tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
            with FakeTensorMode(allow_non_fake_inputs=True):
                chunks.append(build_gpt())
            yield args, chunks[0]
            parallel_state.destroy_model_parallel()
    finally:
        sys.argv = before


def judgement(name: str) -> tuple[str, str]:
    """Return `check-recipe`'s verdict on a model with expert parallelism, and its proof."""
    from tests.published_commands import judged, proof_of

    found = judged(*model_flags(name), "--expert-model-parallel-size", str(RANKS))
    return str(found.verdict), proof_of(found)


def left_out(name: str, kind: str) -> list[str]:
    found: list[str] = facts().get(name, {}).get("left_out", {}).get(kind, [])
    return found


def row(name: str, sizes: Sizes, verdict: str, proof: str) -> str:
    published, as_they_count = "–", "–"
    if (fact := facts().get(name)) is not None:
        published = f"[{', '.join(fact['published'].values())}]({fact['by']})"
        as_they_count = ", ".join(
            " without ".join([_short(count), " and ".join(parts)] if parts else [_short(count)])
            for count, parts in (
                (sizes.count(kind, left_out(name, kind)), left_out(name, kind)) for kind in KINDS
            )
        )
    cells = [f"`{name}`", *(f"{sizes.count(kind):,}" for kind in KINDS), published, as_they_count]
    return f"| {' | '.join([*cells, f'*{verdict}*', proof])} |"


def _short(count: int) -> str:
    return f"{count / 1e9:.2f}B"


def cluster_table() -> list[str]:
    """Return a line for each cluster with one rank's rates."""
    lines = [
        "| cluster | nodes of ranks | GEMM of most tokens | in a node | between nodes |",
        f"|{'---|' * 5}",
    ]
    for name in CLUSTERS:
        cluster = load_cluster(name)
        tokens, flops_per_s = cluster.gemm.points[-1]
        cells = [
            f"`{name}`",
            f"{cluster.nodes} of {cluster.ranks_per_node}",
            f"{flops_per_s / 1e12:.4g} TFLOP/s at {tokens}",
            f"{cluster.intra.bytes_per_s / 1e9:.4g} GB/s",
            f"{cluster.inter.bytes_per_s / 1e9:.4g} GB/s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    # Megatron prints its arguments, and loggers their messages.
    with contextlib.redirect_stdout(sys.stderr):
        # First, since building models makes the plugin add its flags to Megatron's parser.
        verdicts = {name: judgement(name) for name in MODELS}
        sizes = {name: counted(name) for name in MODELS}
        lines = {name: row(name, sizes[name], *verdicts[name]) for name in MODELS}
    if sys.argv[1:] == ["--json"]:
        counts = {
            name: {
                kind: [found.count(kind), found.count(kind, left_out(name, kind))] for kind in KINDS
            }
            for name, found in sizes.items()
        }
        print(json.dumps({"counts": counts, "lines": lines}))
    else:
        print("\n".join([*HEAD, *lines.values(), "", *cluster_table()]))


if __name__ == "__main__":
    main()
