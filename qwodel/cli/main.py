"""The ``qwodel`` command: its verbs.

Verbs import what they need when they run, so ``--help`` and completion stay quick.
:mod:`qwodel.process` says which exit codes there are.
"""

from __future__ import annotations

from typing import Annotated

import typer

from qwodel.cli import calibrate, check, formats, inspect, plan, quantize, quickstart, smoothquant
from qwodel.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="qwodel",
    help="Make trained models small: GGUF, AWQ, CoreML, FP8, INT8, SmoothQuant and SegQuant.\n\n"
    "Start with:  qwodel quantize MODEL -b gguf -f Q4_K_M",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qwodel {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("quantize")(quantize.quantize)
app.command("plan")(plan.plan)
app.command("calibrate")(calibrate.calibrate)
app.command("list-backends")(formats.list_backends)
app.command("list-formats")(formats.list_formats)
app.command("list-options")(formats.list_options)
app.command("inspect")(inspect.inspect)
app.command("check")(check.check)
app.command("quickstart")(quickstart.quickstart)
app.add_typer(smoothquant.app, name="smoothquant")


def main() -> None:
    """Run the command line; the console script's entry."""
    from qwodel.process import main_of

    main_of(app)


if __name__ == "__main__":
    main()
