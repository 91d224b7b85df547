"""Every error qwodel raises on purpose.

::

    QuantizationError
    ├── ValidationError          (also ValueError)    the input path, format or architecture is wrong
    │   └── FormatNotSupportedError                   the backend has no such format
    ├── BackendNotFoundError     (also ValueError)    no backend has that name
    ├── ConfigurationError       (also ValueError)    an option is unknown or has a bad value
    ├── DependencyError          (also ImportError)   a library or tool is missing
    ├── CalibrationError         (also RuntimeError)  calibration data is missing, too small or unreadable
    ├── ConversionError                               a toolchain failed on this model
    ├── ResourceError            (also RuntimeError)  memory or disk ran out
    ├── IntegrityError                                what was read back differs from what was written
    └── Cancelled                                     the caller asked to stop

Each carries a ``hint``: what the user can do about it. ``str(error)`` is the
cause alone; tracebacks show the hint as a note below it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

__all__ = [
    "BackendNotFoundError",
    "CalibrationError",
    "Cancelled",
    "ConfigurationError",
    "ConversionError",
    "DependencyError",
    "FormatNotSupportedError",
    "IntegrityError",
    "QuantizationError",
    "ResourceError",
    "ValidationError",
    "did_you_mean",
]


class QuantizationError(Exception):
    """Root of the tree: quantization did not produce a file.

    Args:
        message: the true cause, in one or two sentences.
        hint: what the user can do about it, or ``None``.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")

    def within(self, place: str) -> Self:
        """Return the same error with ``place`` before its message, to be raised from this one.

        This one gives up its note, so that a traceback of both shows the hint once.
        """
        again = type(self)(f"{place}: {self}", hint=self.hint)
        note = f"hint: {self.hint}"
        self.__notes__ = [each for each in getattr(self, "__notes__", ()) if each != note]
        return again

    def __reduce__(self) -> tuple[Any, ...]:
        # The default reduction loses keyword arguments, and errors cross process borders here.
        return _rebuild, (type(self), str(self), self.hint)


def _rebuild(cls: type[QuantizationError], message: str, hint: str | None) -> QuantizationError:
    return cls(message, hint=hint)


class ValidationError(QuantizationError, ValueError):
    """The input path, format or architecture is wrong."""


class FormatNotSupportedError(ValidationError):
    """The backend has no such format."""


class BackendNotFoundError(QuantizationError, ValueError):
    """No backend has that name."""


class ConfigurationError(QuantizationError, ValueError):
    """An option is unknown or has a bad value."""


class DependencyError(QuantizationError, ImportError):
    """A library or tool that the work needs is missing."""


class CalibrationError(QuantizationError, RuntimeError):
    """Calibration data is missing, too small or unreadable."""


class ConversionError(QuantizationError):
    """A toolchain failed on this model; its own last words are in the message."""


class ResourceError(QuantizationError, RuntimeError):
    """Memory or disk ran out, or would have."""


class IntegrityError(QuantizationError):
    """What was read back differs from what should have been written."""


class Cancelled(QuantizationError):  # noqa: N818 - the name callers know from asyncio and concurrent.futures
    """The caller asked to stop; nothing was published."""


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return ``"did you mean 'x' or 'y'?"`` for the nearest known words, or ``None``."""
    by_folded: dict[str, list[str]] = {}
    for name in known:
        by_folded.setdefault(name.casefold(), []).append(name)
    near = difflib.get_close_matches(word.casefold(), by_folded, n=3, cutoff=0.6)
    if not near:
        return None
    spellings = [max(by_folded[key], key=lambda name: sum(map(str.__eq__, name, word))) for key in near]
    return "did you mean " + " or ".join(f"'{name}'" for name in spellings) + "?"
