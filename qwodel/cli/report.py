"""How results and errors look on a terminal and in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from qwodel.display import shown, shown_lines
from qwodel.process import warn
from qwodel.report import json_text

__all__ = [
    "human_bytes",
    "print_json",
    "print_path",
    "print_table",
    "progress_display",
    "say",
]

_MESSAGE = 300  # characters of a progress message


def say(text: object) -> None:
    """Print text on standard output, made safe for a terminal."""
    typer.echo(shown_lines(text))


def print_path(path: Path) -> None:
    """Print a path alone: safe on a terminal, and in a pipe exactly what a script needs to find it."""
    if sys.stdout.isatty():
        say(path)
    else:
        typer.echo(os.fsencode(path))


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on standard output."""
    typer.echo(json_text(value))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Print a table: drawn on a terminal, tab-separated in a pipe."""
    if not sys.stdout.isatty():
        typer.echo("\t".join(columns))
        for row in rows:
            typer.echo("\t".join(shown(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", header_style="bold")
    for row in rows:
        # Text is taken as it is: a cell like [/nope] is no markup.
        table.add_row(*(Text(shown(cell)) for cell in row))
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
            task, completed=percent, stage=stage, description=shown(message, _MESSAGE)
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
        warn(f"{percent:3d} % {stage}: {shown(message, _MESSAGE)}")
