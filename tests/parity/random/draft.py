"""A `Draft` collects the settings of a random case, drawn from the seed alone."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Container, Sequence
from itertools import accumulate
from typing import TypeVar

from tests.parity.random.settings import OF_FSEP, Choice, Setting

_Value = TypeVar("_Value")


class Draft:
    """Settings drawn so far: features in order, flags of both sides and of FSEP alone.

    All draws come from `random()`, which gives the same numbers in every version of Python.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random
        self.features: list[str] = []
        self.flags = ""
        self.without = ""
        self.fsep = ""

    def has(self, *names: str) -> bool:
        return any(name in self.features for name in names)

    def pick(self, values: Sequence[_Value]) -> _Value:
        return values[int(self._random() * len(values))]

    def choose(self, table: Choice, *, but: Container[str] = ()) -> str:
        """Draw one of the settings that are legal here, `but` some."""
        legal = [name for name in table if name not in but and self._allows(table[name])]
        ends = list(accumulate(table[name].weight for name in legal))
        name = legal[bisect_right(ends, self._random() * ends[-1], hi=len(ends) - 1)]
        self.take(table, name)
        return name

    def option(self, table: Choice, name: str, *, legal: bool = True) -> bool:
        """Draw whether to add a setting, whose weight is its probability where it is legal."""
        setting = table[name]
        drawn = legal and self._allows(setting) and self._random() < setting.weight
        if drawn:
            self.take(table, name)
        return drawn

    def options(self, table: Choice, *, but: Container[str] = ()) -> list[str]:
        """Return the drawn ones of a table's settings."""
        return [name for name in table if self.option(table, name, legal=name not in but)]

    def _allows(self, setting: Setting) -> bool:
        return not self.has(*setting.never) and (not setting.needs or self.has(*setting.needs))

    def take(self, table: Choice, name: str) -> None:
        setting = table[name]
        self.features.append(name)
        self.without = f"{self.without} {setting.without}".strip()
        if setting.flags.startswith(OF_FSEP):
            self.fsep += setting.flags
        else:
            self.flags += setting.flags
