"""Picture of a report's page for README and docs/report.md, by a headless Chromium.

    scripts/release.sh picture [PAGE]

makes `docs/images/report-quickstart.png` of the quick start's page. The PNG also has the words of
the page's head, without numbers, so that a test notices a picture of an older page.
"""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "report-quickstart.png"
_WIDTH, _HEIGHT = 1280, 560
_SIGNATURE, _KEYWORD = b"\x89PNG\r\n\x1a\n", b"words"


def words_of_page(page: str) -> str:
    """Return the title, the verdict and the meanings of its numbers, with # for each number."""
    parts = [
        *re.findall("<h1>(.*?)</h1>", page),
        *re.findall('<p id="verdict"[^>]*>(.*?)</p>', page, re.S),
        *re.findall('<th scope="row" colspan="2">(.*?)</th>', page),
    ]
    return re.sub(r"[0-9]+([.,][0-9]+)*( m?s\b)?", "#", html.unescape("\n".join(parts)))


def words_of_picture(png: bytes) -> str:
    """Return the words that the command has put into a picture; "" without any."""
    for kind, content in _chunks(png):
        if kind == b"tEXt" and content.startswith(_KEYWORD + b"\0"):
            return content.partition(b"\0")[2].decode("latin-1")
    return ""


def with_words(png: bytes, words: str) -> bytes:
    """Return a picture with these words before its last chunk, which ends it."""
    content = _KEYWORD + b"\0" + words.encode("latin-1", "replace")
    check = struct.pack(">I", zlib.crc32(b"tEXt" + content))
    chunk = struct.pack(">I", len(content)) + b"tEXt" + content + check
    return png[:-12] + chunk + png[-12:]


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_SIGNATURE)
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def main(words: Sequence[str]) -> int:
    page = Path(words[0] if words else ".quickstart/report.html").resolve()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or not page.is_file():
        missing = f"{page}; run scripts/quickstart.sh" if chromium else "chromium; install it"
        print(f"scripts/release.sh picture: there is no {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--window-size={_WIDTH},{_HEIGHT}", f"--user-data-dir={folder}/profile"),
            *("--virtual-time-budget=5000", f"--screenshot={shot}", page.as_uri()),
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=600)
        text = words_of_page(page.read_text(encoding="utf-8"))
        PICTURE.write_bytes(with_words(shot.read_bytes(), text))
    print(f"{PICTURE}: {_WIDTH} x {_HEIGHT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
