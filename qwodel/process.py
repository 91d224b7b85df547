"""The process our programs run in: its streams, its signals, its log, whoever started it and however."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from types import FrameType

from qwodel.children import forget_present_folder
from qwodel.display import shown_lines

__all__ = ["ignore_interruptions", "log_to_terminal", "prepare_process"]

_SECONDS_TO_CLEAN = 15.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def prepare_process() -> None:
    """Make streams, signals, log and children's module path what every verb can rely on."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what an encoding lacks is escaped, and does not stop a run
            stream.reconfigure(errors="backslashreplace")
    forget_present_folder()
    _Interruption().install()
    log_to_terminal(logging.WARNING)


def ignore_interruptions() -> None:
    """Let nothing interrupt what is left: the interpreter, as it ends, gives signals back their deadly meaning."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def _open_closed_streams() -> None:
    """Give descriptors 0 to 2 something, as cron and ``2>&-`` may not.

    The next file to be opened would get the free number, and what native code prints would go into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


class _Interruption:
    """Ctrl-C, a polite kill and a terminal that goes away end the run once, and let it clean up.

    Further ones are not heard while it does, for a quarter of a minute: were the first lost in
    native code, or cleaning stuck, one after that is heard again.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    def install(self) -> None:
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and background jobs of a shell
                signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None or now - self._since > _SECONDS_TO_CLEAN:
            self._since = now
            raise KeyboardInterrupt


def log_to_terminal(level: int) -> None:
    """Log to standard error from ``level`` on, with what files say in messages made safe to show."""
    root = logging.getLogger()
    root.setLevel(level)
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_SafeFormatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))
