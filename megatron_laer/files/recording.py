"""A recording is a file with a header and records that its one writer only ever appends.

Writers of formats know where each record ends; nothing here knows their content. A recording is
never rewritten in place. Steps that a run repeats are copied to another file, and a copy of the
rest replaces the recording. So a run that is killed at any moment leaves the old recording or the
new one. An incomplete last record is cut off in place.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_laer.files import run_mark
from megatron_laer.files.checks import quoted
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


class RecordingFile:
    """Only writer of a recording. On an OSError all records are kept.

    `header` is the file's first bytes, and `records` yields each whole record's step and end
    offset. `first_step` is this run's; 0 if it does not resume another. `last` is the last step of
    earlier runs that stays, if any, and `step` the newest started one, or the one before the run's
    first.

    Raises InUseError if another run writes it, and ValueError for another file, another header, or
    another run's records at step 0 (see `run_mark`).
    """

    def __init__(
        self,
        path: Path,
        header: bytes,
        records: Callable[[Path], Iterable[tuple[int, int]]],
        first_step: int,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.last: int | None = None
        self.step = first_step - 1
        self._header, self._records = header, records
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_exclusively(self.path)
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
        last, is_cut = None, False
        for at, end in self._records(self.path):
            is_cut = is_cut or at >= step
            if not is_cut:
                last, stays = at, end
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
