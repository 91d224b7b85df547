"""``qwodel list-backends``, ``list-formats`` and ``list-options``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qwodel.cli.arguments import JsonFlag, complete_backend

__all__ = ["list_backends", "list_formats", "list_options"]

_BackendArgument = Annotated[str, typer.Argument(help="A backend's name.", autocompletion=complete_backend)]


def list_backends(json_: JsonFlag = False) -> None:
    """List the backends, whether each is ready, and what is missing."""
    from qwodel.cli.check import backend_states
    from qwodel.cli.report import print_json, print_table

    states = backend_states()
    if json_:
        print_json(states)
        return
    print_table(
        ["backend", "state", "to install"], [(s["backend"], s["state"], s["install"] or "") for s in states]
    )


def list_formats(
    backend: Annotated[
        str | None,
        typer.Argument(help="A backend's name; all where none is given.", autocompletion=complete_backend),
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """List formats: what each is, its nominal bits per weight, who reads it, what it needs."""
    from qwodel.backends import backend_names, is_available, load_backend
    from qwodel.cli.report import print_json, print_table

    names = [backend] if backend else [name for name in backend_names() if is_available(name)]
    rows: list[dict[str, Any]] = []
    for name in names:
        adapter = load_backend(name, check_dependencies=False)
        rows += [
            {
                "backend": adapter.name,
                "format": spec.name,
                "bits": spec.bits,
                "description": spec.description,
                "read_by": spec.read_by,
                "needs": list(spec.needs),
            }
            for spec in adapter.formats().values()
        ]
    if json_:
        print_json(rows)
        return
    columns = ["backend", "format", "bits", "description", "read by", "needs"]
    cells = (
        (r["backend"], r["format"], r["bits"] or "?", r["description"], r["read_by"], ", ".join(r["needs"]))
        for r in rows
    )
    print_table(columns, cells)


def list_options(backend: _BackendArgument, json_: JsonFlag = False) -> None:
    """List a backend's options for -O, with defaults."""
    from qwodel.backends import load_backend
    from qwodel.cli.report import print_json, print_table

    fields = load_backend(backend, check_dependencies=False).options_type.model_fields
    rows = [
        {
            "option": name,
            "default": field.get_default(call_default_factory=True),
            "description": field.description,
        }
        for name, field in fields.items()
    ]
    if json_:
        print_json(rows)
        return
    print_table(
        ["option", "default", "description"], [(r["option"], r["default"], r["description"]) for r in rows]
    )
