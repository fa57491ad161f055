"""Files are written whole, by one writer, and never over one another.

Use `open_exclusively` for a file that is kept open, and `write_file` to write one at once. Use
`Replacement` if the content comes bit by bit.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

from megatron_laer.files.checks import check_regular, quoted, reason

logger = logging.getLogger(__name__)

# Errors of file systems without locks (Lustre without `-o flock`, some network mounts).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUseError(ValueError):
    """Error of a second writer of a file."""


# Files that this process has locked, for `_unlock_in_child`.
_locked: weakref.WeakSet[IO[bytes] | IO[str]] = weakref.WeakSet()


def lock(file: IO[bytes] | IO[str], path: Path) -> None:
    """Lock an open file, until it is closed or the process ends; warn if its file system cannot.

    Forked children, such as a data loader's workers, do not hold the lock.
    """
    _locked.add(file)  # first, since another thread may fork at any time
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InUseError(
            f"{quoted(path)} is being written by another run; wait until that has ended, or give "
            "another folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: its file system has no locks, so two runs that write it are not noticed", path
        )


def _unlock_in_child() -> None:
    """Drop the parent's locks, so that a child that outlives it keeps none."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for file in _locked:
        if not file.closed:
            os.dup2(null, file.fileno(), inheritable=False)
    os.close(null)


os.register_at_fork(after_in_child=_unlock_in_child)


def open_exclusively(path: Path) -> BinaryIO:
    """Open a file unbuffered for reading and writing, as its only writer; create it if missing."""
    while True:
        if path.exists():
            check_regular(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        file = cast(BinaryIO, os.fdopen(descriptor, "r+b", buffering=0))
        try:
            lock(file, path)
            if _is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        # Its former writer has replaced it between our opening and its lock.
        file.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


class Replacement:
    """File under a temporary name, which replaces its target when it is complete.

    It is locked, so that a target has one writer, and the next one takes over the leftover of a
    killed one. `path` may also be written through another open file. `file` is unbuffered. After
    `commit`, until it is closed, it is the target's only writer. A target's mode is kept.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._is_pending = True
        self.path = target.with_name(f".{target.name}.megatron_laer.tmp")
        self.file = open_exclusively(self.path)
        self.file.truncate(0)
        with suppress(OSError):  # no target, or a file system without modes
            os.fchmod(self.file.fileno(), os.stat(target).st_mode & 0o777)

    def commit(self) -> None:
        """Sync the content and replace the target; stay open."""
        # This also covers content from another open file of the same name.
        os.fsync(self.file.fileno())
        os.replace(self.path, self._target)
        self._is_pending = False
        sync_folder(self._target.parent)

    def discard(self) -> None:
        """Close the file, and remove it if it has not replaced its target."""
        if self._is_pending:
            self.path.unlink(missing_ok=True)
        self.file.close()


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, text in UTF-8; links to it stay."""
    new = Replacement(Path(os.path.realpath(path)))
    try:
        write_all(new.file, content.encode() if isinstance(content, str) else content)
        new.commit()
    except BaseException:
        new.discard()
        raise
    new.file.close()


def write_output(path: Path, content: str | bytes, flag: str) -> None:
    try:
        write_file(path, content)
    except OSError as error:
        raise ValueError(f"{flag} {quoted(path)} cannot be written: {reason(error)}") from error


def free_name(path: Path) -> Path:
    """Return `path`, or the first of PATH.2, PATH.3, … (before the suffix) that does not exist."""
    names = itertools.chain(
        (path,), (path.with_stem(f"{path.stem}.{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not os.path.lexists(name))


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write to an unbuffered file, which may accept a part at a time."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def sync_folder(folder: Path) -> None:
    """Put a folder's list of files on disk, if its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
