"""coremltools with its bars and its log turned into progress and exceptions."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

__all__ = ["BarCallback", "quiet_coremltools", "record_log", "report_bars"]

BarCallback = Callable[[str, int, int], object]
"""``(what is being done, items done, items in all)``."""

_BARS = (
    ("coremltools.converters.mil.frontend.torch.ops", "_tqdm"),
    ("coremltools.converters.mil.mil.passes.pass_pipeline", "tqdm"),
    ("coremltools.optimize.coreml._quantization_passes", "tqdm"),
)
# coremltools keeps the current opset and pass options in globals.
_LOCK = threading.RLock()


def quiet_coremltools() -> Any:
    """Import coremltools without what it says about missing Apple libraries and untested versions."""
    with record_log():
        return import_module("coremltools")


class _Bar:
    """What coremltools takes for tqdm: an iterable that reports."""

    def __init__(self, items: Iterable[Any], callback: BarCallback, what: str) -> None:
        self._items = list(items)
        self._callback = callback
        self._what = what

    def __iter__(self) -> Iterator[Any]:
        for done, item in enumerate(self._items):
            self._callback(self._what, done, len(self._items))
            yield item
        self._callback(self._what, len(self._items), len(self._items))


@contextlib.contextmanager
def report_bars(callback: BarCallback) -> Iterator[None]:
    """Send the progress of every conversion and compression pass to ``callback`` instead of standard error.

    What ``callback`` raises comes out of coremltools. One thread at a time.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        for module_name, name in _BARS:
            module = import_module(module_name)
            stack.callback(setattr, module, name, getattr(module, name))

            def bar(items: Iterable[Any], *_: Any, desc: str = "", **__: Any) -> _Bar:
                return _Bar(items, callback, desc)

            setattr(module, name, bar)
        yield


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip())


@contextlib.contextmanager
def record_log() -> Iterator[list[str]]:
    """Collect coremltools' warnings and errors instead of printing them; Python warnings are silenced."""
    logger = logging.getLogger("coremltools")
    recorder = _Recorder()
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [recorder], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield recorder.lines
    finally:
        logger.handlers, logger.propagate = handlers, propagate
