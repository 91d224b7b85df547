"""What Python, torch and the system say when memory, threads or processes run out, as our error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from qwodel.exceptions import QuantizationError, ResourceError

__all__ = ["exhausted", "exhaustion", "is_out_of_memory"]

_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
)
_NO_THREAD = "can't start new thread"
_ERRNOS = {errno.ENOMEM: "memory ran out", errno.EAGAIN: "the system starts no more processes or threads"}


def exhausted(error: BaseException) -> str | None:
    """What ran out, where an exception says that something did; else ``None``.

    Torch and the standard library raise plain RuntimeErrors, told apart by their text only.
    """
    if isinstance(error, OSError):
        return _ERRNOS.get(error.errno or 0)
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return _ERRNOS[errno.EAGAIN]
    return _ERRNOS[errno.ENOMEM] if is_out_of_memory(error) else None


@contextmanager
def exhaustion(doing: str) -> Iterator[None]:
    """Turn the want of memory, threads or processes into :class:`ResourceError`.

    Args:
        doing: what the block does, for the message: "… while {doing}".
    """
    try:
        yield
    except QuantizationError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        what = exhausted(error)
        if what is None:
            raise
        raise ResourceError(
            f"{what} while {doing}",
            hint="close other programs or raise the limits of this process (ulimit -a), "
            "or use a machine with more memory",
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one it was raised from, says that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).casefold()
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or any(words in text for words in _NO_MEMORY)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
