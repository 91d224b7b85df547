"""What lies beside the weights of a checkpoint: its configuration and its side files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.model_config import read_config
from qwodel.parsed_files import ParsedFiles
from qwodel.side_files import refuse_leading_out, side_files
from qwodel.untrusted import kind_of

__all__ = ["ModelDirectory"]


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """A model directory, or the lack of one.

    Attributes:
        root: the directory; ``None`` when the source is a single file.
        config: its ``config.json``; ``None`` when there is none.
    """

    root: Path | None
    config: Mapping[str, Any] | None

    @classmethod
    def of(cls, source: Path, parsed: ParsedFiles | None = None) -> ModelDirectory:
        """Look beside ``source``; what is ``parsed`` already is not parsed again.

        Raises:
            ValidationError: ``config.json`` is damaged, or a link that leads out of the directory.
        """
        root = source if kind_of(source) == "directory" else source.parent if _is_model_file(source) else None
        if root is None or kind_of(root / "config.json") != "file":
            return cls(root, None)
        refuse_leading_out(root / "config.json", root)
        return cls(root, read_config(root) if parsed is None else parsed.config(root))

    def side_files(self) -> dict[str, Path]:
        """Return what must come along, by relative path; see :func:`qwodel.side_files.side_files`."""
        return {} if self.root is None else side_files(self.root)


def _is_model_file(source: Path) -> bool:
    return source.name == "model.safetensors"
