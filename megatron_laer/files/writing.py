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
import re
import secrets
import stat
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

from megatron_laer.files.checks import check_regular, quoted, reason

logger = logging.getLogger(__name__)

# Errors of file systems without locks (Lustre without `-o flock`, some network mounts).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC


class InUseError(ValueError):
    """Error of a second writer of a file."""


# Files that this process has locked, for `_unlock_in_child`.
_locked: weakref.WeakSet[IO[bytes] | IO[str]] = weakref.WeakSet()


def lock(file: IO[bytes] | IO[str], path: Path, how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file, until it is closed or the process ends.

    Warn and return False if its file system has no locks. Forked children, such as a data loader's
    workers, do not hold the lock.
    """
    _locked.add(file)  # first, since another thread may fork at any time
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
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
        return False
    return True


def _unlock_in_child() -> None:
    """Drop the parent's locks, so that a child that outlives it keeps none."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for file in _locked:
        if not file.closed:
            os.dup2(null, file.fileno(), inheritable=False)
    os.close(null)


os.register_at_fork(after_in_child=_unlock_in_child)


def open_exclusively(path: Path) -> BinaryIO:
    """Open a file unbuffered for reading and writing, as its only writer; create it if missing.

    A link is refused, since others may have put it there.
    """
    while True:
        if path.exists():
            check_regular(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
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
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


class Replacement:
    """File under a new, random name, which replaces its target when it is complete.

    It is locked, so that a target has one writer, and the next one removes the leftover of a killed
    one. `file` is unbuffered; `path` opens the same file once more. After `commit`, until it is
    closed, it is the target's only writer. A target's mode is kept.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._is_pending = True
        while not self._open():
            pass
        # Not by its name, where others may put a link.
        self.path = Path(f"/proc/self/fd/{self.file.fileno()}")

    def _open(self) -> bool:
        """Open a new file; return False if another writer has taken it for a leftover."""
        name = f".{self._target.name}.{secrets.token_hex(8)}.megatron_laer.tmp"
        self._name = self._target.with_name(name)
        mode = None
        with suppress(OSError):  # no target
            mode = os.stat(self._target).st_mode & 0o777
        # New and no link, since others may write in the folder; private until it has its mode.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK
        descriptor = os.open(self._name, flags, 0o666 if mode is None else 0o600)
        self.file = cast(BinaryIO, os.fdopen(descriptor, "r+b", buffering=0))
        try:
            if mode is not None:
                with suppress(OSError):  # a file system without modes
                    os.fchmod(descriptor, mode)
            has_locks = lock(self.file, self._name)
            is_there = _is_at(self.file, self._name)
            if is_there and has_locks:  # without locks, a living writer's looks like a leftover
                self._remove_leftovers()
        except BaseException:
            self.discard()
            raise
        if not is_there:
            self.file.close()
        return is_there

    def _remove_leftovers(self) -> None:
        """Remove this user's leftovers; raise InUseError if another writer is at work.

        It comes after the own lock, so that of two writers at once the later one sees the other.
        """
        owner = os.fstat(self.file.fileno()).st_uid
        begin = re.escape(f".{self._target.name}.")
        pattern = re.compile(rf"{begin}[0-9a-f]{{16}}\.megatron_laer\.tmp")
        for name in os.listdir(self._target.parent):
            path = self._target.with_name(name)
            if pattern.fullmatch(name) and path != self._name:
                _remove_leftover(path, owner)

    def commit(self) -> None:
        """Sync the content and replace the target; stay open."""
        # This also covers content that was written through `path`.
        os.fsync(self.file.fileno())
        os.replace(self._name, self._target)
        self._is_pending = False
        sync_folder(self._target.parent)

    def discard(self) -> None:
        """Close the file, and remove it if it has not replaced its target."""
        if self._is_pending:
            self._name.unlink(missing_ok=True)
        self.file.close()


def _remove_leftover(path: Path, owner: int) -> None:
    """Remove a killed writer's file if it is the owner's; raise InUseError for a living one's.

    Others' are left, as are links, folders and pipes, which no writer has made.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK), "rb")
    except OSError:  # gone by now, or not for us to read
        return
    with file:
        # Shared, since network file systems lock exclusively only what is open for writing.
        lock(file, path, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_uid == owner:
            with suppress(OSError):
                path.unlink()  # before it is closed, so that its writer, if just begun, sees it


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
