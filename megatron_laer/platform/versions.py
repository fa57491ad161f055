"""This file finds the installed Megatron's version, and asks `releases` whether it is supported."""

from __future__ import annotations

import importlib.metadata
import os

from megatron_laer.environment import UNRELEASED_MEGATRON
from megatron_laer.releases import NEXT, SUPPORTED, TESTED_RANGE


def check_version() -> None:
    """Refuse a Megatron that was never tried, and one that is not released unless asked for.

    Raises:
        ImportError: with the version found and the tested range.
        ValueError: a release is asked for that is another, or needs no asking.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    found = megatron_version()
    is_supported = SpecifierSet(SUPPORTED).contains(found, prereleases=True)
    is_next = ".".join(map(str, Version(found).release[:2])) == NEXT.number
    # Of the environment, since a version is looked at before there is a command line.
    asked = os.environ.get(UNRELEASED_MEGATRON)
    if asked is not None and asked != NEXT.number:
        raise ValueError(
            f"{UNRELEASED_MEGATRON}={asked}: must be {NEXT.number}, the release after the newest "
            "supported one; or unset it"
        )
    if asked is not None and is_supported:
        raise ValueError(
            f"{UNRELEASED_MEGATRON}={asked} has no effect with megatron-core {found}, which needs "
            "no asking; unset it"
        )
    if is_supported or (is_next and asked is not None):
        return
    way_out = "install a supported version, or see patches/ for keeping a fork"
    if is_next:
        tried = ", ".join(NEXT.tested)
        way_out += (
            f"; {NEXT.number} was not released when this was written: {UNRELEASED_MEGATRON}="
            f"{NEXT.number} in the environment tries it (tested with {tried})"
        )
    raise ImportError(
        f"megatron_laer supports megatron-core {TESTED_RANGE}, found {found}; {way_out}"
    )


def megatron_version() -> str:
    """Return the version of the Megatron that is imported, or else of the one installed."""
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        return importlib.metadata.version("megatron-core")
    return str(__version__)
