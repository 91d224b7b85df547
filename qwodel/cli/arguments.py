"""Arguments several verbs share, and their completion."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Backend", "JsonFlag", "complete_backend", "complete_format"]


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
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
