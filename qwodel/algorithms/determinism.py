"""Matrix products with the same bits on any number of cores.

BLAS splits a product among threads, and where it splits shows in the last bits: enough to
turn a rounding or the end of a scale. One thread at a time is the only split that is the
same everywhere; matrices are converted in parallel by processes instead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from qwodel.exhaustion import exhaustion

__all__ = ["compute_threads", "one_thread"]

_lock = threading.Lock()


@contextmanager
def compute_threads(count: int | None) -> Iterator[None]:
    """Let CPU operators that this thread calls run on ``count`` threads; ``None`` changes nothing.

    Other threads, those that start meanwhile too, keep the number they have.

    Raises:
        ResourceError: the system starts no more threads.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    _set_own(count)
    try:
        yield
    finally:
        _set_own(before)


def one_thread() -> AbstractContextManager[None]:
    """Let CPU operators that this thread calls run on one thread."""
    return compute_threads(1)


def _set_own(count: int) -> None:
    """Set this thread's number, and leave the one alone that threads to come start with.

    ``torch.set_num_threads`` sets both: OpenMP's and MKL's number, of which each thread has its own,
    and the process's. Only a fresh thread sees the latter, or can set it without another effect.
    """
    with _lock, exhaustion("setting the number of threads"), _Fresh():
        torch.set_num_threads(count)


class _Fresh:
    """A thread that has set nothing: it sees the process's number, and puts it back at the end of the block."""

    def __init__(self) -> None:
        self._seen, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="qwodel-threads", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        self._seen.wait()

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._thread.join()

    def _run(self) -> None:
        before = torch.get_num_threads()
        self._seen.set()
        self._go.wait()
        torch.set_num_threads(before)
