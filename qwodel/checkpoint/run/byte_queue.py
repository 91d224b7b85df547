"""A queue between two threads that is bounded in bytes, and tells each side how the other ended."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["ByteQueue", "Stopped"]

ItemT = TypeVar("ItemT")


class Stopped(Exception):  # noqa: N818 - not an error: the run is over
    """The other side of a queue has gone."""


class ByteQueue(Generic[ItemT]):
    """A first-in first-out queue bounded in bytes; ``None`` is an item like any other and ends a sequence."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[tuple[ItemT | None, int]] = deque()
        self._bytes = 0
        self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, item: ItemT | None, nbytes: int) -> None:
        """Append an item once there is room for it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._over() or not self._bytes or self._bytes + nbytes <= self._limit
            )
            self._raise()
            self._items.append((item, nbytes))
            self._bytes += nbytes
            self._changed.notify_all()

    def get(self) -> ItemT | None:
        """Take the first item off, once there is one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._over())
            if not self._items:
                self._raise()
            item, nbytes = self._items.popleft()
            self._bytes -= nbytes
            self._changed.notify_all()
            return item

    def finish(self) -> None:
        """Put the end of the sequence."""
        self.put(None, 0)

    def stop(self) -> None:
        """Wake both sides; nothing more goes through."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """Say that the thread at one side has ended; the other side raises ``error``, if it was one."""
        if error is None or isinstance(error, Stopped):
            return
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what the other side failed with, if it did."""
        if self._error:
            raise self._error

    def _over(self) -> bool:
        return self._stopped or self._error is not None

    def _raise(self) -> None:
        if self._error:
            raise self._error
        if self._stopped:
            raise Stopped
