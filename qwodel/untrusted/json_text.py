"""JSON text, parsed within bounds."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

from qwodel.exceptions import QuantizationError, ValidationError
from qwodel.untrusted.files import MAX_FILE, brief, read_regular

__all__ = ["MAX_DEPTH", "MAX_JSON", "parse_json", "read_json", "read_json_object"]

MAX_DEPTH = 100
"""Levels of objects and arrays: far above any format's, far below the interpreter's stack."""

MAX_JSON = MAX_FILE
"""Bytes of a JSON file, where the caller sets no other limit."""

_MAX_DIGITS = 40
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_DIGITS = bytes(ord("0") if chr(byte) in "0123456789" else byte for byte in range(256))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_Error = type[QuantizationError]


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
    return parse_json(data, brief(path), unique=unique, constants=constants, error=error, hint=hint)


def read_json_object(
    path: str | os.PathLike[str], *, constants: bool = False, error: _Error = ValidationError
) -> dict[str, Any]:
    """Read a JSON file that holds an object, as configurations do.

    Raises:
        ValidationError: (or ``error``) as :func:`read_json`, or it holds something else.
    """
    document = read_json(path, constants=constants, error=error)
    if not isinstance(document, dict):
        raise error(f"{brief(path)} is no JSON object, but {_json_kind(document)}")
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
