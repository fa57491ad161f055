"""`enable` turns FSEP on for models built from then on, and `disable` turns it off."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from megatron_laer import device, session
from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import problem_of, quoted, refuse_unusable_folder
from megatron_laer.megatron_version import check_version
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.strategies import check_planner
from megatron_laer.plugin.checkpoint_writer import NVRX_PATCHES, WRITER_PATCHES, nvrx_patches
from megatron_laer.plugin.checkpoints import CHECKPOINT_PATCHES
from megatron_laer.plugin.data_parallel import DATA_PARALLEL_PATCHES
from megatron_laer.plugin.install_tracker import remove_metrics
from megatron_laer.plugin.layers import LAYER_PATCHES, create_groups, repoint_hybrid_specs
from megatron_laer.plugin.optimizers import OPTIMIZER_PATCHES
from megatron_laer.plugin.patching import apply, patch_table, undo
from megatron_laer.plugin.sharded_models import SHARDING_PATCHES
from megatron_laer.plugin.steps import STEP_PATCHES
from megatron_laer.rules import UNPROVEN
from megatron_laer.session import Session
from megatron_laer.support import torch_version

logger = logging.getLogger(__name__)

FSEP_PATCHES = (
    *LAYER_PATCHES,
    *STEP_PATCHES,
    *DATA_PARALLEL_PATCHES,
    *OPTIMIZER_PATCHES,
    *SHARDING_PATCHES,
    *CHECKPOINT_PATCHES,
    *WRITER_PATCHES,
)


def enable(config: FSEPConfig | None = None, *, seed: int | None = None) -> None:
    """Turn FSEP on: MoE layers built from now on are sharded.

    Idempotent. Other settings than before apply to models built from now on; earlier ones cannot go
    on training. Before Megatron's model parallel state is initialised it makes no collective. After
    that it is collective over the world, because it creates the FSEP groups. These have torch's
    time-out and NCCL's defaults, and token exchanges the priority of compute.

    Args:
        config: settings; the defaults if None.
        seed: of the experts' weights. If None, that of Megatron's arguments, or else torch's
            initial seed of the group's first rank.

    Raises:
        ImportError: Megatron lacks a patched attribute, which is named.
        ValueError: torch is too old for a GPU; an unknown planner; a file or folder that cannot be
            used. On every rank: a node size that does not divide the group.
    """
    wanted = Session(config or FSEPConfig(), seed)
    current = session.current()
    if current is not None and (current.config, current.seed) == (wanted.config, wanted.seed):
        return
    check_version()
    if not device.cpu_installed() and (problem := torch_version.problem_on_cuda(torch.__version__)):
        raise ValueError(f"FSEP cannot run with {problem}")
    check_planner(wanted.config.planner)
    check_files(wanted.config)
    # Look up all attributes before replacing one, so that a missing one leaves nothing patched.
    for patch in FSEP_PATCHES:
        patch.owner_and_name()
    patches = (*FSEP_PATCHES, *nvrx_patches())
    session.replace(wanted)
    fresh = [patch for patch in patches if apply(patch)]
    repoint_hybrid_specs()
    if int(os.environ.get("RANK", "0")) == 0:
        if fresh:
            logger.info("FSEP is on")
            logger.debug("FSEP: changes in Megatron:\n%s", patch_table())
        if not wanted.config.quantises_experts:
            logger.info("FSEP: experts compute with --fsep-set gemm=%s", wanted.config.gemm)
        for word in wanted.config.allow_unproven:
            logger.warning(
                "FSEP: --fsep-allow-unproven %s: nobody has run FSEP with %s, and no test on a GPU "
                "has shown that it works; compare losses with those of a run without",
                word,
                UNPROVEN[word],
            )

    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        create_groups(wanted)


def check_files(config: FSEPConfig) -> None:
    """Refuse files and folders that the run could not use; create none, and open no recording."""
    if config.cluster is not None:
        try:
            load_cluster(config.cluster)
        except (OSError, ValueError) as error:
            raise ValueError(problem_of("--fsep-set cluster=", config.cluster, error)) from error
    if (path := config.stock_file) is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(
            f"--fsep-set stock_file={quoted(path)}: its folder does not exist, so the file could "
            "never be found; make the folder, on every node"
        )
    # They may be one folder, since their files' names differ.
    for folder in (config.record_layouts, config.record_trace, config.record_metrics):
        if folder is not None:
            refuse_unusable_folder(folder, "--fsep-record")


def disable() -> None:
    """Turn FSEP off and undo the patches of `enable`.

    Destroys the FSEP groups: models that were built with FSEP cannot go on training.
    """
    session.replace(None)
    remove_metrics()
    for patch in (*FSEP_PATCHES, *NVRX_PATCHES):
        undo(patch)
    repoint_hybrid_specs()
