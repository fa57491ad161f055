"""Digest of the C++ sources, by which a native core built from other sources is detected.

The package compares it, and setup.py, which runs this file alone, compiles it into the core.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Return the SHA-256 of names and contents of the C++ files in `folder`, in hexadecimal."""
    whole = hashlib.sha256()
    for file in sorted([*folder.glob("*.cpp"), *folder.glob("*.hpp")]):
        whole.update(f"{file.name} {file.stat().st_size}\n".encode())
        whole.update(file.read_bytes())
    return whole.hexdigest()
