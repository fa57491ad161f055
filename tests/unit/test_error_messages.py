"""The page of error messages has all of them, as the sources say them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_laer.config import FSEPConfig
from megatron_laer.planner import layout
from megatron_laer.planner.strategies import check_planner
from megatron_laer.support import run_files
from tests.error_messages import GAP, Message, messages, native_messages, script_messages, unread
from tests.error_messages import warnings as warnings_of_package
from tests.errors_page import KINDS, kind_of


def matches(message: Message, text: str) -> bool:
    """Whether a text is this message, filled in."""
    parts = re.split(rf"{GAP}|\b[A-Z_]{{2,}}\b", message.text)
    return re.fullmatch("(.+)".join(map(re.escape, parts)), text, re.DOTALL) is not None


def test_every_error_that_is_raised_has_its_message_on_the_page() -> None:
    assert unread() == set()


def test_every_message_is_of_a_kind_and_every_kind_has_messages() -> None:
    assert {kind_of(message).title for message in messages()} == {kind.title for kind in KINDS}
    with pytest.raises(ValueError, match="name it in KINDS"):
        kind_of(Message("elsewhere.py", "no such thing", 1))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FSEPConfig(plan_lag=0),
        lambda: FSEPConfig(plan_lag=2000),
        lambda: FSEPConfig(plan_mode="exact", restore="step"),  # type: ignore[arg-type]
        lambda: check_planner("none"),
        lambda: run_files.check(FSEPConfig(replay_layouts="nowhere")),
        lambda: layout.ExpertLayout.static(2, 1, 8),
    ],
)
def test_what_is_raised_is_among_the_messages(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as raised:
        wrong()
    text = str(raised.value)
    assert any(matches(message, text) for message in messages()), text


def test_messages_of_the_native_core_the_script_and_the_log_are_found() -> None:
    assert "columns must be [N, C]" in {message.text for message in native_messages()}
    assert "MODE=… is none of fsep, standard, both" in {m.text for m in script_messages()}
    said = {warning.text for warning in warnings_of_package()}
    assert any(text.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1: ") for text in said)
    assert any("no hardware constants for" in text for text in said)


SOURCE = '''
_WAY_OUT = "give another one"


def check(name, ranks):
    """Refuse a name."""
    if not name:
        raise ValueError("the name is empty; give one")
    where = f"rank {ranks.first}" if ranks else "no rank"
    if ranks == 1:
        raise ValueError(f"{where} has the name {name!r}; {_WAY_OUT}")
    if problems := _problems(name):
        raise ValueError(problems[0])
    raise RuntimeError(something.else_where(name))


def _problems(name):
    """List what is wrong, which is no message."""
    return [f"{name} must be short, got {len(name)} letters"]
'''


def test_messages_are_read_with_constants_choices_and_lists_and_the_rest_is_told(
    tmp_path: Path,
) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    found = messages(tmp_path)
    assert [(message.said, message.way_out) for message in found] == [
        ("the name is empty", "give one"),
        ("rank FIRST has the name NAME", "give another one"),
        ("no rank has the name NAME", "give another one"),
        (f"NAME must be short, got {GAP} letters", ""),
    ]
    assert unread(tmp_path) == {"module.py: RuntimeError(something.else_where(name))"}
