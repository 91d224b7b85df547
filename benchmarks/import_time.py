"""What ``import qwodel`` and ``qwodel --help`` cost, against an interpreter that does nothing.

Each command runs in fresh processes, in turns, and its median wall time counts.

Usage: ``python benchmarks/import_time.py [-n 25]``
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from importlib.metadata import entry_points


def _console_script() -> str:
    """Return the program that the installed ``qwodel`` command runs."""
    (script,) = entry_points(group="console_scripts", name="qwodel")
    return f"from {script.module} import {script.attr}; {script.attr}()"


_COMMANDS: dict[str, tuple[list[str], float]] = {
    "python -c pass": (["-c", "pass"], 1.0),
    "python -c 'import qwodel'": (["-c", "import qwodel"], 1.5),
    "qwodel --help": (["-c", _console_script(), "--help"], 5.0),
}
"""Label → interpreter arguments, and the ratio to aim at."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--repeat", type=int, default=25, help="runs of each command")
    repeat = parser.parse_args().repeat
    seconds: dict[str, list[float]] = {label: [] for label in _COMMANDS}
    for turn in range(repeat + 1):
        for label, (arguments, _) in _COMMANDS.items():
            taken = _time(arguments)
            if turn > 0:  # the first turn fills the page cache and writes bytecode
                seconds[label].append(taken)
    bare = statistics.median(seconds["python -c pass"])
    print(f"median of {repeat} runs each, in turns\n")
    print(f"{'command':<28}{'ms':>8}{'ratio':>8}{'aim':>8}")
    for label, taken_list in seconds.items():
        median = statistics.median(taken_list)
        aim = _COMMANDS[label][1]
        print(f"{label:<28}{median * 1e3:>8.1f}{median / bare:>8.2f}{aim:>8.1f}")


def _time(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
