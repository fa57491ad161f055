"""Checkpoints of models whose dense layers Megatron-FSDP shards: its own format, and torch_dist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, initial_weights, train
from megatron_laer.cpu.weights import Tensors
from megatron_laer.integrations.sharded_weights import load_whole, save_whole
from megatron_laer.runtime.planning.planner_checkpoint import FOLDER
from megatron_laer.session import current_coordinator
from tests.checkpoints import assert_equal, iteration_folder
from tests.parity.flags import command_line
from tests.parity.row import HOMES
from tests.parity.rows import DIST_OPT, FSDP

FSEP = " --expert-parallel-mode fsep --fsep-late-plan wait" + HOMES
# Megatron saves this format from models in 16 bits alone.
SHARDED = f" --bf16{FSDP}"
WEIGHTS_ONLY = " --no-load-optim --no-load-rng --finetune"


def command(data: str, flags: str, ranks: int, group: int, steps: int = 4) -> list[str]:
    # Each run says for how many steps the learning rate is.
    flags += " --override-opt_param-scheduler"
    return command_line(data, flags, steps=steps, expert_parallel=group, global_batch=2 * ranks)


def resumed_planner(_model: object) -> int | None:
    """Return the version of the layouts that the planner went on from."""
    coordinator = current_coordinator()
    resumption = None if coordinator is None else coordinator.layouts.resumption
    return None if resumption is None or resumption.state is None else resumption.state.version


def test_stock_and_fsep_go_on_from_each_others_shards(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    whole: Record = ranks(2).run(train, command(text_data, SHARDED + "optim_grads" + FSEP, 2, 2))[0]
    saves = f" --save {tmp_path} --save-interval 2"
    first: Record = ranks(2).run(
        train, command(text_data, SHARDED + "optim_grads" + FSEP + saves, 2, 2, steps=2)
    )[0]
    assert first.losses == whole.losses[:2]
    assert [path.name for path in (iteration_folder(tmp_path, 2) / FOLDER).iterdir()]

    loads = f" --load {tmp_path}"
    resumed: Record = ranks(2).run(
        train, command(text_data, SHARDED + "optim_grads" + FSEP + loads, 2, 2), resumed_planner
    )[0]
    assert resumed.losses == whole.losses[2:] and None not in resumed.probes
    assert_equal(resumed.weights, whole.weights)
    stock: Record = ranks(2).run(
        train, command(text_data, SHARDED + "optim_grads_params" + loads, 2, 2), resumed_planner
    )[0]
    assert stock.probes == [None, None]
    for mine, theirs in zip(stock.losses, whole.losses[2:], strict=True):
        assert abs(mine - theirs) < 1e-3
    for flags, size, group in (("optim_grads_params", 2, 2), ("optim" + FSEP, 4, 2)):
        read = ranks(size).run(
            initial_weights, command(text_data, SHARDED + flags + loads, size, group)
        )[0]
        assert_equal(read, first.weights)


def carried_out(flags: list[str], folder: str) -> Tensors:
    """Train, save the weights in torch_dist after the last step, and return them."""

    def save(model: list[Any]) -> None:
        from megatron.training import get_args

        if get_args().curr_iteration + 1 == get_args().train_iters:
            os.makedirs(folder, exist_ok=True)
            torch.distributed.barrier()
            save_whole(model, folder)
            if int(os.environ["RANK"]) == 0:
                tracker = Path(folder).parent / "latest_checkpointed_iteration.txt"
                tracker.write_text("2")

    return train(flags, save).weights


def carried_in(flags: list[str], folder: str) -> Tensors:
    """Set a model up, load the weights of a folder in torch_dist, and return them."""
    from megatron.training import training

    setup = training.setup_model_and_optimizer

    def loading(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        load_whole(result[0], folder)
        return result

    with mock.patch.object(training, "setup_model_and_optimizer", loading):
        return initial_weights(flags)


def content_of(folder: str) -> object:
    from megatron.core.dist_checkpointing import load_content_metadata

    return load_content_metadata(folder)


def refused_without_description(flags: list[str], folder: str) -> None:
    """Load into a model with a weight that its sharded_state_dict lacks."""
    from megatron.core.models.gpt import GPTModel

    described, name = GPTModel.sharded_state_dict, "decoder.final_layernorm.weight"

    def without(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = described(self, *args, **kwargs)
        del state[name]
        return state

    with (
        mock.patch.object(GPTModel, "sharded_state_dict", without),
        pytest.raises(ValueError, match=f"sharded_state_dict has no {name}, so"),
    ):
        carried_in(flags, folder)


def in_bf16(weights: Tensors) -> Tensors:
    return {key: part.to(torch.bfloat16).float() for key, part in weights.items()}


def test_weights_go_to_runs_without_megatron_fsdp_and_back(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    folder = iteration_folder(tmp_path / "whole", 2)
    sharded = SHARDED + "optim_grads_params" + FSEP
    saved = ranks(4).run(carried_out, command(text_data, sharded, 4, 2, steps=2), str(folder))[0]
    assert ranks(4).run(content_of, str(folder))[0] == {"singleton_local_shards": False}
    unsharded, path = f" --bf16{DIST_OPT}", tmp_path / "whole"
    for flags in (unsharded + FSEP, unsharded):
        loads = f" --load {path}{WEIGHTS_ONLY}"
        again = tmp_path / f"again-{len(flags)}"
        stays = f" --lr 0 --min-lr 0 --save {again} --save-interval 1"
        read = ranks(2).run(
            initial_weights, command(text_data, flags + loads + stays, 2, 2, steps=1)
        )[0]
        assert_equal(in_bf16(read), in_bf16(saved))
        path = again
    loading = command(text_data, sharded, 2, 2, steps=1), str(iteration_folder(path, 1))
    back = ranks(2).run(carried_in, *loading)[0]
    assert_equal(in_bf16(back), in_bf16(saved))
    ranks(2).run(refused_without_description, *loading)
