"""How our own Python children are started: without the present folder on their module path.

``python -m`` and ``python -c`` put the present folder before the standard library. In a folder of somebody
else's files, ``cd MODEL && qwodel quantize .``, an ``import json`` would then run ``MODEL/json.py``. So children
get ``-P`` (https://docs.python.org/3/using/cmdline.html#cmdoption-P), and ``PYTHONSAFEPATH`` for theirs.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["child_environment", "forget_present_folder", "module_command", "safe_spawning"]

_PACKAGES = str(Path(__file__).resolve().parents[1])
_SAFE_PATH = "PYTHONSAFEPATH"
_lock = threading.Lock()
_spawning = 0


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``module`` in a child; start it with :func:`child_environment`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a Python child: ours, a safe module path, and ``extra``.

    What has been added to ``sys.path`` here is found there too, and so is this package. The present folder
    is only where the user's own ``PYTHONPATH`` names it.
    """
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    stated = {os.path.realpath(entry) for entry in named if entry}
    kept = [
        entry
        for entry in sys.path
        if entry and (os.path.realpath(entry) in stated or not _is_present_folder(entry))
    ]
    path = os.pathsep.join(dict.fromkeys([*kept, _PACKAGES]))
    return {**os.environ, "PYTHONPATH": path, _SAFE_PATH: "1", **(extra or {})}


@contextmanager
def safe_spawning() -> Iterator[None]:
    """Have :mod:`multiprocessing` start its children without the present folder, while this lasts.

    It starts them, and its tracker of resources with the first pool, by ``python -c`` and with this
    environment: the variable stands in it for the moment of starting, and is taken away by the last thread that needs it.
    """
    global _spawning
    with _lock:
        stated = not _spawning and bool(os.environ.get(_SAFE_PATH))
        if not stated:
            _spawning += 1
            os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        with _lock:
            if not stated:
                _spawning -= 1
            if not stated and not _spawning:
                os.environ.pop(_SAFE_PATH, None)


def forget_present_folder() -> None:
    """Take the present folder off this process's module path, where ``python -m`` has put it there.

    For the command line alone: a library leaves its user's path as it is.
    """
    if not sys.flags.safe_path and sys.path and _is_present_folder(sys.path[0]):
        del sys.path[0]
    os.environ[_SAFE_PATH] = "1"


def _is_present_folder(entry: str) -> bool:
    """Whether this is the present folder, and not the one this package comes from."""
    here = os.path.realpath(entry) == os.path.realpath(os.curdir)
    return here and os.path.realpath(entry) != _PACKAGES
