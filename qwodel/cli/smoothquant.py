"""``qwodel smoothquant``: the SmoothQuant tools as verbs."""

from __future__ import annotations

import typer

from qwodel.smoothquant.commands import TOOLS

__all__ = ["app"]

app = typer.Typer(
    help="SmoothQuant's tools: activation scales, export to INT8, perplexity.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _name, _tool in TOOLS.items():
    app.command(_name)(_tool)
