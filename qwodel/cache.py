"""Where qwodel keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from qwodel.untrusted import checked_path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """Return qwodel's cache: ``QWODEL_CACHE``, else ``qwodel`` under ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ValidationError: there is no such home.
    """
    given = os.environ.get("QWODEL_CACHE")
    if given:
        return checked_path(given, "cache (QWODEL_CACHE)")
    return checked_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cache") / "qwodel"
