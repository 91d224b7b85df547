"""Paths as users write them, read in one place."""

from __future__ import annotations

import os
from pathlib import Path

from qwodel.exceptions import ValidationError

__all__ = ["exists", "user_path"]


def user_path(given: str | os.PathLike[str], what: str = "path") -> Path:
    """Return a path with ``~`` and ``~user`` expanded.

    Args:
        given: what the user wrote.
        what: its name in errors.

    Raises:
        ValidationError: there is no such user, it holds a null character, or it is longer than paths can be.
    """
    path = Path(given)
    try:
        expanded = path.expanduser()
    except RuntimeError as error:
        raise ValidationError(
            f"the {what} {path} begins with the home of a user who is not known here",
            hint=f"write the whole path, or ./{path} for a folder of that name",
        ) from error
    try:
        os.lstat(expanded)
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise ValidationError(f"the {what} {str(path)!r} holds a null character") from error
    except OSError as error:
        if isinstance(error, PermissionError | NotADirectoryError):
            return expanded  # whoever opens it says so
        raise ValidationError(f"the {what} {str(path)[:100]}… cannot be: {error.strerror}") from error
    return expanded


def exists(path: Path) -> bool:
    """Whether something is there; not where its folders cannot be looked into."""
    try:
        return path.exists()
    except OSError:
        return False
