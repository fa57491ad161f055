"""Files for `prepare-data` are found and put in order here, and not opened."""

import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_laer.files.checks import check_regular, quoted


@dataclass
class Sources:
    """Lists the files to read, and counts the entries of folders that were left out, by reason."""

    files: list[Path] = field(default_factory=list)
    links: int = 0
    special_files: int = 0

    def left_out(self) -> Iterator[str]:
        """Yield a sentence for each reason for which something was left out."""
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


def find_sources(inputs: Iterable[str | os.PathLike[str]], follow_links: bool = False) -> Sources:
    """List the files to read: those named, and those in folders named.

    Folders are walked in sorted order, without hidden and empty files. A link that is named itself
    is followed; one inside a folder only with `follow_links`, and then no folder is read twice.

    Raises:
        ValueError: nothing is named, or something named does not exist, cannot be listed, is no
            regular file, or holds no text.
    """
    sources = Sources()
    inputs = as_list(inputs)
    if not inputs:
        raise ValueError("inputs is empty: name at least one text file or directory")
    for given in inputs:
        if not os.fspath(given):
            raise ValueError("an input is '', the empty path; write . for this directory")
        path = Path(given)
        if path.is_dir():
            # A folder of sources holds empty files by custom; named singly, one is a mistake.
            found = [file for file in _walk(path, sources, follow_links) if _has_content(file)]
            if not found:
                raise ValueError(
                    f"{quoted(path)} holds no text: no file in it has any content"
                    + "".join(f"; {sentence}" for sentence in sources.left_out())
                )
            sources.files += found
        elif not path.exists():
            raise ValueError(f"{quoted(path)} does not exist; name a text file or a directory")
        else:
            check_regular(path)
            if path.stat().st_size == 0:
                raise ValueError(f"{quoted(path)} is empty; leave it out, or give a file with text")
            sources.files.append(path)
    return sources


def default_text_sources() -> list[Path]:
    """List the Python standard library's source files: some megabytes of text on every machine.

    Tests, installed packages and empty files are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [
        path
        # Distributions link some of its files to other places.
        for path in _walk(root, Sources(), follow_links=True, skipped=skipped)
        if path.suffix == ".py" and path.stat().st_size and os.access(path, os.R_OK)
    ]


def as_list(inputs: Iterable[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """Return the inputs as a list; a single path, which is easily passed, is a list of one."""
    return [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)


def _walk(
    root: Path, sources: Sources, follow_links: bool, skipped: Collection[str] = ()
) -> Iterator[Path]:
    """Yield the regular files below `root` in sorted order, and count in `sources` what is not."""
    # A link may lead to a folder that is being walked.
    seen = {None, _identity(root)}
    for name, folders, files in os.walk(root, onerror=_refuse, followlinks=follow_links):
        folder = Path(name)
        walked = []
        for path in (folder / name for name in sorted(folders)):
            if path.name in skipped or path.name.startswith("."):
                continue
            if path.is_symlink() and not follow_links:
                sources.links += 1
            elif (identity := _identity(path)) not in seen:
                seen.add(identity)
                walked.append(path.name)
        folders[:] = walked
        for path in (folder / name for name in sorted(files)):
            if path.name.startswith("."):
                continue
            if path.is_symlink() and not follow_links:
                sources.links += 1
            elif path.is_file():
                yield path
            else:
                sources.special_files += 1


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tell a folder from all others; None for one that has gone since it was listed."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # it has gone since it was listed
        return False


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"the folder {quoted(error.filename)} cannot be listed: {error.strerror}"
    ) from error
