"""`train` runs Megatron's own pretraining loop, unchanged, on this rank and observes it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.cpu import weights
from megatron_laer.cpu.install import MEGATRON_FSDP
from megatron_laer.cpu.weights import Tensors
from megatron_laer.environment import CONNECTIONS


@dataclass
class Record:
    """Results of a run; tensors are on rank 0 only, the rest is the same on every rank.

    There are no gradients without a training step, or with several distributed optimizer instances.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    # Megatron's log of the MoE layers' losses: means, and by layer.
    moe_losses: dict[str, list[float]] = field(default_factory=dict)
    first_grads: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    # Results of the probe after each step, on rank 0.
    probes: list[Any] = field(default_factory=list)


_docstrings: dict[type, Any] = {}

Probe = Callable[[list[torch.nn.Module]], Any]
Adapt = Callable[[torch.nn.Module], None]


def train(
    flags: list[str],
    probe: Probe | None = None,
    script: str | None = None,
    adapt: Adapt | None = None,
    gradients: bool = True,
) -> Record:
    """Run `pretrain_gpt.py` with these flags from the common weights, or `--load`. Collective.

    Args:
        probe: called after every step with the model chunks; its results are recorded.
        script: run this Megatron script by `megatron_laer train` instead of our own.
        adapt: changes every model chunk before Megatron wraps it.
        gradients: whether to record the first step's, where reduces leave them whole.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.training import training
    from megatron.training.argument_utils import ArgumentGroupFactory

    import pretrain_gpt
    from megatron_laer.tools import cli

    record = Record()
    model: list[torch.nn.Module] = []
    setup, step = training.setup_model_and_optimizer, training.train_step
    evaluate = training.evaluate
    build, report = GPTModel.__init__, MoEMetricsTracker.report
    docstrings = ArgumentGroupFactory._get_field_docstrings

    def observed_chunk(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if adapt is not None:
            adapt(self)

    def observed_setup(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        model[:] = result[0]
        if training.get_args().load is None:
            weights.load_common_weights(model)
            torch.manual_seed(dist.get_rank())  # for the noise of routers
            # None in a run that only evaluates; Megatron-FSDP's main weights are the ones loaded.
            if result[1] is not None and not training.get_args().use_megatron_fsdp:
                result[1].reload_model_params()
        # Make Megatron reduce and save whole gradients in the first step. It reduces only parts
        # between instances of the distributed optimizer, and early in a pipeline.
        of_run = training.get_args()
        in_parts = of_run.overlap_grad_reduce and of_run.pipeline_model_parallel_size > 1
        if gradients and not in_parts and of_run.num_distributed_optimizer_instances == 1:
            of_run.save_wgrads_interval = 1
        return result

    def observed_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        losses = {key: float(value) for key, value in result[0].items()}
        record.losses.append(losses.get("lm loss", float("nan")))
        record.grad_norms.append(float(result[5]))
        training.get_args().save_wgrads_interval = None
        if probe is not None:
            record.probes.append(probe(model))
        return result

    def observed_gradients(*args: Any, **kwargs: Any) -> None:
        record.first_grads = weights.assemble(gather(weights.read(model, "main_grad")))

    def observed_report(*args: Any, **kwargs: Any) -> str:
        observer = _Writer(record.moe_losses)
        line: str = report(*args, **{**kwargs, "writer": observer, "per_layer_logging": True})
        return line

    def remembered_docstrings(self: Any, config_class: type) -> Any:
        # Each run parses Megatron's sources for the help of its flags, a fifth of a short run.
        if config_class not in _docstrings:
            _docstrings[config_class] = docstrings(self, config_class)
        return _docstrings[config_class]

    def observed_evaluation(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        if result[0]:
            record.eval_losses.append(float(result[0]["lm loss"]))
        return result

    with (
        mock.patch.object(GPTModel, "__init__", observed_chunk),
        mock.patch.object(training, "setup_model_and_optimizer", observed_setup),
        mock.patch.object(training, "train_step", observed_step),
        mock.patch.object(training, "save_grads", observed_gradients),
        mock.patch.object(training, "evaluate", observed_evaluation),
        mock.patch.object(MoEMetricsTracker, "report", observed_report),
        mock.patch.object(ArgumentGroupFactory, "_get_field_docstrings", remembered_docstrings),
        mock.patch.object(sys, "argv", ["pretrain_gpt.py", *flags]),
        fresh_megatron(model),
    ):
        if MEGATRON_FSDP in flags:
            del os.environ[CONNECTIONS]  # as `install` does, which ranks of a pool have run before
        if script is None:
            pretrain_gpt.main()
        else:
            assert cli.main(["train", script, "--", *flags]) == 0
        record.weights = weights.assemble(gather(weights.read(model, "weight")))
        # Only the last pipeline stage has the loss.
        record.losses, record.eval_losses = gather((record.losses, record.eval_losses))[-1]
    if rank_of_environment() != 0:
        record.weights, record.first_grads = {}, {}
    return record


@dataclass
class _Writer:
    series: dict[str, list[float]]

    def add_scalar(self, name: str, value: Any, _step: int) -> None:
        self.series.setdefault(name, []).append(float(value))


def initial_weights(flags: list[str]) -> Tensors:
    """Return, on rank 0, whole weights as Megatron's setup draws or loads them. Collective."""
    from megatron.training import training

    found: Tensors = {}
    setup = training.setup_model_and_optimizer

    def read_after_setup(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        found.update(weights.assemble(gather(weights.read(result[0], "weight"))))
        return result

    with mock.patch.object(training, "setup_model_and_optimizer", read_after_setup):
        train(flags)
    return found if rank_of_environment() == 0 else {}


def rank_of_environment() -> int:
    return int(os.environ["RANK"])


def gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@contextlib.contextmanager
def fresh_megatron(model: list[torch.nn.Module]) -> Iterator[None]:
    """Remove the state of a run afterwards, so that one process can train many models."""
    try:
        with mock.patch.dict(os.environ):  # Megatron stores a run's kind of attention there
            yield
    finally:
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
        from megatron.core.transformer.moe import fused_a2a, moe_logging, moe_utils, router_replay
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
        from megatron.training import training
        from torch.distributed.tensor import debug

        from megatron_laer import plugin

        for chunk in model:
            _strip(chunk)
        # The cache of rotary embeddings belongs to the class; each embedding keeps a group alive.
        RotaryEmbedding.forward.cache_clear()
        router_replay.RouterReplay.clear_global_router_replay_instances()
        # The flex dispatcher's buffers do too; HybridEP's would also serve the next group.
        fused_a2a._buffer = None
        fused_a2a.reset_hybrid_ep_buffer()
        # To DTensor's caches the next run's meshes equal these, whose groups have other names. On
        # some ranks these are no groups of theirs: such a rank fails, and the others wait for it.
        debug._clear_sharding_prop_cache()
        model.clear()
        training.destroy_global_state()
        plugin.disable()
        moe_logging.destroy_moe_metrics_tracker()
        MTPLossLoggingHelper.tracker.clear()
        moe_utils.RandomSTEShared._cache.clear()
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()


def _strip(chunk: Any) -> None:
    """Remove a model's references to process groups, whose threads and sockets live as long.

    Megatron's DDP, the dispatchers' last probabilities, the loop's functions in the configuration
    and autograd's C++ nodes reference each other. Python's collector cannot see that cycle.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    for name in ("grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func"):
        setattr(chunk.config, name, None)
    if hasattr(chunk, "bucket_groups"):  # a model that only evaluates is not wrapped
        chunk.grad_accs.clear()
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            vars(group).clear()
    for module in chunk.modules():
        for hook in getattr(module, "grad_acc_hooks", {}).values():  # Megatron-FSDP's
            hook.remove()
        for name, value in list(vars(module).items()):
            if name == "token_dispatcher" or isinstance(
                value, dist.ProcessGroup | ProcessGroupCollection
            ):
                setattr(module, name, None)
