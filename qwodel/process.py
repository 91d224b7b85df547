"""The process our programs run in: its streams, signals, log and exit codes, whoever started it and however.

Exit codes: 0 done; 1 the work failed (conversion, integrity); 2 bad input, option,
backend or format; 3 a dependency is missing; 4 out of memory or disk; 5 calibration
data; 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

import typer

from qwodel.children import forget_present_folder
from qwodel.display import shown_lines
from qwodel.exceptions import (
    BackendNotFoundError,
    CalibrationError,
    Cancelled,
    ConfigurationError,
    DependencyError,
    QuantizationError,
    ResourceError,
    ValidationError,
)

__all__ = [
    "exit_code",
    "ignore_interruptions",
    "log_to_terminal",
    "main_of",
    "prepare_process",
    "show_error",
    "warn",
]

_SECONDS_TO_CLEAN = 15.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_INTERRUPTED = 130

_CODES: Sequence[tuple[tuple[type[Exception], ...], int]] = (
    ((ValidationError, ConfigurationError, BackendNotFoundError), 2),
    ((DependencyError,), 3),
    ((ResourceError, MemoryError), 4),
    ((CalibrationError,), 5),
    ((Cancelled,), 130),
)


def exit_code(error: BaseException) -> int:
    """Return the documented exit code for ``error``."""
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), 1)


def main_of(program: Callable[[], object]) -> None:
    """Run a program of ours: whatever stops it becomes a message and an exit code.

    Args:
        program: reads ``sys.argv`` itself, as a typer application does.

    Raises:
        SystemExit: with the exit code, where that is not 0.
    """
    prepare_process()
    try:
        program()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # typer catches KeyboardInterrupt itself, and says nothing
            _say_interrupted()
        raise
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if not show_error(error, verbose="--verbose" in sys.argv or "-v" in sys.argv):
            raise
        sys.exit(exit_code(error))


def _say_interrupted() -> None:
    ignore_interruptions()
    warn("interrupted; nothing was published")


def warn(text: object, *, colour: str | None = None) -> None:
    """Print text on standard error, made safe for a terminal; where nobody listens any more, nothing happens."""
    with suppress(OSError):
        typer.secho(shown_lines(text), fg=colour if sys.stderr.isatty() else None, err=True)


def show_error(error: BaseException, *, verbose: bool) -> bool:
    """Print an error as cause and hint; return whether it was one of ours, or of memory."""
    if isinstance(error, MemoryError):
        error = ResourceError("memory ran out", hint="free some memory, or use a larger machine")
    if not isinstance(error, QuantizationError):
        return False
    if verbose:
        for line in "".join(_without_hint(error).format()).splitlines():
            warn(line)
        for line in getattr(error.__cause__, "lines", ()):
            warn(f"  | {line}")
    warn(f"error: {error}", colour="red")
    if error.hint:
        warn(f"hint: {error.hint}")
    return True


def _without_hint(error: QuantizationError) -> traceback.TracebackException:
    """The error's traceback without the note of its hint, which is printed below it."""
    told = traceback.TracebackException.from_exception(error)
    # Unset where there was none, and typed as what format() takes.
    told.__notes__ = [
        note for note in getattr(told, "__notes__", None) or () if note != f"hint: {error.hint}"
    ]
    return told


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
