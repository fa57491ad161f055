"""Checks of files and folders that users name, before they are used.

All code that reads a file named by a user goes through `open_input`. `writing` writes files.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

# Maximum bytes of files that people write by hand, and of lists that describe other files.
MAX_TEXT_BYTES = 2**20

# Maximum bytes of a line written by machines.
MAX_LINE = 2**25


def check_regular(path: Path) -> None:
    """Refuse a path that is no regular file, such as a pipe or a device, which may never end."""
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
    check_regular(path)
    # Non-blocking, in case a pipe has taken the file's place since.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{quoted(path)} is no regular file; give a regular file")
    try:
        file.peek(1)
    except OSError as error:  # raised here, where the name is known
        file.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return file


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, such as a read's."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_bytes(path: Path, max_bytes: int) -> bytes:
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b""
        if size <= max_bytes:
            content = file.read(size + 1) or b""  # None where it has none yet, as /proc/kmsg
            if len(content) > size:  # it has grown, or its file system reports no sizes, as /proc
                content += file.read(max_bytes + 1 - len(content)) or b""
                size = len(content)
    if size > max_bytes:
        raise ValueError(f"{quoted(path)} has {size:,} bytes; at most {max_bytes:,} are expected")
    return content


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a whole regular file of limited size as UTF-8, without its byte-order mark."""
    content = read_bytes(path, max_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{quoted(path)} is not UTF-8 text: {error.reason}") from error


def lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise ValueError(f"{path}, line {number}: longer than {MAX_LINE:,} characters")
        yield line


def quoted(text: object, longest: int = 200) -> str:
    """Quote user input for a message: one line, escaped, of limited length."""
    shown = _shortened(str(text), longest)
    return ascii(shown) if not shown.isprintable() else repr(shown)


def one_line(text: object, longest: int = 2000) -> str:
    """Return a possibly foreign text on one line, with control characters escaped."""
    shown = _shortened(str(text), longest)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def numbered(problems: Sequence[str]) -> str:
    """Join problems into one text, with numbers if there are several."""
    if len(problems) == 1:
        return problems[0]
    return " ".join(f"({number}) {text}." for number, text in enumerate(problems, start=1))


def shell_words(words: Iterable[str]) -> str:
    """Join words for a shell; words with control characters or raw bytes become bash's $'...'."""
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    letters = (chr(byte) for byte in os.fsencode(word))
    plain = re.compile(r"[\w/.-]", re.ASCII)
    return f"$'{''.join(c if plain.match(c) else f'\\x{ord(c):02x}' for c in letters)}'"


def _shortened(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths mean one file or folder, through links, even if not there yet."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def refuse_overwriting(
    output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], flag: str
) -> None:
    """Refuse an output that is one of the inputs, or lies in a folder that is one."""
    folder = Path(os.path.realpath(output)).parent
    for given in inputs:
        is_inside = os.path.isdir(given) and folder.is_relative_to(os.path.realpath(given))
        if is_inside or is_same_file(output, given):
            raise ValueError(
                f"{flag} {quoted(output)} would write over the input {quoted(given)}; give a path "
                "outside the input"
            )


def refuse_unwritable(output: str | os.PathLike[str], flag: str) -> None:
    """Refuse a file that cannot be written, before the work for it is done."""
    path = Path(output)
    folder = path.absolute().parent
    problem = _why_not_looked_at(output)
    if problem:
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
    """Refuse an output folder that neither exists nor can be created; create nothing."""
    path = Path(folder).absolute()
    problem = _why_not_looked_at(folder)
    if problem is None:
        there = next(part for part in (path, *path.parents) if os.path.lexists(part))
        if not there.is_dir():
            problem = f"{quoted(there)} is no folder"
        else:
            problem = _why_not_writable(there)
    if problem:
        raise ValueError(f"{flag} {quoted(folder)}: {problem}; give a folder that can be written")


def _why_not_looked_at(path: str | os.PathLike[str]) -> str | None:
    """Return why nothing could ever be at a path, such as too long a name."""
    if not str(path):
        return "the path is empty"
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):  # callers have a better message
        return None
    except OSError as error:
        return reason(error)
    return None


def _why_not_writable(folder: Path) -> str | None:
    """Return why no file can be created in a folder; tried, since permissions do not bind root."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"the folder {quoted(folder)} cannot be written to ({error.strerror})"
    return None


def problem_of(flag: str, given: str, error: Exception) -> str:
    """Describe an error of the file that a flag, or `--flag name=`, names, with its path once."""
    between = "" if flag.endswith("=") else " "
    return f"{flag}{between}{quoted(given)}: {reason(error).removeprefix(f'{given}: ')}"


def reason(error: Exception) -> str:
    """Return an error's text, of the system's errors without number and file."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def in_one_line(error: Exception) -> str:
    """Return a command's error with its file; add a remedy for missing modules."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; `python -m megatron_laer doctor` says what is missing"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{quoted(error.filename)}: {reason(error)}"
    return str(error)
