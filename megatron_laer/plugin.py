"""The only place that touches Megatron's internals: what is changed, why, and how it is undone.

Patches are attributes replaced at the place where Megatron looks them up. Each is found by name
first, applied once, and put back by `disable` or `uninstall`. Without `--expert-parallel-mode fsep`
only the two argument functions are wrapped, and those only by the launchers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version

from megatron_laer import activation, support
from megatron_laer import config as settings
from megatron_laer.activation import Activation, StepOutcome
from megatron_laer.config import FSEPConfig
from megatron_laer.runtime import planner_checkpoint, process_groups
from megatron_laer.runtime.coordinator import current_coordinator
from megatron_laer.runtime.scheduler import Chunk

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.18.0", "0.18.2", "0.19.0", "0.19.2")
_FIRST, _AFTER = Version("0.18"), Version("0.20.dev0")

_HYBRID_SPECS = "megatron.core.models.hybrid.hybrid_layer_specs"


@dataclass(frozen=True)
class Patch:
    """One replaced attribute.

    Attributes:
        module: imported when the patch is applied.
        path: of the attribute in the module, `name` or `Class.name`.
        replace: takes the original and returns the replacement.
        reason: for the printed table.
    """

    module: str
    path: str
    replace: Callable[[Any], Any]
    reason: str

    def owner_and_name(self) -> tuple[Any, str]:
        """The object that holds the attribute.

        Raises:
            ImportError: Megatron lacks it; names the symbol and the tested versions.
        """
        try:
            owner: Any = importlib.import_module(self.module)
            *parents, name = self.path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"megatron_laer needs {self.module}.{self.path} ({self.reason}), which "
                f"megatron-core {_megatron_version()} does not have ({error}); tested with "
                f"{TESTED_VERSIONS[0]} to {TESTED_VERSIONS[-1]}"
            ) from error
        return owner, name


_applied: dict[Patch, tuple[Any, str, Any]] = {}


def install() -> None:
    """Teach Megatron's command line `--expert-parallel-mode`; idempotent.

    FSEP itself is turned on when the arguments are validated and ask for it.
    """
    check_version()
    for patch in ARGUMENT_PATCHES:
        _apply(patch)


def uninstall() -> None:
    """Undo `install` and `enable`."""
    disable()
    for patch in ARGUMENT_PATCHES:
        _undo(patch)


def enable(config: FSEPConfig | None = None, *, seed: int | None = None) -> None:
    """Turn FSEP on: MoE layers built from now on are sharded.

    Idempotent. Other settings than before hold for models built from now on; those built before
    cannot go on training. Before Megatron's model parallel state is initialised it makes no
    collective; after that it is collective over the world, because it creates the FSEP groups.

    Args:
        config: settings; the defaults if None.
        seed: of the experts' weights. None takes that of Megatron's arguments, or else torch's
            initial seed of the group's first rank.

    Raises:
        ImportError: a Megatron without a seam that FSEP needs, naming it.
        ValueError: a node size that does not divide the group, on every rank.
    """
    wanted = Activation(config or FSEPConfig(), seed)
    if wanted == activation.active():
        return
    check_version()
    # All seams are found before one is used, so that a missing one leaves nothing patched.
    for patch in FSEP_PATCHES:
        patch.owner_and_name()
    activation.set_active(wanted)
    fresh = [patch for patch in FSEP_PATCHES if _apply(patch)]
    _repoint_hybrid_specs()
    if fresh and int(os.environ.get("RANK", "0")) == 0:
        logger.info("FSEP is on:\n%s", patch_table())

    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        process_groups.destroy_groups()
        _create_groups()


def disable() -> None:
    """Turn FSEP off and put back what `enable` replaced.

    Destroys the FSEP groups: models that were built with FSEP cannot go on training.
    """
    activation.set_active(None)
    _remove_metrics()
    process_groups.destroy_groups()
    for patch in FSEP_PATCHES:
        _undo(patch)
    _repoint_hybrid_specs()


def patch_table() -> str:
    """What is replaced in Megatron at this moment, one line each."""
    rows = [f"  {patch.module}.{patch.path}: {patch.reason}" for patch in _applied]
    return "\n".join(rows)


def check_version() -> None:
    """Refuse a Megatron that was never tried.

    Raises:
        ImportError: with the version found and the tested range.
    """
    found = _megatron_version()
    if not _FIRST <= Version(found) < _AFTER:
        raise ImportError(
            f"megatron_laer supports megatron-core {TESTED_VERSIONS[0]} to {TESTED_VERSIONS[-1]}, "
            f"found {found}; install a supported version, or see patches/ for keeping a fork"
        )


def _megatron_version() -> str:
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        return importlib.metadata.version("megatron-core")
    return str(__version__)


def _apply(patch: Patch) -> bool:
    if patch in _applied:
        return False
    owner, name = patch.owner_and_name()
    # The raw attribute, so that a classmethod is put back as one.
    original = inspect.getattr_static(owner, name)
    setattr(owner, name, patch.replace(original))
    _applied[patch] = (owner, name, original)
    return True


def _undo(patch: Patch) -> None:
    if patch in _applied:
        owner, name, original = _applied.pop(patch)
        setattr(owner, name, original)


# Arguments.


def _with_fsep_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        # With --yaml-cfg Megatron throws the command line away, ours included.
        words = [word.split("=")[0] for word in sys.argv]
        ours = [word for word in words if word.startswith(("--fsep-", "--expert-parallel-mode"))]
        if ours and "--yaml-cfg" in words:
            raise ValueError(
                f"{', '.join(ours)} has no effect with --yaml-cfg, which replaces the command "
                "line; give Megatron's settings as flags"
            )
        return settings.add_arguments(original(parser))

    return add_megatron_arguments


def _with_fsep_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Namespace, *rest: Any, **kwargs: Any) -> Any:
        config = settings.config_from_args(args)
        if config is None:
            return original(args, *rest, **kwargs)
        if getattr(args, "deterministic_mode", False):
            if settings.given_flags(args).get("late_plan") == "keep":
                raise ValueError(
                    "--fsep-late-plan keep: --deterministic-mode waits for plans; leave one out"
                )
            config = settings.deterministic(config)
        support.check(args, config)
        # Megatron demands that experts divide over ranks, which slots do not need. It reads the
        # number for nothing else before the model is built.
        experts, ranks = args.num_experts, args.expert_model_parallel_size
        args.num_experts = -(-experts // ranks) * ranks
        try:
            result = original(args, *rest, **kwargs)
        finally:
            args.num_experts = experts
        support.check(args, config)  # again, since Megatron rewrites deprecated flags
        enable(config, seed=args.seed)
        _install_metrics(args)
        return result

    return validate_args


def _install_metrics(args: Namespace) -> None:
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

    from megatron_laer.telemetry.tracker import FSEPMetricsTracker

    tracker = FSEPMetricsTracker(args.log_interval, args.num_layers, args.mtp_num_layers or 0)
    set_moe_metrics_tracker(tracker)


def _remove_metrics() -> None:
    from megatron.core.transformer.moe import moe_logging

    from megatron_laer.telemetry.tracker import FSEPMetricsTracker

    if isinstance(moe_logging.get_moe_metrics_tracker(), FSEPMetricsTracker):
        moe_logging.destroy_moe_metrics_tracker()


# Model and process groups.


def _fsep_layer(_original: Any) -> Any:
    from megatron_laer.moe_layer import FSEPMoELayer

    return FSEPMoELayer


def _repoint_hybrid_specs() -> None:
    """Make the hybrid model's layer specs, built when their module was imported, follow the switch.

    Does nothing while that module is not imported: it will then be built with the right layer.
    """
    module = sys.modules.get(_HYBRID_SPECS)
    if module is None:
        return
    from megatron.core.models.gpt import moe_module_specs

    spec = module.hybrid_stack_spec.submodules.moe_layer.submodules
    if spec.mlp.func is not moe_module_specs.MoELayer:
        spec.mlp = functools.partial(moe_module_specs.MoELayer, *spec.mlp.args, **spec.mlp.keywords)


def _create_groups() -> None:
    from megatron.core import parallel_state

    active = activation.active()
    assert active is not None
    process_groups.create_groups(
        parallel_state.get_expert_model_parallel_group(),
        active.config.node_size,
        parallel_state.create_group,
    )


def _with_fsep_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        _create_groups()
        return result

    return initialize_model_parallel


def _with_fsep_teardown(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_model_parallel(*args: Any, **kwargs: Any) -> Any:
        activation.forget_model()
        process_groups.destroy_groups()
        return original(*args, **kwargs)

    return destroy_model_parallel


def _with_fsep_field(original: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
    def use_mpu_process_groups(cls: Any, *args: Any, **kwargs: Any) -> Any:
        collection = original.__func__(cls, *args, **kwargs)
        if process_groups.initialized():
            collection.fsep = process_groups.get_fsep_group()
        return collection

    return classmethod(functools.wraps(original.__func__)(use_mpu_process_groups))


# Steps.


def _with_step_boundary(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train_step(
        forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import get_args

        with training_step(get_args().curr_iteration, get_num_microbatches(), model) as step:
            result = original(forward_step_func, data_iterator, model, *args, **kwargs)
            step.weights_changed = not result[1]  # Megatron's skipped_iter
            return result

    return train_step


def training_step(
    step: int, num_microbatches: int | None = None, model: Sequence[torch.nn.Module] = ()
) -> AbstractContextManager[StepOutcome]:
    """A training step, at whose start layouts change. Collective: every rank must enter it.

    Megatron's own loop is wrapped in it by the plugin; a loop of one's own does it like this:

        with megatron_laer.training_step(iteration, num_microbatches, model):
            ...  # forward and backward of all microbatches, optimizer

    Args:
        step: counted over the whole run, resumed runs included.
        num_microbatches: of this step; without it, planning starts only when the step is over.
        model: Megatron's list of model chunks, the same at every step; without it, restores are
            scheduled within each layer only.

    Returns:
        A context; what it yields has `weights_changed`, to be set to False if the optimizer skips.

    Raises:
        ValueError: at the first step, on every rank of the world: a recording that cannot be
            replayed or written. With `--fsep-restore step`: no `num_microbatches`.
        RuntimeError: a plan that no backward pass used.
    """
    return activation.training_step(
        step, num_microbatches, lambda: [_chunk(wrapped) for wrapped in model]
    )


def _chunk(wrapped: Any) -> Chunk:
    """A model chunk as the scheduler sees it, from inside Megatron's data-parallel wrapper."""
    from megatron.core.utils import unwrap_model

    from megatron_laer.moe_layer import FSEPMoELayer

    module = unwrap_model(wrapped)
    found = [
        (part.state, block)
        for block in module.modules()
        for part in block.children()
        if isinstance(part, FSEPMoELayer)
    ]
    return Chunk(
        module,
        layers=[state for state, _ in found],
        blocks=[block for _, block in found],
        await_weights=functools.partial(_await_weights, wrapped),
    )


