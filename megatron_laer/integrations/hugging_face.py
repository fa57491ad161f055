"""Offline mode of Hugging Face's library, so that it fails fast without a network."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

_OFFLINE = "HF_HUB_OFFLINE"
_PATIENCE_S = 5.0


def go_offline_if_unreachable() -> bool:
    """Restrict Hugging Face's library to its cache if its server cannot be reached.

    Return whether it is restricted. It would otherwise retry for minutes. Must be called before
    that library is imported.
    """
    if find_spec("huggingface_hub") is None:
        return False
    if given := os.environ.get(_OFFLINE):
        return given.lower() in ("1", "on", "yes", "true")
    # Behind a proxy the server need not be reachable from here.
    if getproxies() or _is_reachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        return False
    os.environ[_OFFLINE] = "1"
    return True


def _is_reachable(address: str) -> bool:
    reached: list[bool] = []

    def connect() -> None:
        try:
            server = urlsplit(address)
            port = server.port or (80 if server.scheme == "http" else 443)
            socket.create_connection((server.hostname or "", port), _PATIENCE_S).close()
        except (OSError, ValueError):
            return
        reached.append(True)

    # In a thread, since an unresponsive name server would block the call for longer.
    attempt = Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_PATIENCE_S)
    return bool(reached)
