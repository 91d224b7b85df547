"""How results and errors look on a terminal and in a pipe."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

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

__all__ = ["exit_code", "human_bytes", "print_json", "print_table", "progress_display", "show_error"]

_CODES: Sequence[tuple[tuple[type[QuantizationError], ...], int]] = (
    ((ValidationError, ConfigurationError, BackendNotFoundError), 2),
    ((DependencyError,), 3),
    ((ResourceError,), 4),
    ((CalibrationError,), 5),
    ((Cancelled,), 130),
)


def exit_code(error: BaseException) -> int:
    """Return the documented exit code for ``error``."""
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), 1)


def show_error(error: BaseException, *, verbose: bool) -> bool:
    """Print a qwodel error as cause and hint; return whether it was one."""
    if not isinstance(error, QuantizationError):
        return False
    if verbose:
        traceback.print_exception(error)
        for line in getattr(error.__cause__, "lines", ()):
            typer.echo(f"  | {line}", err=True)
    typer.secho(f"error: {error}", fg="red" if sys.stderr.isatty() else None, err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
    return True


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Print a table: drawn on a terminal, tab-separated in a pipe."""
    if not sys.stdout.isatty():
        typer.echo("\t".join(columns))
        for row in rows:
            typer.echo("\t".join(str(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def human_bytes(count: float) -> str:
    """Return ``count`` bytes in decimal units: ``104.8 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def progress_display(*, quiet: bool) -> Iterator[Callable[[int, str, str], None]]:
    """Yield a progress callback: a live bar on a terminal, plain lines in a pipe, nothing when quiet."""
    if quiet:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _live_bar() as callback:
            yield callback
    else:
        yield _PlainLines()


@contextmanager
def _live_bar() -> Iterator[Callable[[int, str, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.fields[stage]:<9}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task("", total=100, stage="resolve")
        yield lambda percent, stage, message: bar.update(
            task, completed=percent, stage=stage, description=message
        )


class _PlainLines:
    """One line a stage, one every ten percent, and one every half minute of silence."""

    def __init__(self) -> None:
        self._stage, self._tenth, self._when = "", -1, 0.0

    def __call__(self, percent: int, stage: str, message: str) -> None:
        now = time.monotonic()
        if stage == self._stage and percent // 10 == self._tenth and now - self._when < 30:
            return
        self._stage, self._tenth, self._when = stage, percent // 10, now
        typer.echo(f"{percent:3d} % {stage}: {message}", err=True)
