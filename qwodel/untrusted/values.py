"""Numbers, and the errors of other libraries' decoders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from qwodel.exceptions import QuantizationError, ValidationError
from qwodel.untrusted.files import brief

__all__ = ["checked_int", "checked_number", "foreign_errors"]

_Error = type[QuantizationError]


def checked_int(
    value: object, what: str, *, low: int = 0, high: int = (1 << 63) - 1, error: _Error = ValidationError
) -> int:
    """Return ``value`` if it is an integer in ``[low, high]``: no bool, no 64.0, no ``"64"``.

    Raises:
        ValidationError: (or ``error``) it is anything else; the message begins with ``what``.
    """
    if type(value) is not int or not low <= value <= high:
        raise error(f"{what} is {brief(value)}, not an integer from {low:,} to {high:,}")
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
        raise error(f"{what} is {brief(value)}, not a finite number from {low:g} to {high:g}")
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
