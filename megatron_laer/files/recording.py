"""A recording is a file of records that its one writer only ever appends; `records` has the codec.

A recording is never rewritten in place. Steps that a run repeats are copied to another file, and a
copy of the rest replaces the recording. So a run that is killed at any moment leaves the old
recording or the new one. An incomplete last record is cut off in place. A run that begins at step 0
moves what is there to another file, whichever run wrote it.

The header has the run's number, 16 random digits that a resumed run keeps.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from megatron_laer.files.checks import MAX_TEXT_BYTES, naming, open_input, quoted
from megatron_laer.files.records import Format, Frame, Records
from megatron_laer.files.writing import (
    Replacement,
    free_name,
    open_exclusively,
    write_all,
)

logger = logging.getLogger(__name__)

_QUOTED_BYTES = 300
_COPIED_AT_ONCE_BYTES = 2**20
_RUN_IN_HEADER = re.compile(rb'"run": ?"([0-9a-f]{16})"')
_TORN_IN_RUN = re.compile(rb'"run":"[0-9a-f]{0,15}\Z')


class RecordingFile:
    """Only writer of a recording. On an OSError all records are kept.

    `fields` are the header's. `first_step` is this run's; 0 if it does not resume another. A new
    file gets the number `run`. `step` is the newest started one, or the one before the run's first.

    Raises InUseError if another run writes it, and ValueError for another file or another header.
    """

    def __init__(
        self,
        path: Path,
        format: Format,
        fields: Mapping[str, Any],
        first_step: int,
        run: str | None = None,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.step, self._next = first_step - 1, 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_exclusively(self.path)
        try:
            if first_step == 0:
                self._begin_anew(format)
            run = run_of(self.path) or run or new_run()
            self._records = Records(format, {"run": run, **fields})
            self._check_header()
            last = self._cut_from(first_step)
        except BaseException:
            self.close()
            raise
        if format.has_every_step and last is not None and last < first_step - 1:
            logger.warning(
                "FSEP: %s: nothing is recorded of steps %d to %d, which an earlier run made",
                path,
                last + 1,
                first_step - 1,
            )

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Write a record; that of an earlier step moves its records, and later ones, aside.

        Raises ValueError for values that the format does not have, and OSError.
        """
        if step != self.step:
            self.begin_step(step)
        self._write(self._records.encode(kind, self._next, step, values))
        self._next += 1

    def begin_step(self, step: int) -> None:
        """Start a step; a repeated one moves its records, and later ones, to another file."""
        if step <= self.step:
            self._cut_from(step)
        self.step = step

    def close(self) -> None:
        self._file.close()

    def _write(self, content: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            write_all(self._file, content)
        except OSError as error:
            # A partial record would make later ones unreadable.
            self._file.truncate(end)
            error.filename = str(self.path)
            raise

    def _check_header(self) -> None:
        header = self._records.line
        begin = self._file.read(len(header))
        torn = _TORN_IN_RUN.search(begin)
        if torn and header.startswith(begin[: torn.start()]):
            # It has no records, and its number cannot be known.
            self._file.truncate(0)
            begin = b""
        if not header.startswith(begin):
            raise ValueError(
                f"{self.path} begins with {_first_line(begin)}, this run would write "
                f"{_first_line(header)}; record to another folder, or move the file away"
            )
        # A run that was killed at once leaves a part of its header.
        self._write(header[len(begin) :])

    def _begin_anew(self, format: Format) -> None:
        """Move a recording of this format to another file, and remove one without records."""
        with open_input(self.path) as file:
            header = file.readline(MAX_TEXT_BYTES)
            has_records = bool(file.read(1))
        if not format.magic.startswith(header[: len(format.magic)]):
            return  # another file, which is refused
        if not has_records:
            self._file.truncate(0)
            return
        aside = self._aside(0)
        os.rename(self.path, aside)
        self._file.close()
        self._file = open_exclusively(self.path)
        self._say_moved(0, aside)

    def _places(self) -> Iterator[Frame]:
        with open_input(self.path) as file:
            yield from self._records.places(file, self.path)

    def _cut_from(self, step: int) -> int | None:
        """Move records from a step on to another file, and cut off an incomplete one.

        Return the last step that stays, if any.
        """
        stays = end = len(self._records.line)
        last, following = None, 1
        for place in self._places():
            end = place.end
            if place.step < step:
                last, stays, following = place.step, end, place.number + 1
        with naming(self.path):
            incomplete = self._file.seek(0, os.SEEK_END) - end
            if incomplete:
                self._file.truncate(end)
                logger.warning(
                    "FSEP: %s: its last %d bytes are no whole record and are left out",
                    self.path,
                    incomplete,
                )
            if stays < end:
                self._move_aside(stays, end, step)
        self._next = following  # after all that an error may end, which keeps all records
        return last

    def _move_aside(self, begin: int, end: int, step: int) -> None:
        aside = self._aside(step)
        with ExitStack() as undo:
            tail = Replacement(aside)
            undo.callback(tail.discard)
            head = Replacement(self.path)
            undo.callback(head.discard)
            write_all(tail.file, self._records.line)
            self._copy(begin, end, tail.file)
            self._copy(0, begin, head.file)
            tail.commit()
            head.commit()
            undo.pop_all()
        tail.file.close()
        self._file.close()
        self._file = head.file
        self._say_moved(step, aside)

    def _aside(self, step: int) -> Path:
        return free_name(self.path.with_stem(f"{self.path.stem}.cut-from-{step}"))

    def _say_moved(self, step: int, to: Path) -> None:
        text = "FSEP: %s: what was recorded from step %d on has been moved to %s"
        logger.warning(text, self.path, step, to.name)

    def _copy(self, begin: int, end: int, target: BinaryIO) -> None:
        self._file.seek(begin)
        while begin < end:
            content = self._file.read(min(_COPIED_AT_ONCE_BYTES, end - begin))
            if not content:
                raise OSError(f"{self.path} ends at byte {begin}, expected {end}")
            write_all(target, content)
            begin += len(content)


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


def _first_line(content: bytes) -> str:
    line = content[:_QUOTED_BYTES].split(b"\n", 1)[0]
    return quoted(line.decode(errors="backslashreplace"), _QUOTED_BYTES)
