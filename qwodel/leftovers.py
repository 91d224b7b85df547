"""Staging directories: how one is made and marked, and what the next run does with those of killed processes.

A staging directory is ``.qwodel-<12 hexadecimal digits>`` and holds a file ``lock`` with its own name in it,
locked for as long as the process lives. Only a directory with such a name, such a mark and a free lock is
taken for ours; nothing else is ever removed, whatever it is called.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from qwodel.hashes import describes, manifest_beside

__all__ = ["LOCK", "SCRATCH", "finish", "make_staging", "remove_abandoned"]

LOCK, SCRATCH = "lock", "scratch"
_NAME = re.compile(r"\.qwodel-[0-9a-f]{12}")
_ABANDONED_SECONDS = 60.0


def make_staging(folder: Path) -> tuple[Path, int]:
    """Make a marked staging directory in ``folder``; return it and the descriptor that holds its lock.

    Raises:
        OSError: the folder cannot be written.
    """
    staging = folder / f".qwodel-{secrets.token_hex(6)}"
    staging.mkdir()
    lock = os.open(staging / LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # The mark comes after the lock, so that what is marked and unlocked has no process.
    os.write(lock, _mark(staging))
    (staging / SCRATCH).mkdir()
    return staging, lock


def remove_abandoned(folder: Path) -> None:
    """Remove staging directories whose processes are gone, after finishing a publication that was cut in two."""
    for staging in sorted(folder.glob(".qwodel-*")):
        if not _NAME.fullmatch(staging.name) or staging.is_symlink() or not staging.is_dir():
            continue
        with contextlib.suppress(OSError), _taken(staging) as ours:
            if ours:
                finish(staging, folder)
                shutil.rmtree(staging, ignore_errors=True)
            else:
                _remove_unmarked(staging)


def _mark(staging: Path) -> bytes:
    return f"qwodel staging {staging.name}\n".encode()


@contextlib.contextmanager
def _taken(staging: Path) -> Iterator[bool]:
    """Hold the lock of a directory that is marked as ours; yield whether it is.

    Raises:
        OSError: its process lives.
    """
    try:
        lock = os.open(staging / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.read(lock, 200) == _mark(staging)
    finally:
        os.close(lock)


def _remove_unmarked(staging: Path) -> None:
    """Remove what a process leaves that dies before it has marked its directory: nothing, or an empty lock."""
    if time.time() - staging.stat().st_mtime < _ABANDONED_SECONDS:
        return
    lock = staging / LOCK
    if {child.name for child in staging.iterdir()} == {LOCK} and not lock.lstat().st_size:
        lock.unlink()
    staging.rmdir()  # fails, and rightly, where anything is in it


def finish(staging: Path, folder: Path) -> None:
    """Undo or complete a publication of which only half was done.

    A single file is published in two renames, manifest first: a manifest in its place that has the hash of
    the file still here says that the second is missing. It is made where an older file would else lie beside
    the wrong manifest; where there is none, the manifest goes. Without an exchange in one step a directory in
    the way is first put aside: then nothing is in its place.
    """
    for child in sorted(staging.iterdir()):
        final = folder / child.name.removesuffix(".replaced")
        if child.name in (LOCK, SCRATCH) or child.is_symlink():
            continue
        if child.is_file():
            manifest = manifest_beside(final)
            if not describes(manifest, child):
                continue
            if not os.path.lexists(final):
                manifest.unlink()
            elif final.is_file() and not describes(manifest, final):
                child.replace(final)
        elif child.name.endswith(".replaced") and not os.path.lexists(final):
            whole = staging / final.name
            (whole if whole.is_dir() else child).rename(final)
