"""This file finds the installed Megatron's version, and asks `releases` whether it is supported."""

from __future__ import annotations

import importlib.metadata

from megatron_laer.releases import SUPPORTED, TESTED_RANGE


def check_version() -> None:
    """Refuse a Megatron that was never tried.

    Raises:
        ImportError: with the version found and the tested range.
    """
    from packaging.specifiers import SpecifierSet

    found = megatron_version()
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise ImportError(
            f"megatron_laer supports megatron-core {TESTED_RANGE}, "
            f"found {found}; install a supported version, or see patches/ for keeping a fork"
        )


def megatron_version() -> str:
    """Return the version of the Megatron that is imported, or else of the one installed."""
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        return importlib.metadata.version("megatron-core")
    return str(__version__)
