"""``qwodel plan``: what a run would write, before it does."""

from __future__ import annotations

from typing import Annotated

import typer

from qwodel.cli.arguments import Backend, FormatOption, JsonFlag, OptionPairs, parse_options

__all__ = ["plan"]


def plan(
    model: Annotated[str, typer.Argument(help="A model directory, a model file, or a hub id (owner/name).")],
    backend: Backend,
    format: FormatOption,  # noqa: A002 - the option's name
    option: OptionPairs = None,
    json_: JsonFlag = False,
) -> None:
    """Show what becomes of every tensor, why, and the exact size of the result; writes nothing.

    \b
    Example:
      qwodel plan ./SmolLM2-135M-Instruct -b int8 -f int8_row
    """
    from qwodel.cli.report import print_json, say
    from qwodel.quantizer import Quantizer

    planned = Quantizer(backend, model, **parse_options(option or [])).plan(format)
    if json_:
        print_json({"output_bytes": planned.output_bytes, "table": planned.table().splitlines()})
    else:
        for line in planned.table().splitlines():
            say(line)
