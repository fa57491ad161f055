"""Files for `prepare-data`, found and put in order, but not opened."""

import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_laer.files.checks import check_regular, quoted


@dataclass
class TextFiles:
    """Files to read, with the number of omitted folder entries by reason."""

    files: list[Path] = field(default_factory=list)
    links: int = 0
    special_files: int = 0

    def left_out(self) -> Iterator[str]:
        if self.links:
            yield (
                f"left out symbolic links inside folders: {self.links}; --follow-links reads what "
                "they lead to"
            )
        if self.special_files:
            yield (
                "left out broken links and what is no regular file, such as pipes: "
                f"{self.special_files}"
            )


def find_files(inputs: Iterable[str | os.PathLike[str]], follow_links: bool = False) -> TextFiles:
    """List the files to read: the given ones, and those in given folders.

    Folders are walked in sorted order, without hidden and empty files. A given link is followed;
    one inside a folder only with `follow_links`, and then no folder is read twice.
    """
    found = TextFiles()
    inputs = as_list(inputs)
    if not inputs:
        raise ValueError("inputs is empty: name at least one text file or directory")
    for given in inputs:
        if not os.fspath(given):
            raise ValueError("an input is '', the empty path; write . for this directory")
        path = Path(given)
        if path.is_dir():
            # Source folders often contain empty files; one that is given by name is a mistake.
            files = [file for file in _walk(path, found, follow_links) if _has_content(file)]
            if not files:
                raise ValueError(
                    f"{quoted(path)} holds no text: no file in it has any content"
                    + "".join(f"; {sentence}" for sentence in found.left_out())
                )
            found.files += files
        elif not path.exists():
            raise ValueError(f"{quoted(path)} does not exist; name a text file or a directory")
        else:
            check_regular(path)
            if path.stat().st_size == 0:
                raise ValueError(f"{quoted(path)} is empty; leave it out, or give a file with text")
            found.files.append(path)
    return found


def default_text_sources() -> list[Path]:
    """List the Python standard library's source files, without tests and empty files."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [
        path
        # Distributions link some of the library's files to other places.
        for path in _walk(root, TextFiles(), follow_links=True, skipped=skipped)
        if path.suffix == ".py" and path.stat().st_size and os.access(path, os.R_OK)
    ]


def as_list(inputs: Iterable[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    return [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)


def _walk(
    root: Path, found: TextFiles, follow_links: bool, skipped: Collection[str] = ()
) -> Iterator[Path]:
    """Yield the regular files below `root` in sorted order, and count the others in `found`."""
    # A link may lead to a folder that contains it.
    seen = {None, _identity(root)}
    for name, folders, files in os.walk(root, onerror=_refuse, followlinks=follow_links):
        folder = Path(name)
        walked = []
        for path in (folder / name for name in sorted(folders)):
            if path.name in skipped or path.name.startswith("."):
                continue
            if path.is_symlink() and not follow_links:
                found.links += 1
            elif (identity := _identity(path)) not in seen:
                seen.add(identity)
                walked.append(path.name)
        folders[:] = walked
        for path in (folder / name for name in sorted(files)):
            if path.name.startswith("."):
                continue
            if path.is_symlink() and not follow_links:
                found.links += 1
            elif path.is_file():
                yield path
            else:
                found.special_files += 1


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return a folder's device and inode; None if it has vanished since it was listed."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # it has vanished since it was listed
        return False


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"the folder {quoted(error.filename)} cannot be listed: {error.strerror}"
    ) from error
