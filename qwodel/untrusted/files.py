"""Paths and regular files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

from qwodel.display import shown
from qwodel.exceptions import QuantizationError, ValidationError

__all__ = ["MAX_FILE", "brief", "checked_path", "kind_of", "open_regular", "read_regular"]

MAX_FILE = 100_000_000
"""Bytes of a file that is read whole, where the caller sets no other limit."""

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_Error = type[QuantizationError]


def checked_path(
    given: str | os.PathLike[str], what: str = "path", *, error: _Error = ValidationError
) -> Path:
    """Return a path as users write it, with ``~`` and ``~user`` expanded.

    Args:
        given: what the user wrote.
        what: its name in errors.
        error: what to raise.

    Raises:
        ValidationError: (or ``error``) there is no such user, it holds a null character, or it is longer than
            paths can be.
    """
    try:
        path = Path(given)
        expanded = path.expanduser()
    except (TypeError, ValueError) as cause:
        raise error(f"the {what} {brief(given)} is no usable path: {cause}") from cause
    except RuntimeError as cause:
        raise error(
            f"the {what} {brief(given)} begins with the home of a user who is not known here",
            hint=f"write the whole path, or ./{brief(given)} for a folder of that name",
        ) from cause
    try:
        os.lstat(expanded)
    except ValueError as cause:
        raise error(f"the {what} {brief(given)} is no usable path: {cause}") from cause
    except OSError as cause:
        if cause.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            raise error(f"the {what} {brief(given)} is no usable path: {cause.strerror}") from cause
        # Whoever opens it says what else is in the way.
    return expanded


def kind_of(path: Path, *, error: _Error = ValidationError) -> Literal["file", "directory"] | None:
    """Return what is at ``path``, ``None`` where there is nothing.

    Raises:
        ValidationError: (or ``error``) neither a file nor a directory is there (a pipe, a device), or it
            cannot be told: a name that is too long, a loop of links, a folder that may not be entered.
    """
    try:
        mode = path.stat().st_mode
    except OSError as cause:
        if cause.errno in _ABSENT:
            return None
        raise _unreadable(path, cause, error) from cause
    except ValueError as cause:
        raise error(f"{brief(path)} is no usable path: {cause}") from cause
    if stat.S_ISDIR(mode):
        return "directory"
    _require_regular(path, mode, error)
    return "file"


def open_regular(path: str | os.PathLike[str], *, error: _Error = ValidationError) -> BinaryIO:
    """Open a regular file for reading; never waits, as opening a pipe would.

    Raises:
        ValidationError: (or ``error``) it is missing, not a regular file, or cannot be opened.
    """
    path = checked_path(path, error=error)
    descriptor = -1
    try:
        # Before and after: opening a device may act on it, and what a name means may change in between.
        _require_regular(path, path.stat().st_mode, error)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        _require_regular(path, os.fstat(descriptor).st_mode, error)
        return os.fdopen(descriptor, "rb")
    except BaseException as cause:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(cause, OSError):
            raise _unreadable(path, cause, error) from cause
        raise


def read_regular(
    path: str | os.PathLike[str], *, limit: int = MAX_FILE, error: _Error = ValidationError
) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        ValidationError: (or ``error``) as :func:`open_regular`, or the file is larger.
    """
    with open_regular(path, error=error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, limit) + 1)
        except OSError as cause:
            raise _unreadable(path, cause, error) from cause
    if len(data) > limit:
        raise error(f"{brief(path)} has {size:,} bytes; at most {limit:,} are read")
    return data


def brief(value: object) -> str:
    """A value for a message: as :func:`~qwodel.display.shown` has it, and not longer than a line or two."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else repr(value)
    text = str(text)
    return shown(text if len(text) <= 300 else f"{text[:140]} … {text[-140:]}")


def _require_regular(path: Path, mode: int, error: _Error) -> None:
    if not stat.S_ISREG(mode):
        what = next((name for test, name in _KINDS if test(mode)), "no regular file")
        raise error(f"{brief(path)} is {what}, not a file", hint="give the path of a regular file")


def _unreadable(path: str | os.PathLike[str], cause: OSError, error: _Error) -> QuantizationError:
    if cause.errno in _ABSENT:
        return error(f"{brief(path)} does not exist")
    return error(f"{brief(path)} cannot be read: {cause.strerror or cause}")
