"""What comes from outside, read in one place each: paths, regular files, JSON and numbers.

Nothing here blocks, recurses with its input, or takes more memory than a small multiple of the file's
size. Whatever is wrong ends in the caller's kind of :class:`~qwodel.exceptions.QuantizationError`;
only ``MemoryError`` passes through, for whoever knows what to give up.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from qwodel.exceptions import QuantizationError, ValidationError

__all__ = [
    "MAX_DEPTH",
    "MAX_JSON",
    "checked_int",
    "checked_number",
    "checked_path",
    "foreign_errors",
    "kind_of",
    "open_regular",
    "parse_json",
    "read_json",
    "read_json_object",
    "read_regular",
]

MAX_DEPTH = 100
"""Levels of objects and arrays in JSON: far above any format's, far below the interpreter's stack."""

MAX_JSON = 100_000_000
"""Bytes of a JSON file, where the caller sets no other limit."""

_MAX_DIGITS = 40
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_DIGITS = bytes(ord("0") if chr(byte) in "0123456789" else byte for byte in range(256))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_Error = type[QuantizationError]


def checked_path(given: str | os.PathLike[str], *, error: _Error = ValidationError) -> Path:
    """Return ``given`` with ``~`` expanded.

    Raises:
        ValidationError: (or ``error``) it cannot be a path: a NUL byte, or an unknown user's home.
    """
    try:
        path = Path(given).expanduser()
        encoded = os.fsencode(path)
    except (RuntimeError, TypeError, ValueError) as cause:
        raise error(f"{_shown(given)} is no usable path: {cause}") from cause
    if b"\0" in encoded:
        raise error(f"{_shown(given)} is no usable path: it holds a NUL byte")
    return path


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
        raise error(f"{_shown(path)} is no usable path: {cause}") from cause
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
    path: str | os.PathLike[str], *, limit: int = MAX_JSON, error: _Error = ValidationError
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
        raise error(f"{_shown(path)} has {size:,} bytes; at most {limit:,} are read")
    return data


def read_json(
    path: str | os.PathLike[str],
    *,
    limit: int = MAX_JSON,
    unique: bool = False,
    constants: bool = False,
    error: _Error = ValidationError,
    hint: str | None = None,
) -> Any:
    """Read a JSON file; the arguments are :func:`read_regular`'s and :func:`parse_json`'s.

    Raises:
        ValidationError: (or ``error``) the file cannot be read, or :func:`parse_json` refuses it.
    """
    data = read_regular(path, limit=limit, error=error)
    return parse_json(data, _shown(path), unique=unique, constants=constants, error=error, hint=hint)


def read_json_object(
    path: str | os.PathLike[str], *, constants: bool = False, error: _Error = ValidationError
) -> dict[str, Any]:
    """Read a JSON file that holds an object, as configurations do.

    Raises:
        ValidationError: (or ``error``) as :func:`read_json`, or it holds something else.
    """
    document = read_json(path, constants=constants, error=error)
    if not isinstance(document, dict):
        raise error(f"{_shown(path)} is no JSON object, but {_json_kind(document)}")
    return document


def parse_json(
    data: bytes | str,
    where: str,
    *,
    unique: bool = False,
    constants: bool = False,
    error: _Error = ValidationError,
    hint: str | None = None,
) -> Any:
    """Parse JSON text (RFC 8259) in UTF-8.

    Args:
        where: what the text is, for messages.
        unique: refuse a name that an object has twice; otherwise the last one counts.
        constants: let ``NaN`` and ``Infinity`` through, which Python writes and some configurations hold.
        error: what to raise.
        hint: its hint.

    Raises:
        ValidationError: (or ``error``) it is not UTF-8 or not JSON; nested deeper than :data:`MAX_DEPTH`;
            a number that no double holds or of more than 40 digits; half of a surrogate pair.
    """
    try:
        raw = data.encode("utf-8") if isinstance(data, str) else data
        _require_shallow(raw)
        hooks: dict[str, Any] = {"parse_float": _finite}
        if b"0" * (_MAX_DIGITS + 1) in raw.translate(_DIGITS):
            hooks["parse_int"] = _short_int
        if unique:
            hooks["object_pairs_hook"] = _unique
        if not constants:
            hooks["parse_constant"] = _refuse_constant
        document = json.loads(data if isinstance(data, str) else raw.decode("utf-8"), **hooks)
        if _SURROGATE.search(raw):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeError as cause:
        raise error(
            f"{where} is not valid UTF-8 text: {getattr(cause, 'reason', cause)}", hint=hint
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is not readable JSON: {cause}", hint=hint) from cause
    return document


def checked_int(
    value: object, what: str, *, low: int = 0, high: int = (1 << 63) - 1, error: _Error = ValidationError
) -> int:
    """Return ``value`` if it is an integer in ``[low, high]``: no bool, no 64.0, no ``"64"``.

    Raises:
        ValidationError: (or ``error``) it is anything else; the message begins with ``what``.
    """
    if type(value) is not int or not low <= value <= high:
        raise error(f"{what} is {_shown(value)}, not an integer from {low:,} to {high:,}")
    return value


def checked_number(
    value: object,
    what: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    error: _Error = ValidationError,
) -> float:
    """Return ``value`` as a float if it is a finite number in ``[low, high]``: no bool, no ``"0.5"``.

    Raises:
        ValidationError: (or ``error``) it is anything else; the message begins with ``what``.
    """
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise error(f"{what} is {_shown(value)}, not a finite number from {low:g} to {high:g}")
    return number


@contextmanager
def foreign_errors(what: str, *, error: _Error = ValidationError, hint: str | None = None) -> Iterator[None]:
    """Turn whatever another library raises while it decodes a file into ``error``, which says so.

    For decoders that promise no kinds of errors (pickles, Arrow, builders of models). Our own errors
    and ``MemoryError`` pass.
    """
    try:
        yield
    except (QuantizationError, MemoryError):
        raise
    except Exception as cause:
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise error(f"{what}: {said[:300]}", hint=hint) from cause


def _require_regular(path: Path, mode: int, error: _Error) -> None:
    if not stat.S_ISREG(mode):
        what = next((name for test, name in _KINDS if test(mode)), "no regular file")
        raise error(f"{_shown(path)} is {what}, not a file", hint="give the path of a regular file")


def _unreadable(path: str | os.PathLike[str], cause: OSError, error: _Error) -> QuantizationError:
    if cause.errno in _ABSENT:
        return error(f"{_shown(path)} does not exist")
    return error(f"{_shown(path)} cannot be read: {cause.strerror or cause}")


def _shown(value: object) -> str:
    """A value for a message: on one line, and not longer than one."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else repr(value)
    text = str(text) if str(text).isprintable() else repr(text)
    return text if len(text) <= 300 else f"{text[:140]} … {text[-140:]}"


def _json_kind(document: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(document), "a number")


def _require_shallow(raw: bytes) -> None:
    """Refuse deep nesting before the parser, whose own bound depends on who calls it."""
    if _cancels(raw.translate(_SQUARE, _NO_BRACKETS)):
        return
    # Brackets inside strings do not pair; look again without strings.
    if not _cancels(_STRING.sub(b"", raw).translate(_SQUARE, _NO_BRACKETS)):
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels, or its brackets do not match")


def _cancels(brackets: bytes) -> bool:
    """Whether pairs vanish from the inside out in :data:`MAX_DEPTH` rounds, but for a few unmatched ones."""
    for _ in range(MAX_DEPTH):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            return len(brackets) <= MAX_DEPTH
        brackets = shorter
    return not brackets


def _finite(literal: str) -> float:
    number = float(literal)
    if math.isinf(number):
        raise ValueError(f"the number {literal[:20]} is too large")
    return number


def _short_int(literal: str) -> int:
    if len(literal) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(literal):,} digits")
    return int(literal)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:100]!r} is there twice")
            seen.add(name)
    return found


def _refuse_constant(name: str) -> Callable[[], None]:
    raise ValueError(f"{name} is no JSON number")
