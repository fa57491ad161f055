"""Bad input is refused on every rank before any training step, with what would work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPool
from megatron_laer.cpu.training import train
from tests.parity.flags import command_line

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
    "no such cluster": ("--fsep-cluster nope", "--fsep-cluster 'nope'", "cpu-gloo"),
    "plan lag 0": ("--fsep-plan-lag 0", "--fsep-plan-lag 0", "at least 1"),
    "huge plan lag": ("--fsep-plan-lag 1000000000", "--fsep-plan-lag 1000000000", "at most 1000"),
    "idle tolerance": (
        "--fsep-imbalance-tolerance 1.0",
        "--fsep-imbalance-tolerance 1.0",
        "less than 1",
    ),
    "negative experts": ("--num-experts -4", "--num-experts -4", "give --num-experts"),
    "too many experts": ("--num-experts 40000", "--num-experts 40000", "at most 32767"),
    "more than all ranks": (
        "--expert-model-parallel-size 1000000000 --fsep-node-size 3",
        "--expert-model-parallel-size 1000000000",
        "the number of ranks, 2",
    ),
    "no recording": (
        "--fsep-replay-layouts nowhere",
        "--fsep-replay-layouts 'nowhere': no such folder",
        "--fsep-record-layouts",
    ),
    "no folder for layouts": (
        "--fsep-record-layouts /dev/null",
        "--fsep-record-layouts '/dev/null'",
        "a folder that can be written",
    ),
    "no folder for routing": (
        "--fsep-record-trace /proc/x",
        "--fsep-record-trace '/proc/x'",
        "a folder that can be written",
    ),
    "no folder for a timeline": (
        "--fsep-timeline=",
        "--fsep-timeline ''",
        "a folder that can be written",
    ),
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
    "announced routing with a repeated layer": (
        "--fsep-plan-mode announced --mtp-num-layers 2 --mtp-use-repeated-layer",
        "--fsep-plan-mode announced with --mtp-use-repeated-layer",
        "leave out one of them",
    ),
    "tokens through nodes with the flex dispatcher": (
        "--fsep-token-exchange node --moe-token-dispatcher-type flex",
        "--fsep-token-exchange node with --moe-token-dispatcher-type flex",
        "leave one out",
    ),
    "tokens through nodes with the fused permutation": (
        "--fsep-token-exchange auto --moe-permute-fusion",
        "--fsep-token-exchange auto with --moe-permute-fusion",
        "leave one out",
    ),
    "flex dispatcher with NCCL EP": (
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
        "--moe-flex-dispatcher-backend ncclep",
        "deepep",
    ),
    "fp8": ("--fp8-format hybrid", "--fp8", "bf16"),
    "Megatron-FSDP": ("--use-megatron-fsdp", "--use-megatron-fsdp", "--use-distributed-optimizer"),
    "paged stash": (
        "--moe-paged-stash",
        "--moe-paged-stash",
        "--recompute-modules moe saves the same memory (it is speed-only)",
    ),
    "GLU interleave": (
        "--moe-mlp-glu-interleave-size 8",
        "--moe-mlp-glu-interleave-size 8",
        "leave it out (it is speed-only)",
    ),
    "fused operations": (
        "--use-transformer-engine-op-fuser",
        "--use-transformer-engine-op-fuser",
        "leave it out (it is speed-only)",
    ),
    "overlap of expert-parallel communication": (
        "--overlap-moe-expert-parallel-comm",
        "--overlap-moe-expert-parallel-comm",
        "leave it out (it is speed-only)",
    ),
    "rank capacity": (
        "--moe-expert-rank-capacity-factor 1.5",
        "--moe-expert-rank-capacity-factor 1.5",
        "balanced layouts bound what a rank receives (it is speed-only)",
    ),
    "activation offloading": (
        "--fine-grained-activation-offloading --offload-modules core_attn",
        "--fine-grained-activation-offloading",
        "--recompute-granularity",
    ),
    "one rank": (
        "--expert-model-parallel-size 1",
        "--expert-model-parallel-size 1",
        "2 or more",
    ),
    "cuda graphs": ("--cuda-graph-impl local", "--cuda-graph-impl local", "none"),
    "unproven fp8": ("--fp8-format e4m3", "nobody has run it", "--fsep-allow-unproven dense-fp8"),
    "unproven graphs": (
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn",
        "nobody has run it",
        "--fsep-allow-unproven te-graphs",
    ),
    "captured experts": (
        "--cuda-graph-impl transformer_engine --cuda-graph-modules moe_router moe_preprocess"
        " --fsep-allow-unproven te-graphs",
        "--cuda-graph-modules moe_router moe_preprocess",
        "attn moe_router",
    ),
    "idle word": ("--fsep-allow-unproven te-graphs", "te-graphs: no effect", "leave it out"),
    "SOAP": ("--optimizer soap", "--optimizer soap", "adam, sgd, lion or muon"),
    "delayed weight gradients": (
        "--delay-wgrad-compute",
        "--delay-wgrad-compute",
        "leave it out (it is speed-only)",
    ),
    "recompute that no row has": (
        "--recompute-granularity selective --recompute-modules moe mhc",
        "--recompute-modules moe mhc",
        "give some of core_attn, gdn_norm_out",
    ),
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
        assert result.type_name == "RefusedError", result.traceback
        assert quoted in result.message and offered in result.message, result.message


def test_fsep_without_experts_is_refused(ranks: Callable[[int], RankPool], text_data: str) -> None:
    flags = commands(text_data, FSEP)
    at = flags.index("--num-experts")
    del flags[at : at + 2]
    for result in ranks(2).run_raw(train, flags):
        assert result.type_name == "RefusedError"
        assert "--num-experts" in result.message


def test_an_fsep_flag_without_the_mode_is_refused(
    ranks: Callable[[int], RankPool], text_data: str
) -> None:
    for result in ranks(2).run_raw(train, commands(text_data, " --fsep-capacity 5")):
        assert result.type_name == "RefusedError"
        assert "--fsep-capacity 5" in result.message
        assert "--expert-parallel-mode fsep" in result.message


def train_told(variables: dict[str, str], flags: list[str]) -> object:
    """A run whose launcher says this of its ranks."""
    with mock.patch.dict(os.environ, variables):
        return train(flags)


@pytest.mark.parametrize(
    ("variables", "quoted"),
    [
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE='abc'"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
        ({"RANK": "two"}, "RANK='two'"),
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
    ],
)
def test_what_a_launcher_cannot_mean_is_refused_on_every_rank(
    ranks: Callable[[int], RankPool], text_data: str, variables: dict[str, str], quoted: str
) -> None:
    for result in ranks(2).run_raw(
        train_told, variables, commands(text_data, FSEP), timeout_s=60.0
    ):
        assert result.type_name == "RefusedError", result.traceback
        assert quoted in result.message and "torchrun" in result.message, result.message


def test_settings_in_megatrons_yaml_file_are_refused(
    ranks: Callable[[int], RankPool], text_data: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("num_experts: 8\nexpert_parallel_mode: fsep\nfsep_capacity: 5\n")
    flags = commands(text_data, f" --yaml-cfg {file}")
    for result in ranks(2).run_raw(train, flags, timeout_s=60.0):
        assert result.type_name == "RefusedError", result.traceback
        assert "expert_parallel_mode, fsep_capacity" in result.message, result.message
        assert "as flags" in result.message


def test_the_mode_alone_is_as_good_as_with_what_it_needs(
    ranks: Callable[[int], RankPool], text_data: str
) -> None:
    needed = "--moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1"
    alone, given = (
        ranks(2).run(
            train,
            command_line(
                text_data,
                experts=8,
                expert_parallel=2,
                global_batch=4,
                steps=3,
                extra=f"--expert-parallel-mode fsep --fsep-late-plan wait {extra}",
                without=needed,
            ),
        )[0]
        for extra in ("", needed)
    )
    assert len(alone.losses) == 3
    assert (alone.losses, alone.grad_norms) == (given.losses, given.grad_norms)


@pytest.mark.parametrize("flag", ["--fim-data", "--dataloader-inter-document-masking"])
def test_our_script_refuses_what_only_megatrons_script_does(
    ranks: Callable[[int], RankPool], text_data: str, flag: str
) -> None:
    for result in ranks(2).run_raw(train, commands(text_data, f" {flag}")):
        assert result.type_name == "RefusedError", result.traceback
        assert flag in result.message
        assert "megatron_laer train" in result.message


def test_ranks_still_train_after_a_refusal(
    ranks: Callable[[int], RankPool], text_data: str
) -> None:
    record = ranks(2).run(train, commands(text_data, FSEP))[0]
    assert len(record.losses) == 1
