"""Where qwodel keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """Return qwodel's cache: ``QWODEL_CACHE``, else ``qwodel`` under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("QWODEL_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qwodel"