def _await_weights(wrapped: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Do before an early read of weights what Megatron does in a hook before their owner's call.

    With `--overlap-param-gather`, weights may still be on their way from other replicas.
    """
    if not getattr(wrapped, "remove_forward_pre_hook_handles", None):
        return  # Megatron gathers nothing in forward, or has synchronised all weights
    is_dispatched_elsewhere = (
        wrapped.ddp_config.align_param_gather or wrapped.overlap_param_gather_with_optimizer_step
    )
    for parameter in parameters:
        wrapped.param_to_bucket_group[parameter].finish_param_sync(
            skip_next_bucket_dispatch=is_dispatched_elsewhere
        )


# Checkpoints. Megatron looks these two up in the package at each call. A checkpoint counts once its
# tracker file names it; that is written after `save` has returned, also under async save.


def _storage() -> Any:
    """What checkpoints are written with: has `open` and `os`, of an object store where it is on."""
    from megatron.core import msc_utils

    if hasattr(msc_utils, "maybe_msc"):
        return msc_utils.maybe_msc
    # Megatron 0.18 decides at each place by itself.
    feature = msc_utils.MultiStorageClientFeature
    return feature.import_package() if feature.is_enabled() else SimpleNamespace(open=open, os=os)


def _with_planner_saved(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        planner_checkpoint.save_states(str(checkpoint_dir), current_coordinator(), _storage())
        return request

    return save


def _with_planner_loaded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        active = activation.active()
        if active is not None and active.config.plans:
            planner_checkpoint.load_states(str(checkpoint_dir), current_coordinator(), _storage())
        return loaded

    return load


ARGUMENT_PATCHES = (
    Patch(
        "megatron.training.arguments",
        "add_megatron_arguments",
        _with_fsep_arguments,
        "adds the FSEP flags",
    ),
    Patch(
        "megatron.training.arguments",
        "validate_args",
        _with_fsep_validation,
        "refuses what FSEP cannot run with, and turns FSEP on",
    ),
)

FSEP_PATCHES = (
    Patch(
        "megatron.core.models.gpt.moe_module_specs",
        "MoELayer",
        _fsep_layer,
        "MoE layers of GPT and Hybrid models are FSEP layers",
    ),
    Patch(
        "megatron.core.parallel_state",
        "initialize_model_parallel",
        _with_fsep_groups,
        "creates the FSEP groups",
    ),
    Patch(
        "megatron.core.parallel_state",
        "destroy_model_parallel",
        _with_fsep_teardown,
        "destroys the FSEP groups",
    ),
    Patch(
        "megatron.core.process_groups_config",
        "ProcessGroupCollection.use_mpu_process_groups",
        _with_fsep_field,
        "gives pg_collection.fsep to others",
    ),
    Patch(
        "megatron.training.training",
        "train_step",
        _with_step_boundary,
        "layouts change at step boundaries",
    ),
    Patch(
        "megatron.core.dist_checkpointing",
        "save",
        _with_planner_saved,
        "checkpoints carry the planner's state",
    ),
    Patch(
        "megatron.core.dist_checkpointing",
        "load",
        _with_planner_loaded,
        "a resumed run goes on planning",
    ),
)
