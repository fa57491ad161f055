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
from tests.checkpoints import assert_equal, iteration_folder, saved_tensors
from tests.parity.compare import identical
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


def test_a_rerun_has_the_same_bits(ranks: RankPools, text_data: str) -> None:
    """Gathers ahead, reduces and exchanges of replicas run at once, in one order."""
    flags = f"{SHARDED}optim_grads_params --overlap-grad-reduce --overlap-param-gather{FSEP}"
    flags += " --micro-batch-size 1"
    given = command(text_data, flags, 2, 2, steps=3)
    first, again = (ranks(2).run(train, given, replicas)[0] for _ in range(2))
    assert max(first.probes) > 0, "no replica was made, so nothing is shown"
    assert identical(again, first)


def replicas(_model: object) -> int:
    coordinator = current_coordinator()
    assert coordinator is not None
    return coordinator.streams.weights.num_bytes


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


SAVED_AT, STEPS = 2, 4
# As Megatron's checkpoint says it; random states are of another form.
RESUMED = " --no-load-rng --dist-ckpt-optim-fully-reshardable"


def write(model: list[Any], optimizer: Any, scheduler: Any, folder: str) -> None:
    from megatron.training import get_args

    os.makedirs(folder, exist_ok=True)
    torch.distributed.barrier()
    args = get_args()
    more = {"args": args, "iteration": SAVED_AT, "num_floating_point_operations_so_far": 0}
    save_whole(model, folder, optimizer, **more, opt_param_scheduler=scheduler.state_dict())
    if int(os.environ["RANK"]) == 0:
        tracker = Path(folder).parent / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(SAVED_AT))


def all_carried(flags: list[str], source: str | None, folder: str) -> list[float]:
    """Train with Megatron-FSDP, from a folder in torch_dist if given; return the losses.

    All that a resumed run needs is saved in torch_dist: as it was loaded, or after two steps.
    """
    from unittest import mock

    from megatron.training import get_args, training

    setup, made = training.setup_model_and_optimizer, list[Any]()

    def setting_up(*args: Any, **kwargs: Any) -> Any:
        made[:] = result = setup(*args, **kwargs)
        if source is not None:
            more = load_whole(result[0], source, result[1])
            get_args().load = source  # so that `train` keeps the loaded weights
            get_args().iteration = more["iteration"]
            get_args().consumed_train_samples = SAVED_AT * get_args().global_batch_size
            result[2].load_state_dict(more["opt_param_scheduler"])
            write(*made, folder)
        return result

    def after_steps(_: object) -> None:
        if source is None and get_args().curr_iteration + 1 == SAVED_AT:
            get_args().consumed_train_samples = SAVED_AT * get_args().global_batch_size
            write(*made, folder)

    with mock.patch.object(training, "setup_model_and_optimizer", setting_up):
        return train(flags, after_steps, gradients=False).losses


def saved_steps(folder: Path) -> set[int]:
    """Return the optimizers' numbers of steps."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    of_kinds = load_common_state_dict(str(folder))["optimizer"].values()
    groups = [group for of in of_kinds for group in of["optimizer"]["param_groups"]]
    assert {group["is_expert_parallel"] for group in groups} == {False, True}
    return {int(group["step"]) for group in groups}


def test_optimizer_state_goes_to_runs_without_megatron_fsdp_and_back(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    """Weights, main weights and moments keep every bit, in stock and in FSEP."""
    folder = iteration_folder(tmp_path / "whole", SAVED_AT)
    sharded = command(text_data, SHARDED + "optim_grads_params" + FSEP, 4, 2, STEPS)
    losses = ranks(4).run(all_carried, sharded, None, str(folder))[0]
    first = saved_tensors(folder)
    states = [name for name in first if name.startswith("optimizer.state.")]
    assert {name.split(".")[2] for name in states} == {"param", "exp_avg", "exp_avg_sq"}
    assert len(states) == 3 * (len(first) - len(states)) and all(first[of].any() for of in states)

    path = tmp_path / "whole"
    for number, flags in enumerate((FSEP, "")):
        again = tmp_path / f"again-{number}"
        given = f" --bf16{DIST_OPT}{flags}{RESUMED} --load {path}"
        saves = f" --save {again} --save-interval 1000"
        # It trains no step, and saves at its end.
        ranks(2).run(train, command(text_data, given + saves, 4, 2, SAVED_AT))
        assert_equal(saved_tensors(iteration_folder(again, SAVED_AT)), first)
        assert saved_steps(iteration_folder(again, SAVED_AT)) == {SAVED_AT}
        path = again
    given = f" --bf16{DIST_OPT}{RESUMED} --load {tmp_path / 'whole'}"
    resumed: Record = ranks(2).run(train, command(text_data, given, 4, 2, STEPS))[0]
    assert resumed.losses == pytest.approx(losses[SAVED_AT:], abs=2e-3)

    for strategy, size in (("optim_grads", 4), ("optim_grads_params", 2)):
        back = tmp_path / strategy
        flags = command(text_data, f"{SHARDED}{strategy}{FSEP}", 4, 2, STEPS)
        source, target = iteration_folder(path, SAVED_AT), iteration_folder(back, SAVED_AT)
        os.makedirs(back)
        goes_on = ranks(size).run(all_carried, flags, str(source), str(target))[0]
        assert_equal(saved_tensors(target), first)
        assert saved_steps(target) == {SAVED_AT}
        assert goes_on == pytest.approx(losses[SAVED_AT:], abs=2e-3)


def refusal(flags: list[str], folder: str) -> str:
    """Return the message for optimizer state that another run cannot read."""
    with pytest.raises(ValueError, match="optimizer state") as error:
        all_carried(flags, folder, folder)
    return str(error.value)


def test_optimizer_state_of_a_runs_own_form_is_refused(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    saves = f" --bf16{DIST_OPT} --save {tmp_path} --save-interval 1"
    ranks(2).run(train, command(text_data, saves, 2, 2, steps=1))
    flags = command(text_data, SHARDED + "optim" + FSEP, 2, 2, steps=1)
    for text in ranks(2).run(refusal, flags, str(iteration_folder(tmp_path, 1))):
        assert "of the form dp_reshardable" in text
        assert "save it with --use-distributed-optimizer --dist-ckpt-optim-fully-resh" in text
