"""All changes to Megatron for FSEP; each patch has a reason and can be undone.

Without `--expert-parallel-mode fsep` only the two argument functions are wrapped, and those only by
the launchers.
"""

from megatron_laer.megatron_version import check_version
from megatron_laer.plugin.command_line import ARGUMENT_PATCHES, install, uninstall
from megatron_laer.plugin.patching import patch_table
from megatron_laer.plugin.steps import training_step
from megatron_laer.plugin.switch import FSEP_PATCHES, disable, enable

__all__ = [
    "ARGUMENT_PATCHES",
    "FSEP_PATCHES",
    "check_version",
    "disable",
    "enable",
    "install",
    "patch_table",
    "training_step",
    "uninstall",
]
