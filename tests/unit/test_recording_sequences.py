"""Random lives of a recording: steps, resumed and repeated runs, torn ends, damage and refusals.

The account is a plain list of records, each with its bytes. A reader sees all of them, or raises.
Only a last record that is not whole is left out.

Over 400 lines: the machine, its account and its faults read as one.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from megatron_laer.files import recording as recording_of
from megatron_laer.files import records as records_of
from megatron_laer.files import writing
from megatron_laer.files.recording import RecordingFile, run_of
from megatron_laer.files.records import Records
from tests.records import FORMATS, taken_apart
from tests.sequences import Life, find, run_lives
from tests.unit.test_records import FIELDS, full_disk, text_of, values_of
from tests.unit.test_service_sequences import FAILURES, Fault

STEPS_BY_DAY, STEPS_AT_NIGHT = 600, 10_000

RUNS = ("0123456789abcdef", "fedcba9876543210", "00112233445566ff")
FRAME_BYTES = 32
# All of these have as many bytes as one that is not changed.
OTHER_LAYERS = ["layer 1", "layer 3"]


@dataclass(frozen=True)
class Record:
    """Account of a record.

    `number` and `run` are those in its bytes, in any file. `harm` names a part that was
    changed: its frame or its content.
    """

    kind: str
    step: int
    text: str
    number: int
    run: str
    content: bytes
    harm: str = ""


@dataclass(frozen=True)
class Account:
    """Account of a file: its header, whole records, and the bytes of one that is not whole."""

    header: bytes
    run: str
    records: tuple[Record, ...] = ()
    tail: bytes = b""

    @property
    def content(self) -> bytes:
        return b"".join([self.header, *(of.content for of in self.records), self.tail])

    @property
    def run_said(self) -> str | None:
        """Return the run's number, if the header has it."""
        return self.run if b'"run":"%s"' % self.run.encode() in self.header else None

    @property
    def is_whole(self) -> bool:
        """Return whether the header is."""
        return self.header.endswith(b"\n")

    def is_refused_by_place(self, *, is_aside: bool) -> bool:
        """Return whether a record is lost, moved, of another run, or does not say where it ends."""
        number = None if is_aside else 0
        for record in self.records:
            number = record.number if number is None else number + 1
            if record.harm == "frame" or (record.run, record.number) != (self.run, number):
                return True
        return False

    @property
    def readable(self) -> tuple[Record, ...]:
        """Return the records without a last one whose content is not whole."""
        is_torn = self.records and self.records[-1].harm
        return self.records[:-1] if is_torn else self.records

    def is_refused(self, *, is_aside: bool) -> bool:
        if not self.is_whole or self.is_refused_by_place(is_aside=is_aside):
            return True
        return any(record.harm for record in self.readable)


@dataclass
class Expected:
    """Account of a recording after an event: its file, a file set aside, and warnings."""

    account: Account
    moved: tuple[int, Account] | None = None
    warnings: list[str] = field(default_factory=list)


class Refused(NamedTuple):
    """Refusal, with a part of its message."""

    says: str


def cut(account: Account, step: int) -> Expected:
    """Return the account once records from a step on are moved, and an incomplete one is gone."""
    whole = replace(account, records=account.readable, tail=b"")
    stays = tuple(of for of in whole.records if of.step < step)
    expected = Expected(replace(whole, records=stays))
    if left_out := len(account.content) - len(whole.content):
        expected.warnings.append(f"its last {left_out} bytes are no whole record")
    if moves := whole.records[len(stays) :]:
        expected.moved = step, replace(whole, records=moves)
        expected.warnings.append(f"recorded from step {step} on has been moved to")
    return expected


