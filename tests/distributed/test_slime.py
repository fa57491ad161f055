"""slime's own copies of models, loader and weight iterator work on experts at home as they are.

Needs a checkout of slime in the folder SLIME_CHECKOUT, and the imports of these files: tqdm and
safetensors. slime's further dependencies, such as Ray and SGLang, are replaced here.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.cpu.ranks import RankPools
from tests.checkouts import checkout
from tests.distributed.test_announced import MICROBATCHES, announce_by_slimes_hooks
from tests.distributed.test_home_names import train_some
from tests.distributed.test_own_loop import code_of, script
from tests.parity.flags import command_line

__all__ = ["script"]

FSEP = " --expert-parallel-mode fsep --fsep-sharding experts --fsep-planner random"
EXPERTS, LAYERS = 4, 2

CHECKOUT, pytestmark = checkout("SLIME_CHECKOUT", "slime")


@contextlib.contextmanager
def slime() -> Iterator[Callable[[str], ModuleType]]:
    """Make slime's files importable one by one."""
    before = set(sys.modules)
    size_and_rank = {"current_device": lambda: "cpu", "synchronize": lambda: None}

    def package(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        module.__path__ = [str(CHECKOUT.joinpath(*name.split(".")))]
        vars(module).update(contents)
        sys.modules[name] = module

    def in_memory(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty_like(*args, **kwargs)

    try:
        package("slime")
        package("slime.utils")
        package("slime.utils.accelerator", **size_and_rank)
        package("slime.utils.http_utils", is_port_available=None)
        package("slime.backends")
        package("slime.backends.megatron_utils")
        package("slime.backends.megatron_utils.sglang", monkey_patch_torch_reductions=lambda: None)
        package("slime.backends.megatron_utils.update_weight")
        package("slime.backends.megatron_utils.hf_to_megatron")
        package("slime.backends.megatron_utils.megatron_to_hf", convert_to_hf=_converted)
        empty_like = torch.empty_like
        with mock.patch.object(torch, "empty_like", in_memory):
            yield importlib.import_module
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "slime":
                del sys.modules[name]


def _converted(args: Any, _kind: str, name: str, tensor: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Convert an expert as slime does, which does not know the names of Megatron's local layers."""
    if ".experts." not in name:
        return [(name, tensor)]
    qwen = importlib.import_module("slime.backends.megatron_utils.megatron_to_hf.qwen3moe")
    return qwen.convert_qwen3moe_to_hf(args, name, tensor)


def _exported(load: Callable[[str], ModuleType], args: Any, model: Any) -> dict[str, torch.Tensor]:
    common = load("slime.backends.megatron_utils.update_weight.common")
    direct = load("slime.backends.megatron_utils.update_weight.hf_weight_iterator_direct")
    load("slime.utils.distributed_utils").set_gloo_group(dist.group.WORLD)
    iterator = direct.HfWeightIteratorDirect(args, model, "qwen3moe", None)
    weights = dict(common.named_params_and_buffers(args, model))
    return {
        name: tensor.detach().clone()
        for chunk in iterator.get_hf_weight_chunks(weights)
        for name, tensor in chunk
    }


def values(model: list[torch.nn.Module]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]


def by_slime(flags: list[str], folder: Path) -> int:
    """Run slime's files on this rank's model, and return how many experts' tensors it sends."""
    from safetensors.torch import save_file

    def check(model: list[torch.nn.Module]) -> int:
        args = SimpleNamespace(
            num_experts=EXPERTS,
            update_weight_buffer_size=2**16,
            kv_channels=None,
            hidden_size=48,
            num_attention_heads=4,
            num_query_groups=4,
        )
        with slime() as load:
            common = load("slime.backends.megatron_utils.update_weight.common")
            backups = load("slime.utils.tensor_backper").TensorBackuper.create(
                lambda: common.named_params_and_buffers(args, model), single_tag=None
            )
            actor, sent = values(model), _exported(load, args, model)
            backups.backup("actor")
            with torch.no_grad():
                for chunk in model:
                    for parameter in chunk.parameters():
                        parameter.mul_(-2).add_(1)
            reference = values(model)
            backups.backup("ref")
            for tag, expected in ("actor", actor), ("ref", reference):
                backups.restore(tag)
                for found, kept in zip(values(model), expected, strict=True):
                    assert torch.equal(found, kept), tag

            # The model is the reference now, and the loader brings the actor's weights back.
            if dist.get_rank() == 0:
                save_file(
                    {name: tensor.contiguous() for name, tensor in sent.items()},
                    folder / "model.safetensors",
                )
            dist.barrier()
            loader = load("slime.backends.megatron_utils.hf_to_megatron.common")
            qwen = load("slime.backends.megatron_utils.hf_to_megatron.qwen")

            def tensor_of(name: str, reader: Any, config: Any) -> torch.Tensor:
                if ".experts." in name:
                    return qwen.qwen_moe_hf_tensor(name, reader, config)
                return reader.get_tensor(name)

            loader.load_model_hf_weights(args, model, folder, None, tensor_of)
            for found, kept in zip(values(model), actor, strict=True):
                assert torch.equal(found, kept)
            again = _exported(load, args, model)
            assert again.keys() == sent.keys()
            for name, tensor in sent.items():
                assert torch.equal(again[name], tensor), name
            return sum(".experts." in name for name in sent)

    found: int = train_some(flags, check, grouped=True).probes[0]
    return found


def test_slimes_own_files_read_and_write_every_expert(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    parts = 3  # gate, up and down
    flags = command_line(text_data, FSEP, experts=EXPERTS, steps=1)
    assert ranks(2).run(by_slime, flags, tmp_path) == [LAYERS * EXPERTS * parts] * 2


def by_slimes_replay(path: Path, hooks: Path) -> tuple[list[int], int]:
    with slime() as load:
        replay = load("slime.utils.routing_replay").RoutingReplay
        return announce_by_slimes_hooks(path, hooks, replay)


def test_slimes_own_replay_is_announced(ranks: RankPools, script: Path) -> None:
    hooks = script.with_name("announcing_hooks.py")
    hooks.write_text(code_of("rl.md", "before_train_step"))
    for announced, misses in ranks(2).run(by_slimes_replay, script, hooks):
        assert announced == [2 * MICROBATCHES, MICROBATCHES] * 2
        assert misses == 0
