"""A rank of a job: forked from a process that has imported Megatron, alone in its session."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_laer.cpu.ranks import lead_session


def run(
    rank: int,
    flags: list[str],
    folder: str,
    log: str,
    environment: dict[str, str],
    last_step: int | None,
) -> None:
    """Train with these flags; write each step's loss, gradient norm and digest.

    After `last_step`, counted from 1, it waits for a signal. None trains on.
    """
    lead_session(log)
    # As in a rank that a launcher starts; children of a fork server would ask it for theirs.
    multiprocessing.set_start_method(None, force=True)
    from megatron_laer.cpu.rank_imports import ENVIRONMENT, SET_BY_PREPARE

    os.environ.update(SET_BY_PREPARE | ENVIRONMENT | environment)
    from megatron.training import training

    from megatron_laer.cpu.training import train
    from tests.faults.injected import current_step

    step, found = training.train_step, {}

    def observed(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        found["loss"] = float(result[0]["lm loss"]).hex()
        found["norm"] = float(result[5]).hex()
        return result

    def tell(model: list[torch.nn.Module]) -> None:
        line = json.dumps({"step": current_step(), **found, "digest": _digest(model)}) + "\n"
        with Path(folder, f"rank-{rank}.jsonl").open("a") as file:
            file.write(line)
        while current_step() + 1 == last_step and not _is_told_to_end():
            time.sleep(0.02)

    with mock.patch.object(training, "train_step", observed):
        train(flags, tell)


def _digest(model: list[torch.nn.Module]) -> str:
    """Return a digest of this rank's weights, and of the gradients that its optimizer reads.

    Each rank of a distributed optimizer reads a part of a bucket. The rest is as the reduce left
    it, which differs in the first step of a start.
    """
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    found = hashlib.blake2b(digest_size=16)
    for chunk in model:
        gradients = {parameter: parameter.main_grad for parameter in chunk.parameters()}
        tensors = [parameter.detach() for parameter in gradients]
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if group.ddp_config.use_distributed_optimizer:
                size = group.intra_distributed_optimizer_instance_size
                place = group.intra_distributed_optimizer_instance_rank
                for bucket in group.buckets:
                    tensors.append(shard_buffer(bucket.grad_data, size)[place])
                    gradients = {
                        of: grad for of, grad in gradients.items() if of not in bucket.params
                    }
        for tensor in (*tensors, *gradients.values()):
            found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def _is_told_to_end() -> bool:
    from megatron.training import get_args
    from megatron.training.global_vars import get_signal_handler

    handles = get_args().exit_signal_handler
    return handles and get_signal_handler()._signal_received  # type: ignore[no-any-return]
