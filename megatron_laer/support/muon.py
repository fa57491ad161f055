"""Muon (`--optimizer muon`), whose updates need whole matrices: it runs with experts at home."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_laer.choices import Auto, Sharding
from megatron_laer.config import FSEPConfig

_NAMES = ("muon", "dist_muon")


def with_homes(settings: Any, config: FSEPConfig) -> FSEPConfig:
    """Return the config with experts at home instead of `auto`, if the optimizer is Muon.

    `settings` are Megatron's arguments. With settings that need rows, `problems` refuses `auto`.
    """
    if not is_muon(settings) or config.sharding != Auto.AUTO or config.reason_for_rows is not None:
        return config
    return replace(config, sharding=Sharding.EXPERTS)


def problems(settings: Any, config: FSEPConfig) -> list[str]:
    """Return why Muon cannot run with FSEP's settings."""
    if not is_muon(settings):
        return []
    given = f"--optimizer {settings.optimizer}"
    if config.sharding == Auto.AUTO and config.reason_for_rows is not None:
        needed = f"--fsep-sharding {Sharding.EXPERTS}"
        return [f"{given}: it needs {needed}, but {config.reason_for_rows}"]
    problem = problem_with_rows(given, config.sharding)
    return [] if problem is None else [problem]


def problem_with_rows(given: str, sharding: Sharding | Auto) -> str | None:
    """Return why Muon cannot run with this sharding; `given` is the setting that asks for Muon."""
    if sharding != Sharding.ROWS:
        return None
    return (
        f"{given} with --fsep-sharding {sharding}: Muon needs whole matrices, and a rank holds "
        f"rows of them; give --fsep-sharding {Sharding.EXPERTS}"
    )


def is_muon(settings: Any) -> bool:
    return getattr(settings, "optimizer", None) in _NAMES
