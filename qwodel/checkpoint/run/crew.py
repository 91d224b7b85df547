"""The threads of one run: each says how it ended, and none outlives the run."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Crew"]


class Crew:
    """Threads that end together. Join them in a ``finally``, after telling them to stop."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(
        self, name: str, work: Callable[[], None], ended: Callable[[BaseException | None], None]
    ) -> None:
        """Start a thread.

        Args:
            name: of the thread.
            work: what it does.
            ended: called in the thread once it is done, with whatever it raised.

        Raises:
            RuntimeError: the system starts no more threads.
        """

        def run() -> None:
            try:
                work()
            except BaseException as error:
                ended(error)
            else:
                ended(None)

        thread = threading.Thread(target=run, name=name)
        thread.start()
        self._threads.append(thread)

    def join(self) -> None:
        """Wait for those that were started."""
        for thread in self._threads:
            thread.join()
