from __future__ import annotations

import subprocess
import sys

import pytest

from qwodel.exceptions import ConfigurationError
from qwodel.int8 import setup_logging

SCRIPT = """
import logging, sys
from qwodel.int8 import setup_logging
setup_logging(sys.argv[1]); setup_logging(sys.argv[1])
log = logging.getLogger("qwodel.int8.convert")
for name in ("debug", "info", "warning", "error"):
    getattr(log, name)(f"a line of {name}")
logging.getLogger("others").warning("others are left alone")
"""


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        ("DEBUG", ["DEBUG", "INFO", "WARNING", "ERROR"]),
        ("VERBOSE", ["INFO", "WARNING", "ERROR"]),
        ("NORMAL", ["WARNING", "ERROR"]),
        ("minimal", ["ERROR"]),
    ],
)
def test_each_level_says_less_than_the_one_before(level: str, lines: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, level], capture_output=True, text=True, check=True)
    ours = [line.split()[0] for line in done.stderr.splitlines() if "qwodel.int8.convert" in line]
    assert ours == lines
    assert "others are left alone" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("level", ["VERBOS", "", None, 10])
def test_other_levels_are_refused(level: object) -> None:
    with pytest.raises(ConfigurationError, match="logging level") as caught:
        setup_logging(level)  # type: ignore[arg-type]
    assert caught.value.hint
