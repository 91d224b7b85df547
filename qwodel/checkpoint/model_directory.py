"""What lies beside the weights of a checkpoint: its configuration and its side files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwodel.model_config import read_config
from qwodel.untrusted import kind_of

__all__ = ["ModelDirectory"]

_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
)
_REWRITTEN = frozenset({"config.json", "qwodel.manifest.json"})


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
    def of(cls, source: Path) -> ModelDirectory:
        """Look beside ``source``.

        Raises:
            ValidationError: ``config.json`` is damaged.
        """
        root = source if kind_of(source) == "directory" else source.parent if _is_model_file(source) else None
        if root is None or kind_of(root / "config.json") != "file":
            return cls(root, None)
        return cls(root, read_config(root))

    def side_files(self) -> dict[str, Path]:
        """Return what must come along: everything but weights, indexes and hidden files, by relative path."""
        if self.root is None:
            return {}
        found = {}
        for path in sorted(self.root.rglob("*")):
            relative = path.relative_to(self.root)
            if any(part.startswith(".") for part in relative.parts) or not path.is_file():
                continue
            weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            # Subdirectories of a model repository hold other packagings of the same weights.
            other_packaging = len(relative.parts) > 1 and _holds_weights(self.root / relative.parts[0])
            if not weights and not other_packaging and str(relative) not in _REWRITTEN:
                found[relative.as_posix()] = path
        return found


def _is_model_file(source: Path) -> bool:
    return source.name == "model.safetensors"


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in _WEIGHT_SUFFIXES for path in folder.rglob("*"))
