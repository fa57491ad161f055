"""Exchanges in steps, so that what waits for an All-to-All may be launched later."""

from __future__ import annotations

from collections.abc import Generator

import torch

# Yields behind each All-to-All, where the next kernel would wait for what arrives, and says
# whether another one follows.
Steps = Generator[bool, None, torch.Tensor]


def finish(steps: Steps) -> torch.Tensor:
    """Run an exchange to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result
