"""Arguments several verbs share, and their completion."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = [
    "Backend",
    "FormatOption",
    "JsonFlag",
    "OptionPairs",
    "complete_backend",
    "complete_format",
    "parse_options",
]


def complete_backend(incomplete: str) -> list[str]:
    """Return the backends that start with what was typed."""
    from qwodel.backends import backend_names

    return [name for name in backend_names() if name.startswith(incomplete.lower())]


def complete_format(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the formats of the chosen backend that start with what was typed."""
    from qwodel.backends import load_backend
    from qwodel.exceptions import QuantizationError

    try:
        known = load_backend(str(ctx.params.get("backend")), check_dependencies=False).formats()
    except QuantizationError:
        return []
    return [name for name in known if name.upper().startswith(incomplete.upper())]


Backend = Annotated[
    str,
    typer.Option(
        "--backend", "-b", help="Backend; see `qwodel list-backends`.", autocompletion=complete_backend
    ),
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format", "-f", help="Format; see `qwodel list-formats BACKEND`.", autocompletion=complete_format
    ),
]
OptionPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-O", metavar="KEY=VALUE",
        help="A backend option, VALUE as JSON or plain text; repeat for more. See `qwodel list-options BACKEND`.",
    ),
]  # fmt: skip
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Parse ``key=value`` pairs; a value that is JSON is taken as such, anything else as text.

    Raises:
        typer.BadParameter: a pair has no ``=``, or a key comes twice.
    """
    import json

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE")
        if key in options:
            raise typer.BadParameter(f"{key} is given twice")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
