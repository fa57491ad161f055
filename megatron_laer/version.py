"""Version of the package, for files that may not import the whole package."""

from __future__ import annotations

__version__ = "0.1.0"
