"""One setting of Megatron that FSEP refuses, as a flag and as a field."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_laer.config import Unproven

SAME = "the flag's"
# Recipes that a word of `--fsep-allow-unproven` goes with.
BY_RECIPE = {Unproven.FP8_EXPERTS: " with --fp8-recipe tensorwise, blockwise or mxfp8"}
_NOT_RUN = "nobody has run it with FSEP, and no test on a GPU has shown it"


class LeftOut(StrEnum):
    """Loss of a run without a refused setting that does not change the model."""

    SPEED = "speed-only"
    PRECISION = "precision"


@dataclass(frozen=True)
class Refusal:
    """Setting of Megatron, refused unless it has an accepted value.

    Attributes:
        setting: flag with its refused part, or field if there is no flag; key of the row in docs.
        way_out: remedy in terms of flags.
        accepted: accepted values, first the one to choose. None and False are both "off", and
            either accepts the other.
        dest: argparse's name of the flag, if not its own.
        field: field of TransformerConfig that the flag ends up in, by default of the flag's name;
            "" if there is none.
        field_way_out: remedy in terms of the field, if not the first accepted value.
        refuses: predicate on arguments or a TransformerConfig, where accepted values do not decide.
        is_filled_in: whether FSEP makes the accepted value the flag's default, as it does not
            change the model.
        unproven: word of `--fsep-allow-unproven` that accepts `unproven_values` too.
        or_unproven: another such word.
        fits: word of `--fsep-allow-unproven` with which the setting is accepted.
        left_out: loss of a run without the setting, if that is speed or precision alone.
    """

    setting: str
    reason: str
    way_out: str = "leave it out"
    accepted: tuple[object, ...] = (False,)
    dest: str = ""
    field: str = SAME
    field_way_out: str = ""
    refuses: Callable[[Any], bool] | None = None
    is_filled_in: bool = False
    unproven: Unproven | None = None
    or_unproven: Unproven | None = None
    unproven_values: tuple[str, ...] = ()
    fits: Unproven | None = None
    left_out: LeftOut | None = None

    def __post_init__(self) -> None:
        if self.field == SAME:
            object.__setattr__(self, "field", self.argument)

    @property
    def said_way_out(self) -> str:
        """Return the remedy, with a note if its only cost is speed."""
        return self._with_cost(self.way_out)

    @property
    def words(self) -> tuple[Unproven, ...]:
        """Return the words of `--fsep-allow-unproven` that accept `unproven_values`."""
        return tuple(word for word in (self.unproven, self.or_unproven) if word is not None)

    @property
    def flag(self) -> str:
        """Return the flag alone, or "" for a setting that only TransformerConfig has."""
        return self.setting.split()[0] if self.setting.startswith("--") else ""

    @property
    def argument(self) -> str:
        """Return the attribute of parsed arguments that holds the flag's value, or ""."""
        return self.dest or self.flag.removeprefix("--").replace("-", "_")

    def problem_with_flag(self, args: Any, allowed: Collection[Unproven] = ()) -> str | None:
        """Return the reason and remedy if FSEP cannot run with these arguments, else None."""
        if not self._is_refused(args, self.argument, allowed):
            return None
        value = getattr(args, self.argument)
        if value is None and self.refuses is None:  # not given, so Megatron's default stands
            return None
        if self.asks_for_unproven(args, self.argument):
            words = " or ".join(f"{word}{BY_RECIPE.get(word, '')}" for word in self.words)
            return (
                f"{self.flag} {value}: {_NOT_RUN}; to run it all the same give "
                f"--fsep-allow-unproven {words}, or {self.said_way_out}"
            )
        if isinstance(value, list) and value:
            given = " ".join([self.flag, *names_of(value)])
        else:
            is_said_by_name = value is None or value is True or value == []
            given = self.setting if is_said_by_name else f"{self.flag} {value}"
        return f"{given}: {self.reason}; {self.said_way_out}"

    def problem_with_field(self, config: Any, allowed: Collection[Unproven] = ()) -> str | None:
        """Return the reason and remedy if FSEP cannot run with this config, else None."""
        if not self._is_refused(config, self.field, allowed):
            return None
        given = f"{self.field}={getattr(config, self.field)!r}"
        way_out = self._with_cost(self.field_way_out or f"must be {self.accepted[0]!r}")
        if self.asks_for_unproven(config, self.field):
            words = " or ".join(f"[{str(word)!r}]" for word in self.words)
            allow = f"FSEPConfig(allow_unproven={words})"
            return f"{given}: {_NOT_RUN}; to run it all the same give {allow}, or else it {way_out}"
        return f"{given}: {self.reason}; {way_out}"

    def asks_for_unproven(self, settings: Any, name: str) -> bool:
        """Return whether the setting of this name has a value that was never run."""
        return bool(self.words) and getattr(settings, name, None) in self.unproven_values

    def _with_cost(self, way_out: str) -> str:
        is_speed_only = self.left_out is LeftOut.SPEED
        return f"{way_out} (it is {LeftOut.SPEED})" if is_speed_only else way_out

    def _is_refused(self, settings: Any, name: str, allowed: Collection[Unproven]) -> bool:
        if not name or not hasattr(settings, name):  # an older Megatron lacks some settings
            return False
        if self.fits in allowed:
            return False
        if self.refuses is not None:
            return self.refuses(settings)
        if not set(self.words).isdisjoint(allowed) and self.asks_for_unproven(settings, name):
            return False
        value = getattr(settings, name)
        is_off = value is None or value is False
        return value not in self.accepted and not (
            is_off and (None in self.accepted or False in self.accepted)
        )


def names_of(words: Collection[Any]) -> list[str]:
    """Return words in a command line's form; some are members of Megatron's enumerations."""
    return [str(getattr(word, "name", word)) for word in words]
