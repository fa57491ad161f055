"""Experts at home are stock's parameters: names, marks and checkpoints need no code of ours.

Both for a sequence of experts and for grouped ones (`tests/grouped_experts.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.training import Adapt, train
from megatron_laer.cpu.weights import Tensors
from tests import processes
from tests.checkpoints import assert_equal
from tests.distributed.conftest import BIASED, Trainings, train_grouped
from tests.documents import ROOT
from tests.parity.bridge_lora import lora_on_experts
from tests.parity.compare import distance
from tests.parity.replay import train_row
from tests.parity.row import FP32_BOUND
from tests.parity.rows import DIST_OPT, FULL_RECOMPUTE
from tests.probes import running
from tests.stock_alone import RANKS, Case

RANDOM = " --expert-parallel-mode fsep --fsep-sharding experts --fsep-planner random"
WEIGHTS_ONLY = " --finetune --no-load-optim --no-load-rng --no-save-optim --no-save-rng"
KINDS = {"sequence": train_row, "grouped": train_grouped}


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


@pytest.mark.parametrize(
    ("kind", "adapt"),
    [("sequence", None), ("grouped", None), ("sequence", lora_on_experts)],
    ids=["sequence", "grouped", "with adapters"],
)
def test_names_marks_and_entries_of_checkpoints_are_stocks(
    trained: Trainings, kind: str, adapt: Adapt | None
) -> None:
    stock, homes = (
        trained.each(mode, names_and_marks, adapt, by=KINDS[kind], **BIASED)
        for mode in ("", RANDOM)
    )
    for rank in range(2):
        assert stock[rank].probes and homes[rank].probes == stock[rank].probes
    names = [name for name, *_ in homes[0].probes[0][0] if ".experts." in name]
    first = "linear_fc1.weight0" if kind == "grouped" else "local_experts.0.linear_fc1.weight"
    if adapt is None:
        assert names[0] == f"module.decoder.layers.0.mlp.experts.{first}"
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
def test_grouped_experts_train_as_stocks(trained: Trainings, flags: str, fsep: str) -> None:
    """Their kernels add to main gradients, to which the replicas' sums are added."""
    options = BIASED | {"by": train_grouped, "steps": 6}
    stock, homes = (
        trained(flags + mode, added_by_kernels, **options) for mode in ("", RANDOM + fsep)
    )
    assert homes.probes == stock.probes == [True] * 6
    assert distance(homes, stock).within(FP32_BOUND)


def parameters(model: list[Any]) -> Tensors:
    from megatron.core.utils import unwrap_model

    (chunk,) = unwrap_model(model)
    return {name: part.detach().clone() for name, part in chunk.named_parameters()}


def loaded(flags: list[str], kind: str) -> Tensors:
    """Return this rank's parameters as Megatron's setup loads them."""
    from megatron.training import training

    found: Tensors = {}
    setup = training.setup_model_and_optimizer

    def read_after_setup(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        found.update(parameters(result[0]))
        return result

    with mock.patch.object(training, "setup_model_and_optimizer", read_after_setup):
        KINDS[kind](flags)
    return found


def held_after_a_step(flags: list[str]) -> bool:
    """Return True if replicas that are held over a step are gone at its end."""

    def end(_: list[torch.nn.Module]) -> bool:
        layers = running().layers
        assert any(layer._held.weights.are_here for layer in layers)
        for layer in layers:
            layer.end_step()
        return not any(layer._held.weights.are_here for layer in layers)

    found: bool = train(flags, end).probes[0]
    return found


def test_replicas_that_a_step_holds_are_not_used_after_it(trained: Trainings) -> None:
    flags = f"{RANDOM} --fsep-restore step"
    assert trained.each(flags, by=held_after_a_step, **BIASED) == [True, True]


def test_stock_without_our_code_reads_what_homes_wrote_and_the_other_way_round(
    trained: Trainings, tmp_path: Path
) -> None:
    cases, written = {}, {}
    for kind, form in (
        ("sequence", "torch_dist"),
        ("sequence", "torch"),
        ("grouped", "torch_dist"),
    ):
        folder = tmp_path / f"{form}-{kind}"
        folder.mkdir()
        flags = f" --ckpt-format {form}" + WEIGHTS_ONLY
        homes = folder / "homes"
        saves = f"{flags}{RANDOM} --save {homes} --save-interval 1"
        records = trained.each(saves, parameters, by=KINDS[kind], size=RANKS, **BIASED)
        written[kind, form] = [record.probes[0] for record in records]
        cases[kind, form] = Case(
            flags=[*trained.flags(flags, **BIASED), "--use-cpu-initialization"],
            grouped=kind == "grouped",
            load=str(homes),
            results=str(folder),
        )
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([*cases.values()]))
    # Not by `-m`, which would import `tests`, and with it our package.
    processes.python(ROOT / "tests" / "stock_alone.py", path)
    for (kind, form), case in cases.items():
        loads = f" --ckpt-format {form} --load {case['results']}/saved" + WEIGHTS_ONLY + RANDOM
        found = trained.each(loads, kind, by=loaded, size=RANKS, **BIASED)
        for rank in range(RANKS):
            read, saved = (
                torch.load(Path(case["results"]) / f"{name}-{rank}.pt")
                for name in ("read", "saved")
            )
            assert_equal(read, written[kind, form][rank])
            assert_equal(found[rank], saved)
            table = "embedding.word_embeddings.weight"
            assert not torch.equal(saved[table], read[table])
