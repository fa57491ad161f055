"""Experts at home are stock's parameters: names, marks and checkpoints need no code of ours.

Both for a sequence of experts and for grouped ones (`tests/grouped_experts.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Adapt, Probe, Record, train
from megatron_laer.cpu.weights import Tensors
from tests.checkpoints import assert_equal
from tests.parity.compare import distance
from tests.parity.flags import command_line
from tests.parity.row import FP32_BOUND
from tests.parity.rows import DIST_OPT, FULL_RECOMPUTE
from tests.probes import running
from tests.stock_alone import RANKS, Case

RANDOM = " --expert-parallel-mode fsep --fsep-sharding experts --fsep-planner random"
BIAS = "--disable-bias-linear"
WEIGHTS_ONLY = " --finetune --no-load-optim --no-load-rng --no-save-optim --no-save-rng"


def command(data: str, extra: str, steps: int = 1) -> list[str]:
    """Return flags of a model whose experts have biases."""
    return command_line(data, extra, global_batch=8, steps=steps, without=BIAS)


def train_some(
    flags: list[str],
    probe: Probe | None = None,
    grouped: bool = False,
    adapt: Adapt | None = None,
) -> Record:
    from tests.grouped_experts import grouped as grouped_experts

    with grouped_experts() if grouped else contextlib.nullcontext():
        return train(flags, probe, adapt=adapt)


def names_and_marks(model: list[Any]) -> list[Any]:
    """Describe each parameter of a wrapped model, in its order, and the entries of checkpoints."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.utils import unwrap_model

    marks = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride")
    (wrapped,) = model
    chunk = unwrap_model(wrapped)
    parameters = [
        (
            name,
            tuple(part.shape),
            part.dtype,
            part.requires_grad,
            [getattr(part, mark, None) for mark in marks],
        )
        for name, part in wrapped.named_parameters()
    ]
    saved = {
        name: (entry.key, entry.global_shape, entry.global_offset, entry.replica_id)
        if isinstance(entry, ShardedTensor)
        else (entry.key, entry.replica_id)
        for name, entry in chunk.sharded_state_dict().items()
    }
    return [parameters, list(chunk.state_dict_for_save_checkpoint()), list(saved), saved]


@pytest.mark.parametrize("grouped", [False, True], ids=["sequence", "grouped"])
def test_names_marks_and_entries_of_checkpoints_are_stocks(
    ranks: RankPools, text_data: str, grouped: bool
) -> None:
    stock, homes = (
        ranks(2).run(train_some, command(text_data, mode), names_and_marks, grouped)
        for mode in ("", RANDOM)
    )
    for rank in range(2):
        assert stock[rank].probes and homes[rank].probes == stock[rank].probes
    names = [name for name, *_ in homes[0].probes[0][0] if ".experts." in name]
    kind = "linear_fc1.weight0" if grouped else "local_experts.0.linear_fc1.weight"
    assert names[0] == f"module.decoder.layers.0.mlp.experts.{kind}"
    assert len(names) == 2 * 4 * 4, "layers, experts, parameters of each"


def added_by_kernels(model: list[Any]) -> bool:
    return all(
        part.grad_added_to_main_grad
        for name, part in model[0].named_parameters()
        if ".experts." in name and ".weight" in name
    )


@pytest.mark.parametrize(
    ("flags", "fsep"),
    [(DIST_OPT, ""), (FULL_RECOMPUTE, " --fsep-restore step")],
    ids=["overlaps", "recompute, held over a step"],
)
def test_grouped_experts_train_as_stocks(
    ranks: RankPools, text_data: str, flags: str, fsep: str
) -> None:
    """Their kernels add to main gradients, to which the replicas' sums are added."""
    stock, homes = (
        ranks(2).run(
            train_some,
            command(text_data, flags + mode, steps=6),
            added_by_kernels,
            True,
        )[0]
        for mode in ("", RANDOM + fsep)
    )
    assert homes.probes == stock.probes == [True] * 6
    assert distance(homes, stock).within(FP32_BOUND)


def parameters(model: list[Any]) -> Tensors:
    from megatron.core.utils import unwrap_model

    (chunk,) = unwrap_model(model)
    return {name: part.detach().clone() for name, part in chunk.named_parameters()}


def loaded(flags: list[str], grouped: bool) -> Tensors:
    """Return this rank's parameters as Megatron's setup loads them."""
    from megatron.training import training

    found: Tensors = {}
    setup = training.setup_model_and_optimizer

    def read_after_setup(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        found.update(parameters(result[0]))
        return result

    with mock.patch.object(training, "setup_model_and_optimizer", read_after_setup):
        train_some(flags, grouped=grouped)
    return found


def held_after_a_step(flags: list[str]) -> bool:
    """Return True if replicas that are held over a step are gone at its end."""
    from megatron_laer.runtime.weights.states import WeightState

    def end(_: list[torch.nn.Module]) -> bool:
        experts_of_run = running().experts
        held = [*experts_of_run._of_step.values()]
        assert any(experts.state.weights is WeightState.RESTORED for experts in held)
        experts_of_run.end_step()
        return all(experts.state.weights is WeightState.SHARDED for experts in held)

    found: bool = train(flags, end).probes[0]
    return found


def test_replicas_that_a_step_holds_are_not_used_after_it(ranks: RankPools, text_data: str) -> None:
    flags = command(text_data, f"{RANDOM} --fsep-restore step")
    assert ranks(2).run(held_after_a_step, flags) == [True, True]


def run_stock(cases: list[Case], folder: Path) -> None:
    """Run Megatron in processes that never import our package."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        # Not by `-m`, which would import `tests`, and with it our package.
        [sys.executable, "-W", "ignore", str(root / "tests" / "stock_alone.py"), str(path)],
        cwd=root,
        env={name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_")},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_stock_without_our_code_reads_what_homes_wrote_and_the_other_way_round(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    cases, written = {}, {}
    for grouped, form in ((False, "torch_dist"), (False, "torch"), (True, "torch_dist")):
        folder = tmp_path / f"{form}-{grouped}"
        folder.mkdir()
        flags = command(text_data, f" --ckpt-format {form}" + WEIGHTS_ONLY)
        homes = folder / "homes"
        saves = [*flags, *RANDOM.split(), *f"--save {homes} --save-interval 1".split()]
        records = ranks(RANKS).run(train_some, saves, parameters, grouped)
        written[grouped, form] = [record.probes[0] for record in records]
        cases[grouped, form] = Case(
            flags=[*flags, "--use-cpu-initialization"],
            grouped=grouped,
            load=str(homes),
            results=str(folder),
        )
    run_stock([*cases.values()], tmp_path)
    for (grouped, form), case in cases.items():
        loads = f"--load {case['results']}/saved"
        flags = command(text_data, f" --ckpt-format {form} {loads}" + WEIGHTS_ONLY)
        found = ranks(RANKS).run(loaded, [*flags, *RANDOM.split()], grouped)
        for rank in range(RANKS):
            read, saved = (
                torch.load(Path(case["results"]) / f"{name}-{rank}.pt")
                for name in ("read", "saved")
            )
            assert_equal(read, written[grouped, form][rank])
            assert_equal(found[rank], saved)
            table = "embedding.word_embeddings.weight"
            assert not torch.equal(saved[table], read[table])
