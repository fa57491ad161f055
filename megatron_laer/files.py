"""How the package opens files that somebody else made, and writes files that somebody else needs.

Knows no format. Everything that reads a file named by a user goes through `open_input` or
`read_text`; everything that writes one goes through `Replacement` or `open_exclusively`, so that
no file is half written, no file has two writers, and no output replaces the input it was made of.
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
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

logger = logging.getLogger(__name__)

# Of files that people write by hand, and of lists that describe other files.
MAX_TEXT_BYTES = 2**20

# Of files that machines write, line by line: the longest are the routing of some million tokens.
MAX_LINE = 2**25

# Where a file system has no locks (Lustre without `-o flock`, some network mounts).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_regular(path: Path) -> None:
    """Refuse a path that is not a regular file, such as a pipe or a device, which may never end.

    Raises:
        ValueError: something else is there.
        OSError: nothing is there, or it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
        raise ValueError(f"{quoted(path)} is {kind}; give a regular file")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_input(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        ValueError: it is no regular file.
        OSError: it cannot be opened.
    """
    check_regular(path)
    # Without waiting, should a pipe have taken the file's place since.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{quoted(path)} is no regular file; give a regular file")
    return file


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a whole regular file of limited size.

    Raises:
        ValueError: it is no regular file, or larger than `max_bytes`.
        OSError: it cannot be read.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b""
        if size <= max_bytes:
            content = file.read(size + 1)
            if len(content) > size:  # it has grown, or its file system tells no sizes, as /proc
                content += file.read(max_bytes + 1 - len(content))
                size = len(content)
    if size > max_bytes:
        raise ValueError(f"{quoted(path)} has {size:,} bytes; at most {max_bytes:,} are expected")
    return content


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a whole regular file of limited size as UTF-8, a byte-order mark left out.

    Raises:
        ValueError: it is no regular file, larger than `max_bytes`, or not UTF-8.
        OSError: it cannot be read.
    """
    content = read_bytes(path, max_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{quoted(path)} is not UTF-8 text: {error.reason}") from error


def lines[T: (str, bytes)](file: IO[T], path: Path) -> Iterator[T]:
    """Yield the lines of an open file, with their ends.

    Raises:
        ValueError: a line that is longer than `MAX_LINE`, as where a file holds no lines.
        OSError: the file cannot be read.
    """
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise ValueError(f"{path}, line {number}: longer than {MAX_LINE:,} characters")
        yield line


def quoted(text: object, longest: int = 200) -> str:
    """Quote what a user passed, on one line, escaped and of limited length, for a message."""
    shown = _shortened(str(text), longest)
    return ascii(shown) if not shown.isprintable() else repr(shown)


def one_line(text: object, longest: int = 2000) -> str:
    """Show a text that somebody else may have written, on one line of limited length.

    Control characters, which could move a terminal's cursor, are escaped; quotes are not added.
    """
    shown = _shortened(str(text), longest)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def _shortened(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths mean one file or folder: through links of either kind, or not there yet."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def refuse_overwriting(
    output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], flag: str
) -> None:
    """Refuse an output that is one of the inputs, or lies in a folder that is one.

    Args:
        flag: which names the output, for the message.

    Raises:
        ValueError: naming both paths.
    """
    folder = Path(os.path.realpath(output)).parent
    for given in inputs:
        is_inside = os.path.isdir(given) and folder.is_relative_to(os.path.realpath(given))
        if is_inside or is_same_file(output, given):
            raise ValueError(
                f"{flag} {quoted(output)} would write over the input {quoted(given)}; give a path "
                "outside the input"
            )


def refuse_unwritable(output: str | os.PathLike[str], flag: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Raises:
        ValueError: it is a folder or a device, its folder does not exist or takes no file.
    """
    path = Path(output)
    folder = path.absolute().parent
    problem = _why_not_looked_at(path)
    if not str(output):
        problem = "the path is empty"
    elif problem:
        pass
    elif path.exists() and not path.is_file():
        problem = "it is there and no regular file"
    elif not folder.is_dir():
        problem = f"the folder {quoted(folder)} does not exist"
    else:
        problem = _why_not_writable(folder)
    if problem:
        raise ValueError(f"{flag} {quoted(output)}: {problem}; give a file in a writable folder")


def refuse_unusable_folder(folder: str | os.PathLike[str], flag: str) -> None:
    """Refuse a folder for output that neither is there nor can be made, and make nothing.

    Raises:
        ValueError: the path is empty, leads through a file, or to a folder that takes no file.
    """
    path = Path(folder).absolute()
    problem = _why_not_looked_at(path)
    if not str(folder):
        problem = "the path is empty"
    elif problem is None:
        there = next(part for part in (path, *path.parents) if os.path.lexists(part))
        if not there.is_dir():
            problem = f"{quoted(there)} is no folder"
        else:
            problem = _why_not_writable(there)
    if problem:
        raise ValueError(f"{flag} {quoted(folder)}: {problem}; give a folder that can be written")


def _why_not_looked_at(path: Path) -> str | None:
    """The reason why nothing could ever be at a path, such as too long a name."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):  # told better by whoever asks
        return None
    except OSError as error:
        return str(error.strerror)
    return None


def _why_not_writable(folder: Path) -> str | None:
    """The reason why no file can be made in a folder; tried, since root may do what is not done."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"the folder {quoted(folder)} cannot be written to ({error.strerror})"
    return None


class InUseError(ValueError):
    """A file has a writer already."""


# What this process has locked, for `_unlock_in_child`.
_locked: weakref.WeakSet[IO[bytes] | IO[str]] = weakref.WeakSet()


def lock(file: IO[bytes] | IO[str], path: Path) -> None:
    """Make this open file its only writer, until it is closed or the process ends.

    Children that the process forks, such as a data loader's workers, do not hold the lock. On a
    file system without locks it says so in a warning and goes on.

    Raises:
        InUseError: another process, or another open file of this one, is its writer.
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
    """Let go of what the parent has locked, so that a child that outlives it keeps no lock."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for file in _locked:
        if not file.closed:
            os.dup2(null, file.fileno(), inheritable=False)
    os.close(null)


os.register_at_fork(after_in_child=_unlock_in_child)


def open_exclusively(path: Path) -> BinaryIO:
    """Open a file for reading and writing, made if it is missing, as its only writer. Unbuffered.

    Raises:
        InUseError: it has another writer.
        ValueError: it is no regular file.
        OSError: it cannot be opened.
    """
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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock during the block; it is made for that, and removed at the end.

    Raises:
        InUseError: another run holds it.
        ValueError: it is no regular file.
        OSError: it cannot be made.
    """
    with open_exclusively(path):
        try:
            yield
        finally:
            # Before it is closed: who has opened it meanwhile then sees that it has gone.
            path.unlink(missing_ok=True)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


class Replacement:
    """A file under a temporary name beside its target, which it replaces when it is complete.

    The temporary file is locked while it is written, so that what a killed run left can be told
    from what a living one writes: making a replacement removes what was left for the same target.
    The name that `path` gives may also be written through another open file.

    Attributes:
        path: of the temporary file.
        file: open for reading and writing, unbuffered, and the only writer of the target afterwards
            until it is closed.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        remove_leftovers(target)
        self.path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        self.file: BinaryIO = cast(BinaryIO, self.path.open("x+b", buffering=0))
        try:
            lock(self.file, self.path)
        except BaseException:
            self.discard()
            raise

    def commit(self, target: Path | None = None) -> None:
        """Put the content on disk, then the file in its target's place; leaves it open.

        Args:
            target: another file of the same folder to replace.
        """
        # Also what came through another open file of the same name.
        os.fsync(self.file.fileno())
        os.replace(self.path, target or self._target)
        sync_folder(self._target.parent)

    def discard(self) -> None:
        """Close and remove the temporary file; does nothing to the target."""
        self.file.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def replaced_when_complete(target: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the target's place if the block ends well, and is removed if not."""
    replacement = Replacement(target)
    try:
        yield replacement.file
        replacement.commit()
    except BaseException:
        replacement.discard()
        raise
    replacement.file.close()


def remove_leftovers(target: Path) -> None:
    """Remove temporary files for `target` whose run has ended; those that are locked stay."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    if not target.parent.is_dir():
        return
    for path in target.parent.iterdir():
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        try:
            # For writing, since network file systems lock nothing else exclusively.
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError as error:  # it has a writer, has gone, is another user's, or has no locks
            logger.debug("left %s: %s", path, error)


def free_name(path: Path) -> Path:
    """The path, or the first of PATH.2, PATH.3 and so on, before its suffix, that nothing has."""
    names = itertools.chain(
        (path,), (path.with_stem(f"{path.stem}.{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not os.path.lexists(name))


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def sync_folder(folder: Path) -> None:
    """Put a folder's list of files on disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
