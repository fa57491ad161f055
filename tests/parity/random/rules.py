"""FSEP's own rules for the rows of random cases, asked without Megatron."""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

from megatron_laer.fsep_flags import add_arguments, config_from_args
from megatron_laer.support import arguments
from tests.parity.row import Row
from tests.parity.settings import adapts_experts, settings_in


def refusals(row: Row) -> list[str]:
    """Return the reasons why FSEP refuses a row at its start."""
    own, others = _parser().parse_known_args(row.fsep_run("text")[1])
    try:
        config = config_from_args(own)
    except ValueError as error:
        return [str(error)]
    assert config is not None
    given = {name: _value(value) for name, value in vars(settings_in(others)).items()}
    if isinstance(modules := given.get("recompute_modules"), str):
        given["recompute_modules"] = [modules]
    # Megatron's names and defaults.
    others_of_megatron = {
        "world_size": row.ranks,
        "fp8": given.pop("fp8_format", None),
        "gradient_accumulation_fusion": "no_gradient_accumulation_fusion" not in given,
        "moe_permute_fusion": False,
        "moe_flex_dispatcher_backend": None,
        "moe_layer_freq": 1,
        "adapts_experts": adapts_experts(row),
    }
    settings = argparse.Namespace(**others_of_megatron | given)
    return arguments.problems(settings, config)


@cache
def _parser() -> argparse.ArgumentParser:
    return add_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _value(value: Any) -> Any:
    """Return a number, or a pattern such as `([0]*1+[1]*3)`, as Megatron reads them."""
    is_read = isinstance(value, str) and (value.isdecimal() or value.startswith("(["))
    return eval(value, {"__builtins__": {}}) if is_read else value
