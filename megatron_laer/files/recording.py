"""A recording is a file with a header and records that its one writer only ever appends.

Writers of formats know where each record ends; nothing here knows their content. A recording is
never rewritten in place. Steps that a run repeats are copied to another file, and a copy of the
rest replaces the recording. So a run that is killed at any moment leaves the old recording or the
new one. An incomplete last record is cut off in place.

The header has the run's number, 16 random digits that a resumed run keeps. It also seeds the
records' checksums, and records are numbered from 1. So readers notice records of another run, and
lost ones.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_laer.files import run_mark
from megatron_laer.files.checks import MAX_TEXT_BYTES, open_input, quoted
from megatron_laer.files.json_lines import header_line, read_header, read_line, sealed
from megatron_laer.files.writing import (
    Replacement,
    free_name,
    open_exclusively,
    remove_leftovers,
    write_all,
)

logger = logging.getLogger(__name__)

_QUOTED_BYTES = 300
_COPIED_AT_ONCE_BYTES = 2**20
_ASIDE = re.compile(r".+\.cut-from-\d+(\.\d+)?\.[^.]+")
_RUN = re.compile(r"[0-9a-f]{16}")
_RUN_IN_HEADER = re.compile(rb'"run": ?"([0-9a-f]{16})"')


class RecordingFile:
    """Only writer of a recording. On an OSError all records are kept.

    `fields` are the header's, and `records` yields each whole record's step and end offset.
    `first_step` is this run's; 0 if it does not resume another. A new file gets the number `run`.
    `last` is the last step of earlier runs that stays, if any, and `step` the newest started one,
    or the one before the run's first. The next record has the number `next`, and a checksum with
    this `seed`.

    Raises InUseError if another run writes it, and ValueError for another file, another header, or
    another run's records at step 0 (see `run_mark`).
    """

    def __init__(
        self,
        path: Path,
        format_name: str,
        fields: Mapping[str, Any],
        records: Callable[[Path], Iterable[tuple[int, int]]],
        first_step: int,
        run: str | None = None,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.last: int | None = None
        self.step, self.next = first_step - 1, 0  # the header's number
        self._records = records
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_exclusively(self.path)
        run = run_of(self.path) or run or new_run()
        self.seed = zlib.crc32(run.encode())
        self._header = header_line(format_name, {"run": run, **fields})
        try:
            remove_leftovers(self.path)
            self._check_header()
            self._go_on(first_step)
        except BaseException:
            self.close()
            raise

    def append(self, record: bytes) -> None:
        with _naming(self.path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                write_all(self._file, record)
            except OSError:
                # A partial record would make later ones unreadable.
                self._file.truncate(end)
                raise
        self.next += 1

    def append_line(self, content: Mapping[str, Any]) -> None:
        """Append a record of JSON, which `read_record` reads."""
        self.append(sealed({"record": self.next, **content}, self.seed))

    def begin_step(self, step: int) -> None:
        """Start a step; a repeated one moves its records, and later ones, to another file."""
        if step <= self.step:
            self._cut_from(step)
        self.step = step

    def _check_header(self) -> None:
        begin = self._file.read(len(self._header))
        if not self._header.startswith(begin):
            raise ValueError(
                f"{self.path} begins with {self._first_line(begin)}, this run would write "
                f"{self._first_line(self._header)}; record to another folder, or move the file away"
            )
        # A run that was killed at once leaves a part of its header.
        self.append(self._header[len(begin) :])

    def _go_on(self, first_step: int) -> None:
        is_restart = first_step > 0 or run_mark.is_of_this_run(self.path)
        if not is_restart and any(True for _ in self._records(self.path)):
            raise ValueError(
                f"{self.path} holds the steps of an earlier run, and this run begins at step 0; "
                "give an empty folder, or resume the run that wrote it from a checkpoint"
            )
        run_mark.mark(self.path)
        self.last = self._cut_from(first_step)

    def _cut_from(self, step: int) -> int | None:
        """Move records from a step on to another file, and cut off an incomplete one.

        Return the last step that stays, if any.
        """
        stays = end = len(self._header)
        last, is_cut, self.next = None, False, 1
        for at, end in self._records(self.path):
            is_cut = is_cut or at >= step
            if not is_cut:
                last, stays, self.next = at, end, self.next + 1
        with _naming(self.path):
            incomplete = self._file.seek(0, os.SEEK_END) - end
            if incomplete:
                self._file.truncate(end)
                logger.warning(
                    "FSEP: %s: its last %d bytes are no whole record and are left out",
                    self.path,
                    incomplete,
                )
            if is_cut:
                self._move_aside(stays, end, step)
        return last

    def close(self) -> None:
        self._file.close()

    def _move_aside(self, begin: int, end: int, step: int) -> None:
        with ExitStack() as undo:
            tail = Replacement(self.path)
            undo.callback(tail.discard)
            head = Replacement(self.path)
            undo.callback(head.discard)
            write_all(tail.file, self._header)
            self._copy(begin, end, tail.file)
            self._copy(0, begin, head.file)
            beside = free_name(self.path.with_stem(f"{self.path.stem}.cut-from-{step}"))
            tail.commit(beside)
            head.commit()
            undo.pop_all()
        tail.file.close()
        self._file.close()
        self._file = head.file
        logger.warning(
            "FSEP: %s: what was recorded from step %d on has been moved to %s",
            self.path,
            step,
            beside.name,
        )

    def _copy(self, begin: int, end: int, target: BinaryIO) -> None:
        self._file.seek(begin)
        while begin < end:
            content = self._file.read(min(_COPIED_AT_ONCE_BYTES, end - begin))
            if not content:
                raise OSError(f"{self.path} ends at byte {begin}, expected {end}")
            write_all(target, content)
            begin += len(content)

    def _first_line(self, content: bytes) -> str:
        line = content[:_QUOTED_BYTES].split(b"\n", 1)[0]
        return quoted(line.decode(errors="backslashreplace"), _QUOTED_BYTES)


def read_recording_header(line: bytes, format_name: str, kind: str) -> tuple[dict[str, Any], int]:
    """Return a first line's fields without the run, and the seed of the records' checksums."""
    fields = read_header(line, format_name, kind)
    run = fields.pop("run", None)
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise ValueError(f"run must be 16 hexadecimal digits, got {quoted(run)}")
    return fields, zlib.crc32(run.encode())


def read_record(line: bytes, path: Path, number: int, seed: int) -> dict[str, Any]:
    """Read a line of JSON, counted from 1, of which the first is the header."""
    content = read_line(line, seed)
    check_number(path, content.pop("record", None), number - 1, "")
    return content


def check_number(path: Path, number: object, expected: int, where: str) -> None:
    """Refuse a record that is not the next; the first ones of a file set aside are in another."""
    if number != expected and not is_cut_off(path):
        raise ValueError(
            f"{where}record {quoted(number)} is where record {expected} must be, so some are lost "
            "or moved; a copy of the file up to there can be read"
        )


def new_run() -> str:
    return secrets.token_hex(8)


def run_of(path: Path) -> str | None:
    """Return the number of a recording's run; None for a missing file or header."""
    try:
        with open_input(path) as file:
            found = _RUN_IN_HEADER.search(file.readline(MAX_TEXT_BYTES))
    except (OSError, ValueError):
        return None
    return found[1].decode() if found else None


def is_cut_off(path: Path) -> bool:
    """Return True for names of files that were set aside, since their steps were repeated."""
    return _ASIDE.fullmatch(path.name) is not None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, such as a write's."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
