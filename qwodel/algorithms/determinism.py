"""Matrix products with the same bits on any number of cores.

BLAS splits a product among threads, and where it splits shows in the last bits: enough to
turn a rounding or the end of a scale. One thread at a time is the only split that is the
same everywhere; matrices are converted in parallel by processes instead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]

_lock = threading.Lock()
_inside = 0
_before = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Run CPU operators of this process on one thread; the last one out restores the number."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_before)
