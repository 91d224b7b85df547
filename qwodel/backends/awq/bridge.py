"""llm-compressor's bars become our progress, and its loguru lines standard logging."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from qwodel.process_state import without_bars

__all__ = ["CalibrationProgress", "bridged"]

_log = logging.getLogger("AWQQuantizer")
_NO_NEWS = (  # warnings about what this backend chose or says itself
    "No accelerator available",
    "MoE is being linearized after loading",
    "Disabling tokenizer parallelism",
    "mappings were skipped due to incompatible shapes",
    "Unable to find quantization scheme for targeted layer",
    "No error metrics were collected",
)
_DISABLED = "LLM_COMPRESSOR_LOG_DISABLED"
_BLOCK = re.compile(r"\((\d+)/(\d+)\): (Calibrating|Propagating)")
_TOOLCHAIN = ("llmcompressor", "compressed_tensors")
_USED = (
    "llmcompressor.entrypoints.oneshot",
    "llmcompressor.modifiers.transform.awq",
    "llmcompressor.pipelines.sequential.pipeline",
)
# Shares of a block's time: one pass to watch, the searches, one pass to go on.
_WATCH, _SEARCH = 0.08, 0.86

Report = Callable[[float, float, str], None]
"""``(done, total, message)``."""


class CalibrationProgress:
    """Turns the descriptions of llm-compressor's bars into one rising fraction.

    Args:
        report: receives ``(done, 1.0, message)``.
        searches: scale searches a block is expected to have.
    """

    def __init__(self, report: Report, searches: float) -> None:
        self._report = report
        self._searches = max(searches, 1.0)
        self._block, self._blocks, self._searched = 1, 1, 0
        self._done = 0.0

    def bar(self, description: str, done: float, total: float) -> None:
        """Take the state of one bar: its description, and how far it is."""
        share = min(done / total, 1.0) if total else 1.0
        match = _BLOCK.match(description)
        if match:
            if int(match[1]) != self._block:
                self._block, self._searched = int(match[1]), 0
            self._blocks = int(match[2])
            inner = (
                share * _WATCH
                if match[3] == "Calibrating"
                else _WATCH + _SEARCH + share * (1 - _WATCH - _SEARCH)
            )
            verb = match[3].lower()
            self._tell(inner, f"block {self._block} of {self._blocks}: {verb}")
        elif description.startswith("Grid search"):
            place = min((self._searched + share) / self._searches, 1.0)
            self._tell(_WATCH + _SEARCH * place, f"block {self._block} of {self._blocks}: searching scales")
            if done >= total:
                self._searched += 1
        else:
            self._tell(None, f"block {self._block} of {self._blocks}")

    def _tell(self, inner: float | None, message: str) -> None:
        if inner is not None:
            self._done = max(self._done, (self._block - 1 + inner) / self._blocks)
        self._report(self._done, 1.0, message)


def _bar_class(listener: CalibrationProgress | None) -> type[Any]:
    """Return a stand-in for tqdm that draws nothing and tells the listener."""

    class Bar:
        def __init__(
            self, iterable: Iterable[Any] | None = None, desc: str = "", total: float | None = None, **_: Any
        ) -> None:
            self.iterable, self.desc, self.n = iterable, desc or "", 0.0
            self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
            self._tell()

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable or ():
                yield item
                self.update()

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return

        def update(self, n: float = 1) -> None:
            self.n += n
            self._tell()

        def set_description(self, desc: str = "", *_: Any, **__: Any) -> None:
            self.desc = desc

        def close(self, *_: Any, **__: Any) -> None:
            return

        set_postfix = set_postfix_str = refresh = reset = close

        def _tell(self) -> None:
            if listener is not None:
                listener.bar(self.desc, self.n, self.total or 0)

    return Bar


@contextmanager
def bridged(listener: CalibrationProgress | None = None) -> Iterator[None]:
    """Replace the toolchain's bars and log sinks while the block runs; one :data:`AWQ_RUN` at a time."""
    _import_toolchain()
    import tqdm
    from llmcompressor.logger import LoggerConfig, configure_logger
    from loguru import logger

    configure_logger(LoggerConfig(console_log_level=None))
    sink = logger.add(_forward, level="DEBUG", format="{message}")
    replaced: list[tuple[Any, Any]] = []
    bar = _bar_class(listener)
    for name, module in list(sys.modules.items()):
        if not name.startswith(_TOOLCHAIN):
            continue
        # "from tqdm import tqdm" in some modules, "import tqdm" in others
        for shape, stand_in in ((tqdm.tqdm, bar), (tqdm, SimpleNamespace(tqdm=bar))):
            if getattr(module, "tqdm", None) is shape:
                replaced.append((module, shape))
                module.tqdm = stand_in  # type: ignore[attr-defined]
    try:
        with _quiet_libraries():
            yield
    finally:
        for module, shape in replaced:
            module.tqdm = shape
        with suppress(ValueError):  # among several processes llm-compressor sets its sinks up anew
            logger.remove(sink)


def _import_toolchain() -> None:
    """Import llm-compressor without the sink and the lines it writes to standard output meanwhile."""
    if all(name in sys.modules for name in _USED):
        return
    before = os.environ.get(_DISABLED)
    os.environ[_DISABLED] = "true"
    try:
        for name in _USED:
            import_module(name)
    finally:
        os.environ.pop(_DISABLED)
        if before is not None:
            os.environ[_DISABLED] = before


def _forward(message: Any) -> None:
    record = message.record
    if not str(record["name"]).startswith(_TOOLCHAIN):
        return
    # What llm-compressor calls information is for its developers.
    news = record["level"].no >= logging.WARNING and not any(text in record["message"] for text in _NO_NEWS)
    level = record["level"].no if news else logging.DEBUG
    _log.log(level, "%s", record["message"])


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    tracer = logging.getLogger("torch.fx._symbolic_trace")  # warns of its own deprecations
    level = tracer.level
    tracer.setLevel(logging.ERROR)
    try:
        with without_bars():
            yield
    finally:
        tracer.setLevel(level)