class Said(logging.Handler):
    """Warnings of a life."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class RecordingLives(Life):
    """Machine of a recording's runs, one after the other, and of the accidents between them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.file: RecordingFile | None = None
        self.account: Account | None = None
        self.asides: dict[str, Account] = {}
        self.seeds = itertools.count()
        self.handler = Said()
        self.said = self.handler.said
        for logger in (recording_of.logger, records_of.logger):
            logger.addHandler(self.handler)

    def teardown(self) -> None:
        for logger in (recording_of.logger, records_of.logger):
            logger.removeHandler(self.handler)
        if self.file is not None:
            self.file.close()
        shutil.rmtree(self.folder)

    @initialize(suffix=st.sampled_from(sorted(FORMATS)))
    def begin(self, suffix: str) -> None:
        self.format = FORMATS[suffix]
        self.path = self.format.path(self.folder, 0)
        self.refusals_left = 6

    def step(self) -> None:
        super().step()
        self.said.clear()

    # Runs.

    @precondition(lambda self: self.file is None)
    @rule(
        back=st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 99, -2]),
        run=st.sampled_from([None, *RUNS]),
        has_other_layers=st.sampled_from([False] * 7 + [True]),
    )
    def open(self, back: int, run: str | None, has_other_layers: bool) -> None:
        """Begin a run that goes on after the last recorded step, some earlier, later, or anew."""
        self.step()
        records = self.account.records if self.account else ()
        first_step = max(records[-1].step + 1 - back if records else -back, 0)
        fields = FIELDS | ({"layers": OTHER_LAYERS} if has_other_layers else {})
        expected = self._opened(first_step, run, fields)
        if isinstance(expected, Refused):
            with pytest.raises(ValueError, match=expected.says):
                RecordingFile(self.path, self.format, fields, first_step, run)
            return
        self.file = RecordingFile(self.path, self.format, fields, first_step, run)
        self.codec = Records(self.format, {"run": run_of(self.path), **fields})
        self._become(expected)
        assert self.file.step == first_step - 1
        self.now = first_step - 1

    def _opened(
        self, first_step: int, run: str | None, fields: Mapping[str, Any]
    ) -> Expected | Refused:
        account, moved = self.account, None
        warnings = list[str]()
        if account is not None and first_step == 0:
            if account.records or account.tail:
                moved = 0, account
                warnings = ["recorded from step 0 on has been moved to"]
            account = None
        run = account.run_said if account and account.run_said else run
        header = b"" if run is None else Records(self.format, {"run": run, **fields}).line
        if account is None:
            return Expected(Account(header, run or ""), moved, warnings)
        # A number that is torn is written anew.
        torn = re.sub(rb'"run":"[0-9a-f]{0,15}\Z', b"", account.header)
        if run is not None and not header.startswith(torn):
            return Refused("begins with .* move the file away")
        if account.is_refused_by_place(is_aside=False):
            return Refused("the file is damaged there")
        expected = cut(replace(account, header=header, run=run or ""), first_step)
        assert not (expected.moved and moved)
        last = max((of.step for of in expected.account.records), default=None)
        if self.format.has_every_step and last is not None and last < first_step - 1:
            expected.warnings.append(f"recorded of steps {last + 1} to {first_step - 1}, which")
        return expected

    def _become(self, expected: Expected) -> None:
        """Adopt an expected account; a number that nothing gives is the file's own."""
        if not expected.account.run:
            expected.account = replace(
                expected.account, run=run_of(self.path) or "", header=self.codec.line
            )
        self.account = expected.account
        records = self.account.records
        self.number = records[-1].number + 1 if records else 1
        if expected.moved is not None:
            step, moved = expected.moved
            endings = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
            names = (f"group-0.cut-from-{step}{of}{self.path.suffix}" for of in endings)
            name = next(of for of in names if of not in self.asides)
            self.asides[name] = moved
            self._check(self.path.with_name(name), moved, is_aside=step > 0)
        self._check_warnings(expected.warnings)

    def _check_warnings(self, expected: Sequence[str]) -> None:
        assert len(self.said) == len(expected), self.said
        for text, message in zip(expected, self.said, strict=True):
            assert text in message
        self.said.clear()

    @precondition(lambda self: self.file is not None and self.refusals_left)
    @rule(first_step=st.integers(0, 2), run=st.sampled_from(RUNS))
    def open_second(self, first_step: int, run: str) -> None:
        self.step()
        self.refusals_left -= 1
        with pytest.raises(writing.InUseError):
            RecordingFile(self.path, self.format, FIELDS, first_step, run)

    @precondition(lambda self: self.file is not None)
    @rule(advance=st.sampled_from([0, 1, 1, 2, -1, -2, -9]))
    def begin_step(self, advance: int) -> None:
        """Begin a step without a record, again if it is an old one."""
        self.step()
        self._begin_step(max(self.now + advance, 0))

    def _begin_step(self, step: int) -> None:
        assert self.file is not None
        self.file.begin_step(step)
        self._begun(step)

    def _begun(self, step: int) -> None:
        assert self.account is not None and self.file is not None
        if step <= self.now:
            self._become(cut(self.account, step))
        self.now = step
        assert self.file.step == step

    @precondition(lambda self: self.file is not None)
    @rule(
        kinds=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        advance=st.sampled_from([0, 0, 1, 1, 1, 1, 2, -1, -2, -9]),
        free_bytes=st.sampled_from([None] * 6 + [-3000, -1000, -200, -1, 0, 1, 20, 40, 90]),
    )
    def write(self, kinds: list[int], advance: int, free_bytes: int | None) -> None:
        """Write records of a step, perhaps on a disk that has room for so much more alone."""
        for at, kind in enumerate(kinds):
            self.step()
            step = max(self.now + advance, 0) if at == 0 else self.now
            names = [*self.format.kinds]
            if self.file is not None:
                self._write(names[kind % len(names)], step, free_bytes)

    def _write(self, kind: str, step: int, free_bytes: int | None) -> None:
        assert self.file is not None and self.account is not None
        values = values_of(self.format, kind, next(self.seeds))
        begun = cut(self.account, step) if step < self.now else Expected(self.account)
        most_bytes = sys.maxsize
        if free_bytes is not None:
            most_bytes = max(len(self.account.content) + free_bytes, 0)
        is_moved = begun.moved is None or all(
            len(of.content) <= most_bytes for of in (begun.account, begun.moved[1])
        )
        number = begun.account.records[-1].number + 1 if begun.account.records else 1
        number = self.number if step >= self.now else number
        content = self.codec.encode(kind, number, step, values)
        is_written = is_moved and len(begun.account.content + content) <= most_bytes
        with ExitStack() as stack:
            if free_bytes is not None:
                stack.enter_context(
                    full_disk(self.path, max(free_bytes, -len(self.account.content)))
                )
            if not is_written:
                stack.enter_context(pytest.raises(OSError, match=self.path.name))
            self.file.add(kind, step, **values)
        if is_moved and step != self.now:
            self._begun(step)
        elif not is_moved:
            self.account = replace(self.account, records=self.account.readable, tail=b"")
            self.said.clear()
        if is_written:
            self.number = number + 1
            record = Record(kind, step, text_of(values), number, self.account.run, content)
            self.account = replace(self.account, records=(*self.account.records, record))

    @precondition(lambda self: self.file is not None)
    @rule(
        steps=st.integers(1, 4),
        kinds=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        ends=st.booleans(),
    )
    def write_steps(self, steps: int, kinds: list[int], ends: bool) -> None:
        """Write some steps, and perhaps end the run."""
        for _ in range(steps):
            self.write(kinds, 1, None)
        if ends:
            self._close()

    @precondition(lambda self: self.file is not None and self.refusals_left)
    @rule(kind=st.integers(0, 2), advance=st.sampled_from([0, 1, -1]))
    def write_other_shape(self, kind: int, advance: int) -> None:
        """Expect a refusal that begins the step, and leaves nothing of it."""
        self.step()
        self.refusals_left -= 1
        assert self.file is not None
        name = [*self.format.kinds][kind % len(self.format.kinds)]
        values = values_of(self.format, name, 0)
        at = self.format.kinds[name][-1].name
        step = max(self.now + advance, 0)
        with pytest.raises(ValueError, match="has shape"):
            self.file.add(name, step, **values | {at: np.zeros((1, 2, 3, 4, 5))})
        if step != self.now:
            self._begun(step)

    @precondition(lambda self: self.file is not None)
    @rule()
    def close(self) -> None:
        self.step()
        self._close()

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    # Accidents.

    @property
    def is_sound(self) -> bool:
        """Return whether nothing but the file's end is damaged."""
        account = self.account
        if account is None or account.is_refused_by_place(is_aside=False):
            return False
        return not any(of.harm for of in account.records)

    @precondition(lambda self: self.is_sound and (self.file or self.account.records))
    @rule(
        lost=st.one_of(st.just(0), st.integers(0, 400), st.floats(0, 1)),
        zeros=st.sampled_from([0, 0, 1, 31, 33, 400, 4000]),
    )
    def crash(self, lost: int | float, zeros: int) -> None:
        """End the run, and lose some last bytes, some of which are zeros then."""
        self.step()
        self._close()
        account = self.account
        assert account is not None
        content = account.content
        lost = lost if isinstance(lost, int) else int(lost * len(content))
        stays = content[: max(len(content) - lost, 0)]
        if len(stays) < len(account.header):
            self.account = replace(account, header=stays, records=(), tail=b"")
        else:
            stays += bytes(zeros) if account.is_whole and not account.tail else b""
            self.account = self._after_crash(account, stays)
        self.path.write_bytes(stays)

    def _after_crash(self, account: Account, content: bytes) -> Account:
        kept, at = list[Record](), len(account.header)
        for record in account.records:
            end = at + len(record.content)
            found = content[at:end]
            if found != record.content:
                # Its frame says where it ends.
                if len(found) == end - at and found[:FRAME_BYTES] == record.content[:FRAME_BYTES]:
                    kept.append(replace(record, content=found, harm="content"))
                    at = end
                break
            kept.append(record)
            at = end
        return replace(account, records=tuple(kept), tail=content[at:])

    @precondition(
        lambda self: (
            self.file is None and self.is_sound and self.account.records and not self.account.tail
        )
    )
    @rule(
        harm=st.sampled_from(["content", "frame", "lost", "doubled", "swapped", "foreign"]),
        at=st.integers(0, 99),
        other=st.integers(0, 99),
        bit=st.integers(0, 9999),
    )
    def damage(self, harm: str, at: int, other: int, bit: int) -> None:
        """Change the bytes of a record, or its place, or take another run's for it."""
        self.step()
        account = self.account
        assert account is not None
        records = [*account.records]
        at, other = at % len(records), other % len(records)
        record = records[at]
        content = bytearray(record.content)
        begin, end = (0, FRAME_BYTES) if harm == "frame" else (FRAME_BYTES, len(content))
        if harm == "lost":
            del records[at]
        elif harm == "doubled":
            records.insert(at, record)
        elif harm == "swapped":
            records[at], records[other] = records[other], record
        elif harm == "foreign":
            records[at] = self._foreign(account, record)
        elif end > begin:
            content[begin + bit // 8 % (end - begin)] ^= 1 << bit % 8
            records[at] = replace(record, content=bytes(content), harm=harm)
        changed = replace(account, records=tuple(records))
        rest = b"".join(of.content for of in records[at:])
        if harm in ("frame", "foreign") and is_like_torn(rest):
            changed = replace(changed, records=tuple(records[:at]), tail=rest)
        self.account = changed
        self.path.write_bytes(changed.content)

    def _foreign(self, account: Account, record: Record) -> Record:
        """Return the record as another run writes it."""
        run = next(of for of in RUNS if of != account.run)
        content = account.header.replace(account.run.encode(), run.encode())
        fields = json.loads(content)
        for name in ("format", "version", "crc"):
            del fields[name]
        codec = Records(self.format, fields)
        values = values_of(self.format, record.kind, "another run")
        made = codec.encode(record.kind, record.number, record.step, values)
        return replace(record, run=run, content=made)

    @precondition(lambda self: self.file is None and self.refusals_left)
    @rule(suffix=st.sampled_from([*sorted(FORMATS), "notes"]), first_step=st.integers(0, 2))
    def file_of_another_kind(self, suffix: str, first_step: int) -> None:
        """Expect that such a file at the recording's place is neither read nor changed."""
        self.step()
        self.refusals_left -= 1
        content = b"dear diary\n" * 30
        if suffix in FORMATS and suffix != self.path.suffix[1:]:
            content = Records(FORMATS[suffix], {"run": RUNS[0], **FIELDS}).line
        self.path.write_bytes(content)
        with pytest.raises(ValueError, match="begins with"):
            RecordingFile(self.path, self.format, FIELDS, first_step, RUNS[1])
        with pytest.raises(ValueError, match=r"it begins with .*; give a "):
            taken_apart(self.path)
        assert self.path.read_bytes() == content
        if self.account is None:
            self.path.unlink()
        else:
            self.path.write_bytes(self.account.content)

    # Readers.

    @invariant()
    def files_agree_with_their_accounts(self) -> None:
        expected = self.asides if self.account is None else {**self.asides, self.path.name: None}
        assert {*os.listdir(self.folder)} == {*expected}
        for name, aside in self.asides.items():
            assert self.path.with_name(name).read_bytes() == aside.content
        if self.account is not None:
            self._check(self.path, self.account, is_aside=False)

    def _check(self, path: Path, account: Account, *, is_aside: bool) -> None:
        """Expect a file's bytes, number and records, or a refusal."""
        before = len(self.said)
        assert path.read_bytes() == account.content
        assert run_of(path) == account.run_said
        if account.is_refused(is_aside=is_aside):
            with pytest.raises(ValueError, match=r"no header|damaged"):
                taken_apart(path)
        else:
            expected = [(of.kind, of.step, of.text) for of in account.readable]
            found = [(kind, step, text_of(values)) for kind, step, values in taken_apart(path)[1]]
            assert found == expected
            is_shorter = account.tail or account.readable != account.records
            said = self.said[before:]
            assert len(said) == bool(is_shorter)
            assert all("are no whole record and are left out" in message for message in said)
        del self.said[before:]


@pytest.fixture(autouse=True)
def never_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out `fsync`: no life loses power."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def is_like_torn(rest: bytes) -> bool:
    """Return whether a loss of power may have left these bytes, from a frame on."""
    return not rest[FRAME_BYTES:].strip(b"\0") and rest[:FRAME_BYTES].endswith(b"\0")


def test_random_lives_of_a_recording_agree_with_a_plain_account() -> None:
    run_lives(RecordingLives, STEPS_BY_DAY)


@pytest.mark.nightly
def test_many_random_lives_of_a_recording_agree_with_a_plain_account() -> None:
    run_lives(RecordingLives, STEPS_AT_NIGHT)


# Deliberate faults of state, which these lives find.


_F = RecordingFile
FAULTS = (
    Fault(
        "the step before a repeated one is moved too",
        _F._cut_from,
        "place.step < step",
        "place.step < step - 1",
    ),
    Fault(
        "a repeated step stays",
        _F.begin_step,
        "step <= self.step",
        "step < self.step",
    ),
    Fault(
        "records are numbered on after a cut",
        _F._cut_from,
        "self._next = following",
        "self._next = max(self._next, following)",
    ),
    Fault(
        "records of a resumed run are numbered anew",
        _F._cut_from,
        "place.number + 1",
        "1",
    ),
    Fault(
        "a torn end stays",
        _F._cut_from,
        "self._file.truncate(end)",
        "pass",
    ),
    Fault(
        "a part of a record stays on a full disk",
        _F._write,
        "self._file.truncate(end)",
        "pass",
    ),
    Fault(
        "a resumed run has a number of its own",
        _F.__init__,
        "run_of(self.path) or run",
        "run",
    ),
    Fault(
        "a new run resumes",
        _F.__init__,
        "if first_step == 0",
        "if False",
    ),
    Fault(
        "a new run removes the one before",
        _F._begin_anew,
        "if not has_records",
        "if True",
    ),
    Fault(
        "a new run moves a file of another kind",
        _F._begin_anew,
        "if not format.magic",
        "if False and not format.magic",
    ),
    Fault(
        "a recording of other layers is written on",
        _F._check_header,
        "if not header.startswith(begin)",
        "if False",
    ),
    Fault(
        "a torn header is written twice",
        _F._check_header,
        "header[len(begin) :]",
        "header if header != begin else b''",
    ),
    Fault(
        "steps set aside replace those of an earlier time",
        _F._aside,
        "free_name",
        "",
    ),
    Fault(
        "steps set aside have no header",
        _F._move_aside,
        "write_all(tail.file, self._records.line)",
        "pass",
    ),
    Fault(
        "later records go to the file that was replaced",
        _F._move_aside,
        "self._file.close()\n    self._file = head.file",
        "head.file.close()",
    ),
    Fault(
        "a writer gives up its lock",
        _F.__init__,
        "self._file = open_exclusively(self.path)",
        "self.path.touch(); self._file = open(self.path, 'r+b', 0)",
    ),
    Fault(
        "damage is read as a torn end",
        Records._frames,
        "if _is_torn(file, offset, size)",
        "if True",
    ),
    Fault(
        "zeros after a loss of power are refused",
        records_of._is_torn,
        "while chunk := ",
        "return False\n    while chunk := ",
    ),
    Fault(
        "the content of a last record is trusted",
        Records._content,
        "zlib.crc32(content) == frame.crc",
        "True",
    ),
    Fault(
        "a record that is not whole is left out anywhere",
        Records.read,
        'raise frame.problem(path, "its checksum does not fit")',
        "continue",
    ),
    Fault(
        "a lost record is not missed",
        Records._frames,
        "if found != number",
        "if False",
    ),
    Fault(
        "another run's record is read",
        Records._frames,
        "zlib.crc32(head[:-_SEAL_BYTES], self.seed)",
        "seal",
    ),
    Fault(
        "a file set aside has to begin with the first record",
        Records._frames,
        "number = None if is_cut_off(path) and",
        "number = None if False and",
    ),
    Fault(
        "a number that is torn stays",
        _F._check_header,
        "if torn and",
        "if False and",
    ),
    Fault(
        "a torn end is left out in silence",
        Records.read,
        "if end < size and",
        "if must_be_whole and",
    ),
)


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in FAULTS])
def test_deliberate_faults_of_state_are_found(fault: Fault) -> None:
    find(RecordingLives, fault.planted(), FAILURES)
