"""Messages of the package's loggers on a rank, where pytest captures none."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def messages(level: int = logging.NOTSET) -> Iterator[list[str]]:
    """Yield a list to which every message of at least this level is appended."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_laer")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
