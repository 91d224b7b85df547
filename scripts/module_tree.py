"""Write the tree of modules in docs/architecture.md: every module with the first line of its docstring.

python scripts/module_tree.py          # rewrite the tree
python scripts/module_tree.py --check  # exit code 1 where it is not as it would be written
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: scripts/module_tree.py writes what follows -->\n", "<!-- end of modules -->\n"
WIDTH = 34


def tree() -> str:
    """Return the tree as a Markdown code block."""
    lines = ["```text", *_folder(ROOT / "qwodel", 0), "```"]
    return "\n".join(lines) + "\n"


def _folder(folder: Path, depth: int) -> list[str]:
    lines = [_line(f"{folder.name}/", folder / "__init__.py", depth)]
    inside = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in inside:
        if path.is_dir() and (path / "__init__.py").is_file():
            lines += _folder(path, depth + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(_line(path.name, path, depth + 1))
    return lines


def _line(name: str, file: Path, depth: int) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return f"{'  ' * depth + name:<{WIDTH}}{docstring.partition(chr(10))[0]}".rstrip()


def page() -> str:
    """Return the whole page with the tree as it should be."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tree()}\n{END}{after}"


def main() -> int:
    written = page()
    if "--check" in sys.argv[1:]:
        return int(written != PAGE.read_text("utf-8"))
    PAGE.write_text(written, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
