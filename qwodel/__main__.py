"""The entry of the ``qwodel`` command and of ``python -m qwodel``."""

from __future__ import annotations

import os
import sys

# pathlib would cost a quarter of the interpreter's start.
_HELP = os.path.join(os.path.dirname(__file__), "cli", "help.txt")  # noqa: PTH118, PTH120


def main() -> None:
    """Run the command line.

    ``--help`` alone is answered from a kept text: importing typer takes five times as
    long as starting the interpreter. A test compares the text with typer's own.
    """
    if sys.argv[1:] in (["-h"], ["--help"]):
        with open(_HELP, encoding="utf-8") as file:  # noqa: PTH123
            sys.stdout.write(file.read())
        return
    from qwodel.children import forget_present_folder

    forget_present_folder()  # before typer and what it imports
    from qwodel.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
