"""Checks of every MoE layer's TransformerConfig, which a script may have built without flags.

Refused fields raise, and MoE fields that no test covers are warned of. `arguments` checks
Megatron's arguments earlier. Nothing of Megatron is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from types import SimpleNamespace
from typing import Any

from megatron_laer.choices import TokenExchange
from megatron_laer.config import FSEPConfig
from megatron_laer.rules import (
    PROVED,
    REFUSALS,
    RULES,
    UNTRIED,
    WITHOUT_EFFECT,
    idle_words,
    of_fields,
    problems_by,
    settings_with,
)

logger = logging.getLogger(__name__)

_EXPOSED_IN_NODE = (
    "--fsep-token-exchange node with --overlap-moe-expert-parallel-comm: inside a node tokens move "
    "with the experts' compute, where that schedule hides none of them; give --fsep-token-exchange "
    "rank unless links between nodes are much slower"
)
# Names of Megatron's fields about MoE.
MOE_FIELD = re.compile(r"moe|expert|router")

# Rules on arguments that are no fields of a TransformerConfig are for the command line.
_RULES = [*(row for row in REFUSALS if row.field), *RULES[len(REFUSALS) :]]
_REFUSED = frozenset(row.field for row in REFUSALS)


def check(config: Any, ours: FSEPConfig) -> None:
    """Refuse a TransformerConfig that FSEP cannot run, and warn of MoE fields without a test."""
    settings = settings_with(of_fields(config), ours)
    refuse(problems_by(_RULES, settings, as_fields=True) + idle_words(settings))
    for warning in warnings_of(config):
        _warn_once(warning)
    if ours.token_exchange == TokenExchange.NODE and config.overlap_moe_expert_parallel_comm:
        _warn_once(_EXPOSED_IN_NODE)


def slots_multiple(settings: Any) -> int:
    """Return the number of which N·C must be a multiple for the token dispatcher.

    `settings` is Megatron's TransformerConfig or its arguments, here and below.
    """
    if settings.moe_token_dispatcher_type != "flex":
        return 1
    return 4 if settings.moe_flex_dispatcher_backend == "hybridep" else 1


def goes_through_nodes(settings: Any) -> bool:
    """Return whether tokens could go through nodes; where not, `auto` takes `rank`."""
    asked = SimpleNamespace(**vars(settings) | {"fsep_token_exchange": TokenExchange.NODE})
    rules = [rule for rule in RULES if rule.argument == "fsep_token_exchange"]
    return not problems_by(rules, asked)


def warnings_of(config: Any) -> list[str]:
    """Return a warning per field about MoE, or new in Megatron, that no test covers."""
    found = []
    for field in dataclasses.fields(config):
        is_untried = field.name in UNTRIED
        if not (is_untried or MOE_FIELD.search(field.name)) or field.name in _REFUSED:
            continue
        value, make = getattr(config, field.name), field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if field.name in PROVED or field.name in WITHOUT_EFFECT or value == default:
            continue
        why = "no test sets this field" if is_untried else "megatron_laer does not know this field"
        found.append(f"{field.name}={value!r}: {why}, and FSEP may not honour it")
    return found


def refuse(problems: list[str]) -> None:
    """Raise ValueError for problems of a model, if there are any."""
    if problems:
        raise ValueError("FSEP cannot run this model:\n  " + "\n  ".join(problems))


@functools.cache  # every layer has the same configuration
def _warn_once(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning(text)
