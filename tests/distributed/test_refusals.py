"""Bad input is refused on every rank before any training step, with what would work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.flags import command_line
from tests.parity.training import train
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

FSEP = " --expert-parallel-mode fsep"

# Flags, then what the message must quote and offer.
CASES = {
    "too few slots": ("--fsep-capacity 3", "--fsep-capacity 3", "use 4 to 8"),
    "more slots than experts": ("--fsep-capacity 9", "--fsep-capacity 9", "use 4 to 8"),
    "no slot": ("--fsep-capacity 0", "--fsep-capacity 0", "at least 1"),
    "unknown planner": (
        "--fsep-planner magic",
        "--fsep-planner magic",
        "greedy, laer, random, search, static",
    ),
    "unknown cluster": ("--fsep-planner laer --fsep-cluster moon", "moon", "cpu-gloo"),
    "plan lag 0": ("--fsep-plan-lag 0", "--fsep-plan-lag 0", "at least 1"),
    "node size": ("--fsep-node-size 3", "--fsep-node-size 3", "one of [1, 2]"),
    "expert tensor parallel": (
        "--expert-tensor-parallel-size 2",
        "--expert-tensor-parallel-size 2",
        "--expert-tensor-parallel-size 1",
    ),
    "capacity factor": (
        "--moe-expert-capacity-factor 1.5",
        "--moe-expert-capacity-factor 1.5",
        "leave it out",
    ),
    "allgather dispatcher": (
        "--moe-token-dispatcher-type allgather",
        "--moe-token-dispatcher-type allgather",
        "--moe-token-dispatcher-type alltoall",
    ),
    "flex dispatcher": (
        "--moe-token-dispatcher-type flex",
        "--moe-token-dispatcher-type flex",
        "--moe-token-dispatcher-type alltoall",
    ),
    "fp8": ("--fp8-format hybrid", "--fp8", "bf16"),
    "Megatron-FSDP": ("--use-megatron-fsdp", "--use-megatron-fsdp", "--use-distributed-optimizer"),
    "paged stash": ("--moe-paged-stash", "--moe-paged-stash", "--recompute-modules moe"),
    "GLU interleave": (
        "--moe-mlp-glu-interleave-size 8",
        "--moe-mlp-glu-interleave-size 8",
        "leave it out",
    ),
    "activation offloading": (
        "--fine-grained-activation-offloading --offload-modules core_attn",
        "--fine-grained-activation-offloading",
        "--recompute-granularity",
    ),
    "repeated MTP layer": (
        "--mtp-num-layers 2 --mtp-use-repeated-layer",
        "--mtp-use-repeated-layer",
        "leave it out",
    ),
    "one rank": (
        "--expert-model-parallel-size 1",
        "--expert-model-parallel-size 1",
        "2 or more",
    ),
    "cuda graphs": ("--cuda-graph-impl local", "--cuda-graph-impl local", "none"),
    "Muon": ("--optimizer muon", "--optimizer muon", "adam"),
    "delayed weight gradients": ("--delay-wgrad-compute", "--delay-wgrad-compute", "leave it out"),
    "yaml": ("--yaml-cfg x.yaml", "--yaml-cfg", "no effect"),
    "deprecated cuda graphs": ("--enable-cuda-graph", "--enable-cuda-graph", "none"),
    "keep under determinism": (
        "--deterministic-mode --fsep-late-plan keep",
        "--fsep-late-plan keep",
        "leave one out",
    ),
    "idle lag": ("--fsep-planner static --fsep-plan-lag 2", "--fsep-plan-lag 2", "no effect"),
    "idle planner": ("--fsep-replay-layouts x --fsep-planner laer", "laer", "no effect"),
}


def commands(data: str, extra: str) -> list[str]:
    """A run that would work but for `extra`."""
    return command_line(data, experts=8, expert_parallel=2, global_batch=4, steps=1, extra=extra)


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_on_every_rank(
    ranks: Callable[[int], RankPool], text_data: str, case: str
) -> None:
    flags, quoted, offered = CASES[case]
    results = ranks(2).run_raw(train, commands(text_data, f"{FSEP} {flags}"))
    for result in results:
        assert result.type_name == "ValueError", result.traceback
        assert quoted in result.message and offered in result.message, result.message


def test_fsep_without_experts_is_refused(ranks: Callable[[int], RankPool], text_data: str) -> None:
    flags = commands(text_data, FSEP)
    at = flags.index("--num-experts")
    del flags[at : at + 2]
    for result in ranks(2).run_raw(train, flags):
        assert result.type_name == "ValueError"
        assert "--num-experts" in result.message


def test_an_fsep_flag_without_the_mode_is_refused(
    ranks: Callable[[int], RankPool], text_data: str
) -> None:
    for result in ranks(2).run_raw(train, commands(text_data, " --fsep-capacity 5")):
        assert result.type_name == "ValueError"
        assert "--fsep-capacity 5" in result.message
        assert "--expert-parallel-mode fsep" in result.message


@pytest.mark.parametrize("flag", ["--fim-data", "--dataloader-inter-document-masking"])
def test_our_script_refuses_what_only_megatrons_script_does(
    ranks: Callable[[int], RankPool], text_data: str, flag: str
) -> None:
    for result in ranks(2).run_raw(train, commands(text_data, f" {flag}")):
        assert result.type_name == "ValueError", result.traceback
        assert flag in result.message
        assert "megatron_laer train" in result.message


def test_ranks_still_train_after_a_refusal(
    ranks: Callable[[int], RankPool], text_data: str
) -> None:
    record = ranks(2).run(train, commands(text_data, FSEP))[0]
    assert len(record.losses) == 1
