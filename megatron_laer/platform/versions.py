"""Releases of Megatron that the plugin was tried with. What differs between them: `releases.py`."""

from __future__ import annotations

import importlib.metadata

TESTED_VERSIONS = ("0.18.0", "0.18.2", "0.19.0", "0.19.2")
_FIRST, _AFTER = "0.18", "0.20.dev0"


def check_version() -> None:
    """Refuse a Megatron that was never tried.

    Raises:
        ImportError: with the version found and the tested range.
    """
    from packaging.version import Version

    found = megatron_version()
    if not Version(_FIRST) <= Version(found) < Version(_AFTER):
        raise ImportError(
            f"megatron_laer supports megatron-core {TESTED_VERSIONS[0]} to {TESTED_VERSIONS[-1]}, "
            f"found {found}; install a supported version, or see patches/ for keeping a fork"
        )


def megatron_version() -> str:
    """The version of the Megatron that is imported, or else of the one installed."""
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        return importlib.metadata.version("megatron-core")
    return str(__version__)
