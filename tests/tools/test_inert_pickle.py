"""Pickles are read as plain records, and never executed."""

from __future__ import annotations

import collections
import pickle
import random
from typing import Any

import pytest

from megatron_laer.tools import inert_pickle
from megatron_laer.tools.inert_pickle import Name, read
from tests.fuzz import damaged


class Thing:
    def __new__(cls, *arguments: object) -> Thing:
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[object, ...]:
        return 1, "a"

    def __init__(self) -> None:
        self.size = (1, 2)
        self.itself = self


THING = Name(Thing.__module__, "Thing")


def anything(name: Name) -> bool:
    return True


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back_from_every_binary_protocol(protocol: int) -> None:
    values: Any = {
        "numbers": [0, -1, 255, 65536, 2**40, -(2**200), 1.5],
        "texts": ["", "é", "x" * 300],
        "constants": (None, True, False),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "mapping": collections.OrderedDict(a={"b": {}}),
    }
    assert read(pickle.dumps(values, protocol), anything) == values


def test_objects_are_records_of_what_would_have_made_them() -> None:
    found = read(pickle.dumps([Thing(), Thing]), anything)
    record, name = found
    assert (record.name, record.arguments, name) == (THING, (1, "a"), THING)
    assert record.state["size"] == (1, 2)
    assert record.state["itself"] is record


def test_entries_with_other_keys_than_texts_are_left_out() -> None:
    assert read(pickle.dumps({"a": 1, 2: 3, (4,): 5}), anything) == {"a": 1}


def test_names_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"it asks for builtins\.eval"):
        read(pickle.dumps(eval), lambda name: False)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x80\x04", b"\xff", pickle.dumps([1])[:-1], b"\x80\x04.", b"\x80\x04t."),
        *(b"\x80\x04r\0\0\0\x10.", b"\x80\x04j\0\0\0\x10.", b"\x80\x04)]KxKys."),
        # Calls or changes of objects other than names.
        *(
            b"\x80\x04KxK\x01\x85R.",
            b"\x80\x04cpathlib\nPath\n}X\1\0\0\0aK\1sb.",
            b"\x80\x04}(Kxu.",
        ),
        *(b"(ios\nsystem\n.", b"\x80\x02\x82\x01.", b"\x80\x02KxQ.", b"Pid\n."),
        b"I" + b"9" * 5000,
        *(
            b"\x80\x04\x8a\xff.",
            b"\x80\x04X\xff\xff\xff\xff.",
            b"\x80\x05\x96" + b"\xff" * 8 + b".",
        ),
    ],
)
def test_damage_and_unknown_operations_are_value_errors(data: bytes) -> None:
    with pytest.raises(ValueError):
        read(data, anything)


def test_deep_and_doubling_tuples_are_never_hashed() -> None:
    # As keys, the first would overflow the stack and the second take forever.
    for key in (b")" + b"\x85" * 1_000_000, b")" + b"q\0h\0\x86" * 100):
        assert read(b"\x80\x04}" + key + b"Kxs.", anything) == {}


def test_the_number_of_operations_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert_pickle._Operations, "left", 1000)
    read(b"]" * 999 + b".", anything)
    with pytest.raises(ValueError, match="operations"):
        read(b"]" * 1000 + b".", anything)


CASES = 1000


@pytest.mark.counts(fuzz_cases=CASES)
def test_only_value_errors_come_out_of_damaged_pickles() -> None:
    whole = pickle.dumps({"a": [Thing(), collections.OrderedDict(b=1)], "c": (1.5, None, "d" * 9)})
    luck = random.Random(4)
    refused = 0
    for _ in range(CASES):
        try:
            read(damaged(whole, luck), anything)
        except ValueError:
            refused += 1
    assert refused > CASES // 2
