"""What a process has only one of, lent so that every thread finds it as it was.

A library is a guest: other threads of its user compute, build models and draw random numbers while it
works. Where a thread can have a state of its own, it gets one (:mod:`qwodel.algorithms.determinism` for
the number of threads, :mod:`qwodel.modeling.empty_models` for models without weights). What is one for
all is either turned for as long as any thread wants it (:func:`shared`), or belongs to one run at a time
(:class:`Exclusive`). Both put back exactly what was there.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

__all__ = [
    "AWQ_RUN",
    "COREML_RUN",
    "MODEL_BUILDING",
    "SEEDED_RUN",
    "TRACING",
    "Exclusive",
    "quiet_transformers",
    "replaced",
    "shared",
    "without_bars",
    "without_warnings",
]

_log = logging.getLogger("qwodel")

Switch = Callable[[], AbstractContextManager[None]]


def shared(switch: Switch) -> Switch:
    """Turn a process-wide switch while any thread is inside: the first one in turns it, the last one out back.

    Without the count, two threads that leave in the order in which they came would leave it turned.

    Args:
        switch: a context manager without arguments.
    """
    lock = threading.Lock()
    opened: list[AbstractContextManager[None]] = []
    inside = 0

    @contextmanager
    @functools.wraps(switch)
    def counted() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                context = switch()
                context.__enter__()
                opened.append(context)
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    opened.pop().__exit__(None, None, None)

    return counted


class Exclusive:
    """State of the process that one run has to itself; a thread that has it may take it again.

    Args:
        what: the run, for the log line of one that must wait.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            _log.debug("waiting for another %s of this process", self._what)
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


AWQ_RUN = Exclusive("AWQ run")
"""llm-compressor has one session, and its bars, log and a few functions are replaced while it works."""

COREML_RUN = Exclusive("Core ML conversion")
"""coremltools keeps the current opset and pass options in globals; its bars and log are replaced meanwhile."""

SEEDED_RUN = Exclusive("seeded run")
"""A pipeline draws from torch's own generators, which start from a seed and are put back afterwards."""

TRACING = Exclusive("tracing")
"""torch.fx and torch.export replace ``nn.Module.__call__`` and others while they follow a model."""

MODEL_BUILDING = Exclusive("building of a model")
"""transformers replaces ``tie_weights``, ``torch.linspace`` and functions of ``nn.init`` while it builds or
loads a model. Ours are built one at a time; what it replaces does the same for whoever builds other models.
"""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put ``value`` in the place of a module's or class's attribute. Only inside an :class:`Exclusive`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@shared
@contextmanager
def without_warnings() -> Iterator[None]:
    """Show no Python warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@shared
@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars amid our progress."""
    from transformers.utils import logging as messages

    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            messages.enable_progress_bar()


@shared
@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing warnings and bars."""
    from transformers.utils import logging as messages

    level = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        messages.set_verbosity(level)
