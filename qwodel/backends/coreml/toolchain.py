"""coremltools with its bars and its log turned into progress and exceptions."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from qwodel.exceptions import ResourceError
from qwodel.exhaustion import exhausted
from qwodel.process_state import COREML_RUN, replaced, without_warnings

__all__ = [
    "BarCallback",
    "load_package",
    "memory_errors",
    "quiet_coremltools",
    "record_log",
    "report_bars",
]

BarCallback = Callable[[str, int, int], object]
"""``(what is being done, items done, items in all)``."""

_BARS = (
    ("coremltools.converters.mil.frontend.torch.ops", "_tqdm"),
    ("coremltools.converters.mil.mil.passes.pass_pipeline", "tqdm"),
    ("coremltools.optimize.coreml._quantization_passes", "tqdm"),
)


def quiet_coremltools() -> Any:
    """Import coremltools without what it says about missing Apple libraries and untested versions."""
    with record_log():
        return import_module("coremltools")


def load_package(package: Path) -> Any:
    """Return coremltools' model of a package, without Apple's runtime."""
    coremltools = quiet_coremltools()
    with record_log():
        return coremltools.models.MLModel(str(package), skip_model_load=True)


@contextlib.contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turn Python's and torch's lack of memory into :class:`ResourceError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if what := exhausted(error):
            raise ResourceError(
                f"{what} while {doing}",
                hint="use a machine with more memory, or a smaller seq_length and input_shape",
            ) from error
        raise


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

    What ``callback`` raises comes out of coremltools.
    """

    def bar(items: Iterable[Any], *_: Any, desc: str = "", **__: Any) -> _Bar:
        return _Bar(items, callback, desc)

    with COREML_RUN, contextlib.ExitStack() as stack:
        for module_name, name in _BARS:
            stack.enter_context(replaced(import_module(module_name), name, bar))
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
    with (
        COREML_RUN,
        replaced(logger, "handlers", [recorder]),
        replaced(logger, "propagate", False),
        without_warnings(),
    ):
        yield recorder.lines
