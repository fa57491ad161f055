"""Version of the installed Megatron, checked against the supported `releases`."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from pathlib import Path

from megatron_laer.environment import UNRELEASED_MEGATRON
from megatron_laer.releases import NEXT, SUPPORTED, TESTED_RANGE

logger = logging.getLogger(__name__)


def check_version() -> None:
    """Refuse an unsupported Megatron; accept the next, unreleased one only on request."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    found = megatron_version()
    is_supported = SpecifierSet(SUPPORTED).contains(found, prereleases=True)
    is_next = ".".join(map(str, Version(found).release[:2])) == NEXT.number
    # From the environment, since versions are checked before there is a command line.
    asked = os.environ.get(UNRELEASED_MEGATRON)
    if asked is not None and asked != NEXT.number:
        raise ValueError(
            f"{UNRELEASED_MEGATRON}={asked}: must be {NEXT.number}, the release after the newest "
            "supported one; or unset it"
        )
    if asked is not None and is_supported and int(os.environ.get("RANK", "0")) == 0:
        logger.warning(
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
    """Return the version of the imported Megatron, or else of the installed one.

    A checkout's has its commit. An installed one's is cut: its commit is that of any repository
    around its folder.
    """
    try:
        from megatron.core import package_info
    except ImportError:
        return importlib.metadata.version("megatron-core")
    version = str(package_info.__version__)
    return version.partition("+")[0] if _is_installed(Path(package_info.__file__)) else version


def _is_installed(file: Path) -> bool:
    """Return True if the file belongs to megatron-core's distribution."""
    try:
        found = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return False
    place = Path(str(found.locate_file("megatron/core/package_info.py")))
    return place.exists() and place.samefile(file)
