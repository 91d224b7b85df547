"""The page on the architecture names every module, and says of each what the module says of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_names_every_module() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "module_tree.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        done.stderr or "run scripts/module_tree.py: docs/architecture.md is not up to date"
    )
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for module in (ROOT / "qwodel").rglob("*.py"):
        if module.name != "__init__.py":
            assert module.name in page, module


def test_every_module_says_what_it_is() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("<!-- modules")[1]
    tree = page.split("```text\n")[1].split("```")[0]
    assert [line for line in tree.splitlines() if len(line.split(maxsplit=1)) < 2] == []
