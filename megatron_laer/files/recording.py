"""A recording is a file with a header and records that its one writer only ever appends.

It knows neither what records hold nor how they are read; their writers say where each one ends. A
recording is never rewritten in place. Where steps must go, since a run makes them again, they are
copied to a file beside, and a copy of what stays takes the recording's place: a run that is killed
at any moment leaves the recording as it was, or as it is to be. Only what is no whole record, as a
run leaves it that is killed while it writes, is cut off where it is. One in an older version of its
format is never added to, but set aside.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
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
_OLDER = "older-version"
_ASIDE = re.compile(rf".+\.(cut-from-\d+|{_OLDER})(\.\d+)?\.[^.]+")


class RecordingFile:
    """Writes a recording, as its only writer.

    Args:
        path: the file, made with its folders if it is missing.
        header: its first bytes.
        older: its first bytes as an older version of the format had them, if there was one.

    Attributes:
        path: where it really lies, if `path` is a link.
        header: that it has.

    Raises:
        InUseError: another run writes it.
        ValueError: the path is no regular file, or one with another header.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, header: bytes, older: bytes | None = None) -> None:
        self.path = Path(os.path.realpath(path))
        self.header = self._newest = header
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_exclusively(self.path)
        try:
            remove_leftovers(self.path)
            if older is not None and self._file.read(len(older)) == older:
                self.header = older
                return
            self._file.seek(0)
            begin = self._file.read(len(header))
            if not header.startswith(begin):
                raise ValueError(
                    f"{self.path} begins with {self._first_line(begin)}, this run would write "
                    f"{self._first_line(header)}; record to another folder, or move the file away"
                )
            # A run that was killed at once leaves a part of its header.
            self.append(header[len(begin) :])
        except BaseException:
            self.close()
            raise

    def append(self, record: bytes) -> None:
        """Write at the end, at once.

        Raises:
            OSError: it cannot be written; the file then ends with the record before.
        """
        with _naming(self.path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                write_all(self._file, record)
            except OSError:
                # A part of a record would make what follows it unreadable.
                self._file.truncate(end)
                raise

    def go_on(self, first_step: int, records: Iterable[tuple[int, int]]) -> int | None:
        """Continue an earlier run's recording from a step on; step 0 begins a run, or restarts it.

        Args:
            records: the step of every whole record and the offset where it ends, in order.

        Returns:
            The last step that stays, if any.

        Raises:
            ValueError: a run begins, and another one's records are there; see `run_mark`.
            OSError: as for `cut_from`.
        """
        is_restart = first_step > 0 or run_mark.is_of_this_run(self.path)
        if not is_restart and any(True for _ in records):
            raise ValueError(
                f"{self.path} holds the steps of an earlier run, and this run begins at step 0; "
                "give an empty folder, or resume the run that wrote it from a checkpoint"
            )
        run_mark.mark(self.path)
        return self.cut_from(first_step, records)

    def cut_from(self, step: int, records: Iterable[tuple[int, int]]) -> int | None:
        """Move the records from a step on to a file beside; leave out what is no whole record.

        Args:
            records: as for `go_on`.

        Returns:
            The last step that stays, if any.

        Raises:
            OSError: the disk is full, say; every record is then where it was.
        """
        stays = end = len(self.header)
        last, is_cut = None, False
        for at, end in records:
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

    def renew(self) -> None:
        """Begin anew where this is a recording of an older version, which is set aside whole.

        Raises:
            OSError: the file cannot be renamed or made.
        """
        if self.header == self._newest:
            return
        beside = free_name(self.path.with_stem(f"{self.path.stem}.{_OLDER}"))
        with self._file:
            os.replace(self.path, beside)
        self._file = open_exclusively(self.path)
        self.header = self._newest
        self.append(self.header)
        logger.warning(
            "FSEP: %s: what was recorded in an older version of the format has been moved to %s",
            self.path,
            beside.name,
        )

    def close(self) -> None:
        """Close the file, which another run may then write."""
        self._file.close()

    def _move_aside(self, begin: int, end: int, step: int) -> None:
        with ExitStack() as undo:
            tail = Replacement(self.path)
            undo.callback(tail.discard)
            head = Replacement(self.path)
            undo.callback(head.discard)
            write_all(tail.file, self.header)
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
    """Return whether a file was set aside, by its name: its steps came again, or are old."""
    return _ASIDE.fullmatch(path.name) is not None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in an error that does not, as those of a write."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
